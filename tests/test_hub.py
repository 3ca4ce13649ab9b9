"""make hub: the package put together as a kernel of the Hugging Face Hub, read and loaded by kernels."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import coordatt_fast

pytest.importorskip("tomllib", reason="make hub needs Python 3.11")
# The repository's own folder kernels/ would do for "kernels" alone.
pytest.importorskip("kernels.layer", reason="the package kernels is not installed")

import kernels
from hub.assemble import renamed, rewritten, too_new

ROOT = Path(__file__).parent.parent
COMPILED = coordatt_fast.backends()["cpu"].available


def test_the_folder_is_as_kernels_wants_it(hub):
    """By kernels' own readers of build.toml, metadata and digests."""
    from kernels.variants import parse_variant

    _rust = kernels._rust
    backends = {str(backend) for backend in _rust.Build.open(hub).general.backends}
    variants = sorted(path for path in (hub / "build").iterdir() if path.is_dir())
    assert {f"torch-{backend}" for backend in backends} <= {path.name for path in variants}
    found = set()
    for path in variants:
        assert parse_variant(path.name).variant_str == path.name
        metadata = _rust.Metadata.read_from_file(path / "metadata.json")
        metadata.digest.validate(_rust.Digest.hash_variant(_rust.DigestAlgorithm.SHA256, path))
        assert metadata.name.python_name == "coordatt_fast" and metadata.license == "mit"
        assert metadata.id.isidentifier() and str(metadata.backend.backend_type).lower() in metadata.id
        found.add(metadata.id)
    assert len(found) == len(variants)
    if COMPILED:
        assert any(path.name.startswith("torch-stable-abi211-cpu-") for path in variants)
    extension = {
        str(path.relative_to(hub / "torch-ext/coordatt_fast")) for path in (hub / "torch-ext").rglob("*.*")
    }
    metadata = json.loads((hub / "build/torch-cpu/metadata.json").read_text())
    assert extension | {"coordatt_fast/__init__.py"} == set(metadata["digest"]["files"])
    assert {"layers.py", "kernels/gate.py", "lib/build.json"} <= extension


STRANGER = """
import importlib.util, os, pathlib, sys, torch
sys.modules["coordatt_fast"] = None  # an import of it raises
from kernels import LayerRepository, Mode, get_kernel, get_local_kernel, kernelize, use_kernel_mapping
from test_integration_kernels_block import Block

hub = pathlib.Path(sys.argv[1])
x, module = torch.randn(2, 24, 5, 4), Block(24, 24).eval()
wanted = module(x)
layer = LayerRepository("someone/coordatt-fast", layer_name="CoordAtt", version=0)
with use_kernel_mapping({"CoordAtt": {"cpu": layer}}):
    kernelize(module, mode=Mode.TRAINING, device="cpu", use_fallback=False)
assert torch.allclose(module(x), wanted, atol=1e-6)
cached = sys.modules[module.forward.__func__.__module__.partition(".")[0]]
assert cached.library.load().path.is_symlink() or not cached.backends()["cpu"].available
print(cached.__name__, cached.backends()["cpu"].available)
os.environ["LOCAL_KERNELS"] = f"someone/else={hub}"
assert get_kernel("someone/else", version=0).backends() == cached.backends()
for variant in sorted((hub / "build").glob("torch-*")):
    kernel = get_local_kernel(variant)
    for path in variant.rglob("*.py"):
        name = ".".join(path.relative_to(variant).with_suffix("").parts)
        needs_library = name == "joined" and not kernel.backends()["cpu"].available
        if path.name != "__init__.py" and not name.startswith("kernels.") and not needs_library:
            importlib.import_module(f"{kernel.__name__}.{name}")
    ours = kernel.CoordAtt(24, 24).eval()
    ours.load_state_dict(module.state_dict())
    assert torch.allclose(ours(x), wanted, atol=1e-6)
    spec = importlib.util.spec_from_file_location("older", variant / "coordatt_fast/__init__.py")
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    assert older.layers is kernel.layers and set(older.__all__) == set(kernel.__all__)
"""


@pytest.fixture
def cache(hub, tmp_path):
    """HF_HOME with the kernel as the Hub's client keeps what it has downloaded: links to files named by content."""
    folder, revision = tmp_path / "hub/kernels--someone--coordatt-fast", "0" * 40
    for place in ("refs", "blobs"):
        (folder / place).mkdir(parents=True)
    (folder / "refs/v0").write_text(revision)
    for path in (hub / "build").rglob("*.*"):
        if path.is_file() and path.suffix != ".pyc":
            blob = folder / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.exists() or blob.hardlink_to(path)
            link = folder / "snapshots" / revision / path.relative_to(hub)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return tmp_path


def test_from_a_cache_without_the_package(hub, cache, tmp_path):
    """Every variant, and all of them in one process, where nothing of coordatt_fast can be imported."""
    (tmp_path / "test_integration_kernels_block.py").write_text(
        "import kernels\nfrom paper import PaperCoordAtt\n\n\n"
        '@kernels.use_kernel_forward_from_hub("CoordAtt")\nclass Block(PaperCoordAtt):\n    pass\n'
    )
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    command = [sys.executable, "-c", STRANGER, str(hub)]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    name, available = result.stdout.split()
    assert name.startswith("_coordatt_fast_cpu_") and available == str(
        coordatt_fast.backends()["cpu"].available
    )


@pytest.mark.skipif(not COMPILED, reason="the compiled library is not available")
def test_each_copy_has_its_own_operators(kernel):
    x = torch.randn(2, 3, 7, 5)
    ours, theirs = torch.ops.coordatt_fast, getattr(torch.ops, kernel.__name__)
    assert kernel.__name__ != "coordatt_fast" and torch.equal(ours.pool(x), theirs.pool(x))
    assert (
        ours.pool.default.name() == "coordatt_fast::pool"
        and theirs.pool.default.name() == f"{kernel.__name__}::pool"
    )
    ours.set_simd_level("baseline" if ours.simd_level() != "neon" else "neon")
    assert theirs.simd_level() == kernel.backends()["cpu"].reason.split()[-1]
    ours.set_simd_level(theirs.simd_level())


@pytest.mark.parametrize("line", [
    "import coordatt_fast.ops", 'torch.ops.coordatt_fast_new.pool', 'torch.library.custom_op("coordatt_fast::new")',
])  # fmt: skip
def test_what_it_cannot_rewrite_is_refused(line):
    with pytest.raises(SystemExit, match="do not know how to rewrite"):
        rewritten(f"import torch\n{line}\n", ".")


def test_a_library_that_is_not_fit_is_refused():
    with pytest.raises(SystemExit, match="no place for the operators' namespace"):
        renamed(b"\x7fELF", "_coordatt_fast_cpu_0")
    wanted = b"\0GLIBC_2.28\0GLIBC_2.34\0GLIBCXX_3.4.24\0GLIBCXX_3.4.30\0CXXABI_1.3.9\0"
    assert too_new(wanted) == ["GLIBC 2.34", "GLIBCXX 3.4.30"]
