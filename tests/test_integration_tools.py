"""What people run over a model besides training it: counters, averages, folding, pruning, quantisation, low-rank
updates, profilers, workers. Each beside plain PyTorch, for CoordAtt and for an accelerated block.
"""

import copy
import os
import sys
import threading
import warnings

import pytest
import seeds
import tolerances
import torch
from paper import PaperCoordAtt
from test_accelerate import spread
from torch import nn

from coordatt_fast import CoordAtt, accelerate, explain

C = 24
OURS = pytest.mark.parametrize("kind", ["CoordAtt", "accelerated"])


def network(kind, dtype=torch.float32):
    """A convolution and the block, the same weights in each kind."""
    block = PaperCoordAtt(C, C)
    if kind == "CoordAtt":
        ours = CoordAtt(C, C)
        block = ours if ours.load_state_dict(block.state_dict()) else None
    seeds.seed(0)
    model = spread(nn.Sequential(nn.Conv2d(3, C, 1), block).to(dtype))
    if kind == "accelerated":
        assert accelerate(model).replaced
    return model


def images(dtype=torch.float32, n=2):
    return torch.randn(n, 3, 9, 6, generator=seeds.generator(1)).to(dtype)


def tier(model):
    return explain(model[1], torch.zeros(2, C, 9, 6, dtype=model[0].weight.dtype)).tier


def near(got, wanted, limit=1e-5):
    assert max(tolerances.errors(got.detach(), wanted.detach())) < limit


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Counters -------------------------------------------------------------------------------------------


def with_torchinfo(model):
    found = pytest.importorskip("torchinfo").summary(model, input_data=images(), verbose=0)
    return found.total_params, found.total_mult_adds


def with_thop(model):
    return pytest.importorskip("thop").profile(copy.deepcopy(model), (images(),), verbose=False)


def with_fvcore(model):
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis(model.eval(), images())
    return analysis.unsupported_ops_warnings(False).total()


def with_ptflops(model):
    from third_party import timm  # noqa: F401  torchvision, which it imports, goes with this torch thanks to it

    info = pytest.importorskip("ptflops").get_model_complexity_info
    return info(copy.deepcopy(model), (3, 9, 6), as_strings=False, print_per_layer_stat=False, verbose=False)[1]


def with_torch(model):
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for training in (False, True):
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
                out = model.train(training)(images())
                out.sum().backward() if backward else None
            counts.append(counter.get_total_flops())
    return counts


@OURS
@pytest.mark.parametrize("count", [with_torchinfo, with_thop, with_fvcore, with_ptflops, with_torch])
def test_counters_count_what_they_did(count, kind):
    assert count(network(kind)) == count(network("plain"))


# Averages and changes of weights -----------------------------------------------------------------------


@OURS
def test_averaged_weights_and_their_statistics(kind):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    found = []
    for model in (network(kind), network("plain")):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        for step in range(3):
            model.zero_grad()
            model(images(n=step + 1)).square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            average.update_parameters(model)
        update_bn([images(n=3), images(n=4)], average)
        found.append((average.eval()(images()), average.module))
    near(found[0][0], found[1][0], 1e-4)
    assert tier(found[0][1]) == "fused"


@OURS
def test_parametrised_and_pruned(kind):
    from torch.nn.utils import parametrizations, prune

    for change, runs in (
        (lambda m: parametrizations.weight_norm(m[1].conv1), "fused"),
        (lambda m: parametrizations.orthogonal(m[1].conv_h), "fused"),
        (lambda m: prune.l1_unstructured(m[1].conv1, "weight", amount=0.5), "hybrid"),
    ):
        ours, plain = network(kind, torch.float64), network("plain", torch.float64)
        results = []
        for model in (ours, plain):
            seeds.seed(3)
            change(model)
            out = model(images(torch.float64))
            out.square().sum().backward()
            results.append((out, model[0].weight.grad))
        near(results[0][0], results[1][0], tolerances.FORMULAS_AGREE)
        near(results[0][1], results[1][1], tolerances.FORMULAS_AGREE)
        assert tier(ours) == runs


@OURS
def test_pruning_made_permanent_is_fused_again(kind):
    from torch.nn.utils import prune

    model = network(kind)
    prune.l1_unstructured(model[1].conv1, "weight", amount=0.5)
    prune.remove(model[1].conv1, "weight")
    assert tier(model) == "fused" and (model[1].conv1.weight == 0).sum() == C * 8 // 2


@OURS
def test_folded_normalisation(kind):
    model = network(kind).eval()
    expected = network("plain").eval()(images())
    block = model[1]
    block.conv1 = nn.utils.fusion.fuse_conv_bn_eval(block.conv1, block.bn1)
    block.bn1 = nn.Identity()
    near(model(images()), expected)
    assert tier(model) == "fused"


class LowRank(nn.Module):
    """What LoRA puts around a 1x1 convolution."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False, dtype=base.weight.dtype)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@OURS
def test_low_rank_updates(kind):
    results = []
    for model in (network(kind, torch.float64), network("plain", torch.float64)):
        seeds.seed(4)
        for name in ("conv1", "conv_h", "conv_w"):
            setattr(model[1], name, LowRank(getattr(model[1], name)))
        model(images(torch.float64)).square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for got, wanted in zip(*results, strict=True):
        near(got, wanted, tolerances.FORMULAS_AGREE)


# Quantisation ----------------------------------------------------------------------------------------


def by_fx(model):
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (images(),))
    prepared(images())
    return quantize_fx.convert_fx(prepared)


def by_export(model):
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (images(),)).module(), quantizer)
    prepared(images())
    return convert_pt2e(prepared)


@OURS
@pytest.mark.parametrize("quantise", [by_fx, by_export])
def test_quantised_as_well_as_the_plain_block(quantise, kind):
    """The graph is another, so its steps are; the error that they make is not."""
    expected = network("plain").eval()(images())
    ours, plain = ((quantise(network(k).eval())(images()) - expected).norm().item() for k in (kind, "plain"))
    assert ours < 2 * plain


# Around the process ------------------------------------------------------------------------------------


@OURS
def test_the_profiler_names_the_operator(kind):
    model = network(kind)
    with torch.profiler.profile() as profile:
        model(images()).sum().backward()
    names = {event.name for event in profile.events()}
    assert "coordatt_fast::attend_train_update" in names and "coordatt_fast::attend_backward" in names


@OURS
def test_threads(kind):
    model = network(kind).eval()
    expected, found = model(images()), [None] * 4

    def work(i):
        with torch.no_grad():
            for _ in range(20):
                found[i] = model(images())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, expected) for out in found)


class Features(torch.utils.data.Dataset):
    """What a loader's worker computes with the block."""

    def __init__(self, model):
        self.model = model.eval()

    def __len__(self):
        return 4

    def __getitem__(self, i):
        with torch.no_grad():
            return self.model(images())[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers(start):
    if start == "fork" and sys.platform != "linux":
        pytest.skip("fork is Linux's")
    model = network("CoordAtt")
    expected = model.eval()(images())[0]
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.path.dirname(__file__)
    try:
        loader = torch.utils.data.DataLoader(Features(model), num_workers=2, multiprocessing_context=start)
        for batch in loader:
            assert torch.equal(batch[0], expected)
    finally:
        os.environ.pop("PYTHONPATH") if old is None else os.environ.update(PYTHONPATH=old)
