"""explain() beside the call itself: it raises where the call raises, and what it says of the forward is true."""

import functools
import types

import pytest
import torch
from harness import Case, build, data
from paper import PaperCoordAtt
from test_plan import tier_seen
from torch import nn

from coordatt_fast import CoordAtt, accelerate, explain, use_backend

CASE = Case((2, 12, 5, 7), 8)


def accelerated(cls, case, params):
    assert cls is CoordAtt
    module = build(PaperCoordAtt, case, params)
    accelerate(module)
    return module


MAKERS = {"CoordAtt": build, "accelerated": accelerated}


@pytest.fixture(params=MAKERS)
def module(request):
    return MAKERS[request.param](CoordAtt, CASE, data(CASE).params)


# Inputs and modules that do not go together --------------------------------------------------------

INPUTS = {
    "as it should be": lambda x: x,
    "more channels": lambda x: torch.cat([x, x[:, :4]], 1),
    "one channel": lambda x: x[:, :1],
    "no channel": lambda x: x[:, :0],
    "three dimensions": lambda x: x[0],
    "five dimensions": lambda x: x[None],
    "a number": lambda x: x.sum(),
    "integers": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex64),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "another device": lambda x: x.to("meta"),
    "no image": lambda x: x[:0],
    "no row": lambda x: x[:, :, :0],
    "no column": lambda x: x[..., :0],
    "None": lambda x: None,
    "a list": lambda x: [x],
    "an array": lambda x: x.numpy(),
    "sparse": lambda x: x.to_sparse(),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "one column repeated": lambda x: x[..., :1].expand(-1, -1, -1, 7),
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: nn.Parameter(x),
    "made in inference mode": lambda x: torch.inference_mode()(x.clone)(),
}


def put(name, make):
    """Changes one parameter, buffer or setting."""

    def change(module):
        child, leaf = name.split(".")
        child = getattr(module, child)
        for table, wrap in ((child._parameters, nn.Parameter), (child._buffers, lambda t: t)):
            if leaf in table:
                table[leaf] = wrap(make(table[leaf].detach()))
                return
        setattr(child, leaf, make(getattr(child, leaf)))

    return change


def swap(name, new):
    return lambda module: setattr(module, name, new())


CHANGES = {
    "nothing": lambda m: None,
    "eval": lambda m: m.eval(),
    "float64": lambda m: m.double(),
    "float16": lambda m: m.half(),
    "conv1.weight for more channels": put("conv1.weight", lambda t: torch.cat([t, t], 1)),
    "conv1.bias too long": put("conv1.bias", lambda t: torch.cat([t, t])),
    "conv1.bias in float64": put("conv1.bias", lambda t: t.double()),
    "bn1.weight too short": put("bn1.weight", lambda t: t[1:]),
    "bn1.running_var too short": put("bn1.running_var", lambda t: t[1:]),
    "conv_w.weight in float64": put("conv_w.weight", lambda t: t.double()),
    "conv_h.bias too short": put("conv_h.bias", lambda t: t[1:]),
    "other BatchNorm2d": swap("bn1", lambda: nn.BatchNorm2d(9)),
    "GroupNorm": swap("bn1", lambda: nn.GroupNorm(2, 8)),
    "GELU": swap("act", nn.GELU),
    "3x3 conv1": swap("conv1", lambda: nn.Conv2d(12, 8, 3, padding=1)),
    "grouped conv1": swap("conv1", lambda: nn.Conv2d(12, 8, 1, groups=4)),
    "hook on conv1": lambda m: m.conv1.register_forward_hook(lambda m, i, o: None),
    "hook on act": lambda m: m.act.register_forward_hook(lambda m, i, o: None),
    "hook on itself": lambda m: m.register_forward_hook(lambda m, i, o: None),
}


def outcome(call):
    """The type of what call raises; None when it returns."""
    try:
        call()
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize("backend", ["cpu", "auto", "reference"])
@pytest.mark.parametrize("change", CHANGES)
def test_raises_what_the_call_raises(module, change, backend, cpu):
    CHANGES[change](module)
    x = data(CASE).x
    for name, make in INPUTS.items():
        if name == "no image" and "bias" in change:
            continue  # PyTorch alone looks at these only where there is something to compute
        for grad in (True, False):
            with use_backend(backend), torch.set_grad_enabled(grad):
                plans = []
                said = outcome(lambda: plans.append(explain(module, make(x))))
                if plans and plans[0].tier == "original":
                    continue  # what the module's own forward raises is its own
                happened = outcome(lambda: module(make(x)))
            assert said is happened, f"x is {name}, gradients {grad}"


