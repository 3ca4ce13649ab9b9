"""What is done with modules in PyTorch without compiling: the same as with the paper's block, in float64.
docs/integration.md has the table; vmap, scripting, export, checkpointing and copies are in test_compile.py and
test_module.py.
"""

import copy
import io
import pickle

import pytest
import tolerances
import torch
from harness import Case, build, data, run
from paper import PaperCoordAtt
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from coordatt_fast import CoordAtt, explain, use_backend

CASE = Case((2, 6, 3, 5), 4, dtype=torch.float64, norm="running")
TRAINED = CASE.but(norm="batch")


def pair(case=CASE):
    d = data(case)
    return d, build(CoordAtt, case, d.params), build(PaperCoordAtt, case, d.params)


def same(found, expected):
    """Two structures of tensors."""
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True):
        assert max(tolerances.errors(a, b)) < tolerances.FORMULAS_AGREE


def same_run(module, theirs, d):
    """Outputs, gradients, statistics of one step; but of conv1's bias, which batch statistics cancel."""
    found, expected = run(module, d.x, d.grad), run(theirs, d.x, d.grad)
    if module.training:
        del found["d conv1.bias"], expected["d conv1.bias"]
    assert found.keys() == expected.keys()
    same(list(found.values()), [expected[name] for name in found])


# Derivatives -----------------------------------------------------------------------------------------


def ensemble(module, d):
    """Several modules as one, by stacked parameters."""
    others = [module, copy.deepcopy(module)]
    with torch.no_grad():
        for p in others[1].parameters():
            p.mul_(1.5)
    parameters, buffers = stack_module_state(others)
    return vmap(lambda p, b: functional_call(module, (p, b), (d.x,)))(parameters, buffers)


def dual(module, d):
    """Forward-mode AD by hand, through x and a parameter."""
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(module.conv_h.weight.detach(), module.conv_h.weight.detach().sin())
        out = functional_call(module, {"conv_h.weight": weight}, (forward_ad.make_dual(d.x, d.grad),))
        return tuple(forward_ad.unpack_dual(out))


def twice(module, d):
    x = d.x.detach().requires_grad_()
    (slope,) = torch.autograd.grad((module(x) * d.grad).sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), [x, module.conv1.weight, module.conv_w.weight])


def buffers_too(module, d):
    """Training with the buffers given from outside: those move, not the module's."""
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    before = [b.clone() for b in module.buffers()]
    out = functional_call(module, buffers, (d.x,))
    assert all(map(torch.equal, module.buffers(), before))
    return out, buffers


DERIVATIVES = {
    "vjp": lambda module, d: (lambda out, pull: (out, pull(d.grad)))(*vjp(module, d.x)),
    "jvp": lambda module, d: jvp(module, (d.x,), (d.grad,)),
    "linearize": lambda module, d: (lambda out, push: (out, push(d.grad)))(*linearize(module, d.x)),
    "jacrev": lambda module, d: jacrev(module)(d.x[:1, :, :2, :2]),
    "jacfwd": lambda module, d: jacfwd(module)(d.x[:1, :, :2, :2]),
    "hessian": lambda module, d: hessian(lambda x: module(x).square().sum())(d.x[:1, :, :2, :2]),
    "hvp": lambda module, d: torch.autograd.functional.hvp(lambda x: module(x).square().sum(), d.x, d.grad),
    "ensemble": ensemble,
    "dual numbers": dual,
    "double backward": twice,
    "functional_call": buffers_too,
}


# torch.func moves no running statistics that the function does not take.
IN_EVAL_ONLY = ("vjp", "jvp", "jacrev", "jacfwd", "hessian", "ensemble")


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize(
    "name, training",
    [*((n, False) for n in DERIVATIVES), *((n, True) for n in DERIVATIVES if n not in IN_EVAL_ONLY)],
)
def test_derivatives(choice, name, training):
    d, ours, theirs = pair(TRAINED if training else CASE)
    with use_backend(choice):
        found = DERIVATIVES[name](ours, d)
    same(found, DERIVATIVES[name](theirs, d))
    same(list(ours.buffers()), list(theirs.buffers()))


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_save_on_cpu(backend, norm):
    d, ours, theirs = pair(CASE.but(norm=norm))
    with torch.autograd.graph.save_on_cpu():
        same_run(ours, theirs, d)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("norm", ["batch", "running"])
def test_anomaly_mode(backend, norm):
    d, ours, theirs = pair(CASE.but(norm=norm))
    with torch.autograd.detect_anomaly(check_nan=True):
        same_run(ours, theirs, d)


