"""The table of attention blocks: what the blocks compute, and that no speed is printed whose check failed."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

for package in ("numpy", "timm", "PIL", "sklearn"):
    if package == "timm":
        import importlib.util

        if importlib.util.find_spec("timm") is None:
            pytest.skip("timm is not installed", allow_module_level=True)
    else:
        pytest.importorskip(package, reason="the benchmark's requirements are not installed")

from bench import blocks, other_blocks  # noqa: E402
from bench.whole_network import NONE, OURS, PLAIN, NetworkCase  # noqa: E402
from coordatt_fast import CoordAtt  # noqa: E402


def test_timm_beside_a_torch_for_cpus():
    """torchvision from PyPI, which timm imports, is built for CUDA; both are the real ones."""
    layers = blocks.timm_layers()
    assert layers is sys.modules["timm.layers"] and sys.modules["torchvision"].__version__
    assert layers.SEModule.__module__.startswith("timm.")


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("se", 2 * 480 * 20 + 480 + 20),
        ("eca", 5),
        ("cbam", 2 * 480 * 20 + 2 * 49 + 2),
        ("gc", 480 + 1 + 2 * 480 * 20 + 480 + 20 + 2 * 20),
        ("triplet", 3 * (2 * 49 + 2)),
        ("strip", 7 * 480 * 480 + 480),
    ],
)
def test_blocks_have_the_parameters_of_their_papers(name, parameters):
    """For 480 channels, squeezed to 20."""
    block = blocks.OTHERS[name](480)
    assert sum(p.numel() for p in block.parameters()) == parameters
    x = torch.randn(2, 480, 5, 7, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    gradients = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
    assert all(g.isfinite().all() and g.any() for g in gradients)


def test_strip_pooling_follows_its_equations():
    """The 1 x 1 convolution taken of the strips equals that of their sum on the whole map."""
    block = blocks.StripPooling(6).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    rows = block.rows(x.mean(3, keepdim=True)).expand_as(x)
    columns = block.columns(x.mean(2, keepdim=True)).expand_as(x)
    assert torch.allclose(block(x), x * block.mix(rows + columns).sigmoid(), rtol=0, atol=1e-12)


def test_triplet_attention_follows_its_paper():
    """Branch by branch, on permuted copies of the map."""
    block = blocks.TripletAttention(6).double().eval()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    out = 0
    for gate, order in zip(block.gates, ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 2, 1))):
        y = x.permute(order)
        pooled = torch.stack([y.max(1).values, y.mean(1)], 1)
        out = out + (y * gate(pooled)).permute(order)  # these permutations undo themselves
    assert torch.allclose(block(x), out / 3, rtol=0, atol=1e-12)


class Broken(CoordAtt):
    def forward(self, x):
        return super().forward(x) * 1.01


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_failed_check_suppresses_every_speed(mode, monkeypatch):
    monkeypatch.setitem(other_blocks.ATTENTION, OURS, lambda channels: Broken(channels, channels))
    result = other_blocks.measure(NetworkCase(1, mode, size=64), other_blocks.QUICK, [NONE, PLAIN, OURS])
    assert not result["agreement"]["passed"] and result["seconds"] == {}
    assert other_blocks.cell(result, OURS) == "WRONG" and other_blocks.cell(result, NONE) == "-"


def test_quick_run_writes_its_tables(tmp_path, capsys):
    arguments = ["--quick", "--threads", "1", "--only", "eca", "--out", str(tmp_path)]
    assert other_blocks.main(arguments) == 0
    assert "ALL CHECKS PASSED" in capsys.readouterr().out
    document = json.loads((tmp_path / "blocks.json").read_text())
    assert set(document["sizes"]) == {NONE, "eca", PLAIN, OURS}
    assert document["sizes"][OURS] == document["sizes"][PLAIN] == {"parameters": 3_950_648, "macs": 306_666_368}
    for result in document["results"]:
        assert set(result["seconds"]) == set(document["sizes"])
        assert all(s["p10"] <= s["median"] <= s["p90"] for s in result["seconds"].values())
    if sys.platform == "linux":
        assert all(peak["train"] > peak["eval"] >= 0 for peak in document["peaks"].values()), document["peaks"]
    assert other_blocks.main(["--read", str(tmp_path / "blocks.json")]) == 0
    assert (tmp_path / "blocks.txt").read_text() in capsys.readouterr().out


def test_timm_is_installed_without_what_it_asks_for():
    """torchvision would bring a second torch and CUDA: nothing that pip resolves names it."""
    folder = ROOT / "requirements"
    alone = (folder / "third-party.txt").read_text().splitlines()
    assert {"timm", "torchvision"} <= {line.partition("==")[0] for line in alone}
    for path in folder.glob("*.txt"):
        if path.name != "third-party.txt":
            assert not {"timm", "torchvision"} & {line.partition("==")[0] for line in path.read_text().splitlines()}