def test_in_place_where_elements_share_memory(cpu):
    d = data(CASE)
    module = CoordAtt(12, 12, inplace=True).eval()
    shared = d.x[:1].expand(2, -1, -1, -1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert outcome(lambda: explain(module, shared)) is outcome(lambda: module(shared))


def test_the_channels_are_named(module, cpu):
    with pytest.raises(RuntimeError, match=r"x has 16 channels .* conv1.weight \[8, 12, 1, 1\] takes 12"):
        explain(module, torch.zeros(2, 16, 5, 7))


def test_nothing_runs_and_nothing_changes(module, cpu):
    before = {name: t.clone() for name, t in module.state_dict().items()}
    ran = []
    module.register_forward_pre_hook(lambda m, i: ran.append("before"))
    module.conv1.register_forward_hook(lambda m, i, o: ran.append("conv1"))
    explain(module, data(CASE).x)
    assert not ran and all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


# Another forward -----------------------------------------------------------------------------------


def doubled(module):
    module.forward = lambda x: 2 * x


def bound(module):
    module.forward = types.MethodType(lambda self, x: 2 * x, module)


def through_a_partial(module):
    """As hook libraries do that put a device transfer around a forward."""
    own = module.forward

    def moved(module, *args):
        return own(*args)

    module.forward = functools.update_wrapper(functools.partial(moved, module), own)


@pytest.mark.parametrize("replace", [doubled, bound, through_a_partial])
def test_forward_replaced_on_the_instance(module, replace, cpu):
    d = data(CASE)
    replace(module)
    for x in (d.x, d.x[:, :5], d.x.double()):
        if replace is not through_a_partial:
            module(x)
        plan = explain(module, x)
        assert plan.tier == "original" and "replaced on the instance" in plan.reason
    del module.forward
    assert explain(module, d.x).tier == "fused" == tier_seen(lambda: module(d.x))


def test_its_own_forward_put_on_the_instance(module, cpu):
    """Which changes nothing."""
    d = data(CASE)
    module.forward = module.forward
    assert explain(module, d.x).tier == "fused" == tier_seen(lambda: module(d.x))


def test_subclasses(cpu):
    class Halved(CoordAtt):
        def forward(self, x):
            return x / 2

    class Decorated(CoordAtt):
        @functools.wraps(CoordAtt.forward)
        def forward(self, x):
            return x / 2

    class Named(CoordAtt):
        pass

    d = data(CASE)
    for cls in (Halved, Decorated):
        module = build(cls, CASE, d.params)
        plan = explain(module, d.x)
        assert plan.tier == "original" and f"{cls.__name__} has a forward of its own" in plan.reason
        assert tier_seen(lambda: module(d.x)) == "reference"
    assert explain(build(Named, CASE, d.params), d.x).tier == "fused"


def test_hooks_on_the_module_are_named(module, cpu):
    d = data(CASE)
    assert ";" not in explain(module, d.x).reason
    first = module.register_forward_pre_hook(lambda m, args: (args[0][:, :12],))
    plan = explain(module, d.x)
    assert plan.tier == "fused" and "forward pre-hooks may hand it another x" in plan.reason
    first.remove()
    module.register_forward_hook(lambda m, i, o: 2 * o)
    plan = explain(module, d.x)
    assert plan.tier == "fused" == tier_seen(lambda: module(d.x))
    assert plan.reason.endswith("; its forward hooks may return something else")


@pytest.mark.parametrize("what", [None, 3, CoordAtt, nn.Conv2d(1, 1, 1), torch.nn.functional.relu])
def test_takes_this_packages_modules(what):
    with pytest.raises(
        TypeError, match="explain takes a coordatt_fast.CoordAtt or an accelerated module, got a "
    ):
        explain(what, torch.zeros(1, 8, 3, 3))


@pytest.mark.parametrize("training", [False, True])
def test_a_block_and_what_it_takes_in(training, calls, cpu):
    """x is read twice and, under batch statistics, once more; where a part runs by itself: the block's own plan."""
    d = data(CASE)
    block = build(CoordAtt, CASE, d.params).train(training)
    model = nn.Sequential(nn.BatchNorm2d(12).train(training), nn.ReLU6(), block)
    with pytest.raises(TypeError, match=r"got a torch\.nn\.modules\.container\.Sequential"):
        explain(model, d.x)
    accelerate(model)
    plan = explain(model, d.x)
    forward = 4 if training else 3
    assert (plan.tier, plan.backend, plan.reason) == ("fused", "cpu", "the block takes in BatchNorm2d and ReLU6")
    assert [sum(passes) for passes in plan.passes.values()] == [forward, 7]
    assert plan.bytes == (forward + 7) * d.x.numel() * 4 and not calls
    with torch.no_grad():
        for p in model.parameters():
            p.requires_grad_(False)
        assert list(explain(model, d.x).passes) == ["forward"]
        model(d.x)
    assert len(calls) == 1
    model.register_forward_hook(lambda module, args, out: out)
    assert explain(model, d.x).reason.endswith("; its forward hooks may return something else")
    model[1].register_forward_hook(lambda module, args, out: 2 * out)
    plan = explain(model, d.x)
    assert plan.tier == "fused" and "; what stands before it runs by itself" in plan.reason
    model(d.x)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="expected four dimensions"):
        explain(model, d.x[0])