def test_anomaly_mode_finds_nan(backend):
    d, ours, _ = pair()
    with pytest.warns(UserWarning), torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="nan"):
        ours(d.x.requires_grad_()).backward(torch.full_like(d.x, torch.nan))


def test_saved_tensors_may_be_written_to(backend):
    d, ours, theirs = pair()
    results = []
    for module in (ours, theirs):
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            leaf = d.x.clone().requires_grad_()
            x = leaf * 1
            out = module(x)
            x.zero_()
            (out * d.grad).sum().backward()
        results.append(leaf.grad)
    same(*results)


def test_make_fx(backend):
    d, ours, theirs = pair()
    graph = make_fx(ours, tracing_mode="real")(d.x)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any("coordatt_fast.attend" in t for t in targets) == (backend == "cpu"), targets
    same(graph(d.grad), theirs(d.grad))


# Where tensors are and what they are -------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_fake_tensors(training):
    with FakeTensorMode():
        module = CoordAtt(6, 6).train(training)
        x = torch.empty(2, 6, 3, 5).to(memory_format=torch.channels_last)
        out = module(x)
        out.sum().backward()
        assert (
            out.shape == x.shape and out.dtype == x.dtype and module.conv1.weight.grad.shape == (8, 6, 1, 1)
        )


@pytest.mark.parametrize("training", [True, False])
def test_meta_device(training):
    module = CoordAtt(6, 6, device="meta").train(training)
    out = module(torch.empty(2, 6, 3, 5, device="meta", requires_grad=True))
    out.sum().backward()
    assert out.is_meta and out.shape == (2, 6, 3, 5)
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in module.parameters())


OPTIONS = dict(mid_channels=4, dtype=torch.float64)


def filled(made, module, **options):
    made.load_state_dict(module.state_dict(), strict=True, **options)
    return made


def under_default_device(module):
    with torch.device("meta"):
        made = CoordAtt(6, 6, **OPTIONS)
    assert all(t.is_meta for t in made.state_dict().values())
    return filled(made, module, assign=True)


def swapped(module):
    """Conversions that exchange the contents of parameters."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return copy.deepcopy(module).to(torch.float32).to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def through_safetensors(module):
    safetensors = pytest.importorskip("safetensors.torch")
    made = CoordAtt(6, 6, **OPTIONS)
    made.load_state_dict(safetensors.load(safetensors.save(module.state_dict())), strict=True)
    return made


def weights_only(module):
    """torch.load in its careful mode."""
    file, made = io.BytesIO(), CoordAtt(6, 6, **OPTIONS)
    torch.save(module.state_dict(), file)
    file.seek(0)
    made.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return made


MADE = {
    "assign": lambda module: filled(CoordAtt(6, 6, device="meta", **OPTIONS), module, assign=True),
    "to_empty": lambda module: filled(
        CoordAtt(6, 6, device="meta", **OPTIONS).to_empty(device="cpu"), module
    ),
    "default device": under_default_device,
    "skip_init": lambda module: filled(nn.utils.skip_init(CoordAtt, 6, 6, **OPTIONS), module),
    "swapped parameters": swapped,
    "safetensors": through_safetensors,
    "weights_only": weights_only,
    "share_memory": lambda module: copy.deepcopy(module).share_memory(),
    "pickle of a pickle": lambda module: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(module)))),
    # num_batches_tracked becomes a floating-point number.
    "type": lambda module: copy.deepcopy(module).type(torch.float32).double(),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", MADE)
def test_ways_to_make_one(backend, way, training):
    d, module, theirs = pair(TRAINED if training else CASE)
    if way in ("swapped parameters", "type"):  # the same rounding
        theirs = MADE[way](theirs)
    made = MADE[way](module).train(training)
    if backend == "cpu" and way != "type":
        assert explain(made, d.x).tier == "fused", str(explain(made, d.x))
    same_run(made, theirs, d)


# Averages of weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["mean", "exponential"])
def test_averaged_model_and_update_bn(backend, average):
    d, ours, theirs = pair(TRAINED)
    states = []
    for module in (ours, theirs):
        options = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if average == "exponential" else {}
        averaged = AveragedModel(module, **options)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for x in (d.x, d.grad, -d.x):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            module.conv1.bias.grad = None
            optimizer.step()
            averaged.update_parameters(module)
        update_bn([d.x, d.grad], averaged)
        states.append(averaged.state_dict())
        assert averaged.module.bn1.momentum == 0.1
    assert list(states[0]) == list(states[1])
    same(*(list(state.values()) for state in states))
