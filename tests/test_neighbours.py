"""A block with the BatchNorm2d and the activation before it in one operator: the same numbers, and whatever else may
be there makes the parts run by themselves, with the same bits.
"""

import contextlib
import copy
import itertools

import pytest
import seeds
import tolerances
import torch
from harness import FLOATS, LAYOUTS, feature_map
from paper import PaperCoordAtt
from test_accelerate import spread
from torch import nn
from torch.nn.utils import parametrizations, prune

from coordatt_fast import CoordAtt, accelerate, backends, models, restore, use_backend

C, SIZE = 12, (5, 7)

if not backends()["cpu"].available:
    pytest.skip("needs the compiled kernels", allow_module_level=True)


def tail(act=nn.ReLU6, block=CoordAtt, norm=nn.BatchNorm2d, **options):
    """Normalisation, activation, block."""
    return nn.Sequential(norm(C), *([] if act is None else [act()]), block(C, C, **options))


def network(act=nn.ReLU6, block=CoordAtt):
    """conv, the three, conv."""
    seeds.seed(1)
    first, last = nn.Conv2d(3, C, 3, padding=1, bias=False), nn.Conv2d(C, 4, 1)
    return spread(nn.Sequential(first, *tail(act, block), last).double())


def image(n=2, channels=3, dtype=torch.float64):
    return feature_map((n, channels, *SIZE), seeds.generator(4), dtype)


def joined(model):
    report = accelerate(model)
    assert report.neighbours, str(report)
    return model


def results(model, x, backward=True):
    """The output, the gradients of x and of every parameter, and the buffers."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(backward)
    with contextlib.nullcontext() if backward else torch.no_grad():
        out = model(x)
    found = {"out": out.detach()}
    if backward:
        out.backward(feature_map(out.shape, seeds.generator(5), out.dtype))
        found |= {"d x": x.grad} | {
            f"d {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
    return found | {n: b.as_subclass(torch.Tensor).clone() for n, b in model.named_buffers()}


class Conv(nn.Module):
    """As the YOLO family has it."""

    def __init__(self, inp, out, act=None):
        super().__init__()
        self.conv = nn.Conv2d(inp, out, 1, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.act = act or nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class LouderConv(Conv):
    def forward(self, x):
        return super().forward(x) * 2


def block():
    return CoordAtt(C, C)


def agree(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        small = name.endswith(".bias") and 1e-9 * theirs["d x"].abs().max()
        if small and value.abs().max() < small:  # a convolution's, which batch statistics cancel
            assert ours[name].abs().max() < small, name
        elif value.is_floating_point():
            assert max(tolerances.errors(ours[name], value)) < tolerances.FORMULAS_AGREE, name
        else:
            assert torch.equal(ours[name], value), name


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        tolerances.assert_same_bits(ours[name].double(), value.double(), name)


# Numbers -------------------------------------------------------------------------------------------


def statistics(bn, training, track, momentum, affine):
    made = nn.BatchNorm2d(C, affine=affine, track_running_stats=track, momentum=momentum, eps=1e-3)
    return spread(made.double()).train(training)


@pytest.mark.parametrize("act", [None, nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_the_function(act, training, calls):
    """Also the modes of the normalisation alone, and its settings; the running statistics of both move."""
    model = spread(tail(act, PaperCoordAtt).double()).train(training)
    ours = joined(copy.deepcopy(model))
    grid = itertools.product((False, True), (False, True), (None, 0.3), (False, True))
    for count, settings in enumerate(grid, start=1):
        model[0] = statistics(model[0], *settings)
        ours[0] = copy.deepcopy(model[0])
        x = image(channels=C)
        agree(results(ours, x), results(model, x))
        agree(results(ours, x, backward=False), results(model, x, backward=False))
        assert len(calls) == 2 * count, settings


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding(dtype, layout, training, calls):
    """An activation without kinks: on which side of one a value is, rounding decides."""
    dtype = FLOATS[dtype]

    def run(model, inputs, to=dtype):
        model = spread(model.to(to)).train(training)
        with torch.no_grad():
            for own, given in zip(model.parameters(), inputs[2:]):
                own.copy_(given)
        x = inputs[0].to(to).requires_grad_()
        out = model(x)
        out.backward(inputs[1].to(to))
        found = {"out": out.detach(), "d x": x.grad} | {f"d {n}": p.grad for n, p in model.named_parameters()}
        return found | {n: b for n, b in model.named_buffers() if training and b.is_floating_point()}

    def draw(seed):
        maps = [feature_map((3, C, *SIZE), seeds.generator(10 + seed + i), dtype) for i in (0, 100)]
        return [
            *maps,
            *(p.detach() for p in spread(tail(nn.SiLU, PaperCoordAtt), 30 + seed).to(dtype).parameters()),
        ]

    def beside(inputs, index):
        g = seeds.generator(200 + index)
        near = [tolerances.beside(t, g) for t in inputs]
        last = list(LAYOUTS.values())[index % 2]
        return [t.contiguous(memory_format=last) for t in near[:2]] + near[2:]

    def under_test(seed):
        x, grad, *rest = draw(seed)
        given = [t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, grad)]
        return run(joined(tail(nn.SiLU)), [*given, *rest])

    yardstick = tolerances.Yardstick(
        draw,
        beside,
        lambda inputs: run(tail(nn.SiLU, PaperCoordAtt), [t.double() for t in inputs], torch.float64),
        lambda inputs: run(tail(nn.SiLU, PaperCoordAtt), inputs),
    )
    zero = [f"d {i}.conv1.bias" for i in range(3)] if training else []
    key = str(dtype).removeprefix("torch.")
    tolerances.check(under_test, yardstick, key=key, draws=3, exactly_zero=zero)
    assert calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_mixed_dtypes(dtype, calls):
    """A half map with a normalisation in float32, under autocast and outside of it."""
    model = spread(tail(nn.SiLU)).eval()
    ours = joined(copy.deepcopy(model))
    x = image(channels=C, dtype=dtype)
    truth = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        out, plain = ours(x), model(x)
    assert out.dtype == plain.dtype == dtype and len(calls) == 1
    assert (out.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + torch.finfo(
        dtype
    ).eps
    for m in (model, ours):
        m[2].to(dtype)
    with torch.no_grad():
        assert max(tolerances.errors(ours(x), truth.double())) < 10 * torch.finfo(dtype).eps
    assert len(calls) == 2


NETWORKS = {
    "mobilenet_v2_ca": (16, "ReLU6"),
    "mobilenext_ca": (18, ""),
    "efficientnet_b0_ca": (16, "SiLU"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_published_networks(name, calls):
    count, act = NETWORKS[name]
    seeds.seed(0)
    plain = getattr(models, name)(5, width_mult=0.1, dropout=0.0).double()
    report = accelerate(ours := copy.deepcopy(plain))
    assert not report.replaced and len(report.skipped) == len(report.neighbours) == count
    row = report.neighbours[0]
    assert row.activation == act and row.cls == "CoordAtt"
    assert isinstance(ours.get_submodule(row.norm), nn.BatchNorm2d) and ours.get_submodule(row.path)
    assert f"  {row.path}  {row.cls}: takes in {row.norm}{' and ' if act else ''}{act}" in str(report).split(
        "\n"
    )
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = feature_map((2, 3, 64, 32), seeds.generator(1), torch.float64)
    with torch.no_grad():
        for training in (True, False):
            plain.train(training), ours.train(training)
            assert max(tolerances.errors(ours(x), plain(x))) < tolerances.FORMULAS_AGREE
    assert len(calls) == 2 * count
    for (key, buffer), theirs in zip(ours.named_buffers(), plain.buffers()):
        assert torch.allclose(buffer, theirs, rtol=1e-9, atol=1e-12), key


def test_blocks_of_other_classes(calls):
    plain = network(block=PaperCoordAtt)
    report = accelerate(ours := copy.deepcopy(plain))
    assert [tuple(row) for row in report.neighbours] == [("3", "PaperCoordAtt", "1", "ReLU6")]
    assert [row.path for row in report.replaced] == ["3"]
    agree(results(ours, image()), results(plain, image()))
    assert calls
    assert restore(ours) == ["", "3"] and [type(m) for m in ours] == [type(m) for m in plain]
    agree(results(ours, image()), results(plain, image()))
    assert len(calls) == 1


def test_again_and_back():
    model = network()
    row = ("3", "CoordAtt", "1", "ReLU6")
    assert [tuple(r) for r in accelerate(model).neighbours] == [row]
    again = accelerate(model)
    assert not again.neighbours and len(again.skipped) == 1
    assert restore(model) == [""] and type(model) is nn.Sequential and restore(model) == []
    assert [tuple(r) for r in accelerate(model).neighbours] == [row]


# Whatever else is there: the parts by themselves ---------------------------------------------------


def hook(place):
    return lambda m: m[place].register_forward_hook(lambda module, args, out: out * 2)


def backward_hook(m):
    m[1].register_full_backward_hook(lambda module, grad, _: None)


def own_forward(place):
    def change(m):
        m[place].forward = lambda x: type(m[place]).forward(m[place], x) * 2

    return change


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class Louder(CoordAtt):
    def forward(self, x):
        return super().forward(x) * 2


def other_class(place, kind):
    return lambda m: setattr(m[place], "__class__", kind)


def put(place, make):
    def change(m):
        m[place] = spread(make().double()) if any(True for _ in make().parameters()) else make()

    return change


def attribute(place, **values):
    return lambda m: m[place].__dict__.update(values)


def same_norm(m):
    m[3] = spread(CoordAtt(C, C, mid_channels=C).double())
    m[3].bn1 = m[1]


def same_statistics(m):
    """Which the normalisation moves in training, and the block's reads."""
    m[3] = spread(CoordAtt(C, C, mid_channels=C).double())
    m[3].bn1.running_mean = m[1].running_mean
    m[3].bn1.eval().train = lambda mode=True: m[3].bn1


class Tagged(torch.Tensor):
    pass


def tagged(m):
    m[1].running_mean = m[1].running_mean.as_subclass(Tagged)


def float_statistics(m):
    m[1].num_batches_tracked = m[1].num_batches_tracked.double()


HOSTILE = {
    "hook on the normalisation": hook(1),
    "hook on the activation": hook(2),
    "hook on the block": hook(3),
    "pre-hook on the block": lambda m: m[3].register_forward_pre_hook(lambda module, args: args[0] * 2),
    "pre-hook on the activation": lambda m: m[2].register_forward_pre_hook(
        lambda module, args: (args[0] * 2,)
    ),
    "backward hook": backward_hook,
    "hook inside the block": lambda m: m[3].bn1.register_forward_hook(lambda module, args, out: out * 2),
    "forward of its own on the normalisation": own_forward(1),
    "forward of its own on the activation": own_forward(2),
    "forward of its own on the block": own_forward(3),
    "a normalisation of another class": other_class(1, Scaled),
    "a block of another class": other_class(3, Louder),
    "SyncBatchNorm": put(1, lambda: nn.SyncBatchNorm(C).eval()),
    "GroupNorm": put(1, lambda: nn.GroupNorm(3, C)),
    "no normalisation": put(1, nn.Identity),
    "another activation": put(2, nn.GELU),
    "ReLU6 of other bounds": attribute(2, max_val=4.0),
    "two activations": lambda m: m.insert(2, nn.SiLU()),
    "something between": lambda m: m.insert(2, nn.Dropout(0.0)),
    "nothing but the block after the convolution": lambda m: [m.pop(1), m.pop(1)],
    "the block in place": attribute(3, _inplace=True),
    "the block's activation": lambda m: setattr(m[3], "act", nn.Tanh()),
    "the block's normalisation": lambda m: setattr(m[3], "bn1", spread(nn.GroupNorm(2, 8).double())),
    "one normalisation in two places": same_norm,
    "one running mean in two places": same_statistics,
    "weights of the normalisation parametrised": lambda m: parametrizations.weight_norm(m[1], dim=0),
    "weights of the normalisation pruned": lambda m: prune.random_unstructured(m[1], "weight", 3),
    "statistics of a class of their own": tagged,
    "statistics of another dtype": float_statistics,
}
ONLY_IN_TRAINING = (
    "one normalisation in two places",
    "one running mean in two places",
    "statistics of another dtype",
)


@pytest.mark.parametrize("change", HOSTILE)
def test_by_themselves(change, calls):
    """In both modes; the change comes after accelerate, and what is compared with had the same change."""
    plain = network()
    ours = joined(copy.deepcopy(plain))
    for model in (plain, ours):
        seeds.seed(2)
        model.train()
        HOSTILE[change](model)
    for training in (True, False):
        calls.clear()
        for model in (plain, ours):
            model.train(training)
        pair = results(ours, image()), results(plain, image())
        (agree if calls else same_bits)(*pair)
        assert not calls or (not training and change in ONLY_IN_TRAINING)


def test_hooks_elsewhere_change_nothing(calls):
    plain = network()
    ours = joined(copy.deepcopy(plain))
    for model in (plain, ours):
        model[0].register_forward_hook(lambda module, args, out: out * 2)
        model.register_forward_hook(lambda module, args, out: out + 1)
        model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    agree(results(ours, image()), results(plain, image()))
    assert calls


def test_global_hooks(calls):
    ours, seen = joined(network()), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(type(module))
    )
    ours(image())
    handle.remove()
    assert not calls and {nn.BatchNorm2d, nn.ReLU6, CoordAtt} <= set(seen)
    ours(image())
    assert calls


@pytest.mark.parametrize(
    "mode", ["reference", "triton", "vmap", "jvp", "trace", "meta", "complex", "integer", "expanded"]
)
def test_other_calls(mode, calls):
    plain = network().eval()
    ours = joined(copy.deepcopy(plain))
    x = image()
    if mode in ("reference", "triton"):
        with use_backend(mode):
            if mode == "triton":
                with pytest.raises(RuntimeError, match="backend 'triton' was chosen but cannot run"):
                    ours(x)
            else:
                assert torch.equal(ours(x), plain(x))
    elif mode == "vmap":
        assert torch.equal(torch.vmap(ours)(x[:, None]), torch.vmap(plain)(x[:, None]))
    elif mode == "jvp":
        assert torch.equal(torch.func.jvp(ours, (x,), (x,))[1], torch.func.jvp(plain, (x,), (x,))[1])
    elif mode == "trace":
        traced = [torch.jit.trace(model, x, check_trace=False) for model in (ours, plain)]
        assert torch.equal(traced[0](x), traced[1](x))
    elif mode == "meta":
        assert ours.to("meta")(x.to("meta")).shape == plain(x).shape
    elif mode == "expanded":
        x = x[:, :, :1].expand(-1, -1, 6, -1)
        assert max(tolerances.errors(ours(x), plain(x))) < tolerances.FORMULAS_AGREE
        return
    else:
        given = x.cfloat() if mode == "complex" else x.long()
        kinds = []
        for model in (plain[1:], ours[1:], joined(plain[1:])):
            with pytest.raises(Exception) as caught:
                model(given)
            kinds.append(caught.type)
        assert len(set(kinds)) == 1
    assert not calls


def test_twice_differentiated(calls):
    plain, ours = network().eval(), joined(network().eval())
    assert torch.autograd.gradcheck(lambda x: ours(x), [image(1).requires_grad_()], fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x), [image(1).requires_grad_()], fast_mode=True)
    assert calls and torch.allclose(ours(image()), plain(image()))


def fails(model, x):
    with pytest.raises(Exception) as caught:
        model(x)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "change, x",
    [
        (None, image(channels=C + 1)),
        (None, image(channels=C)[0]),
        (None, image(channels=C).float()),
        (lambda m: setattr(m, "0", spread(nn.BatchNorm2d(C + 1).double())), image(channels=C)),
        (lambda m: setattr(m[0], "eps", -1.0), image(channels=C)),
        (lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(C - 1).double())), image(channels=C)),
        (lambda m: setattr(m, "2", CoordAtt(C + 1, C + 1).double()), image(channels=C)),
        (lambda m: m[2].to("meta"), image(channels=C)),
        (lambda m: m[2].float(), image(channels=C)),
        (lambda m: setattr(m[0], "running_var", m[0].running_var.float()), image(channels=C)),
        (lambda m: m[2].__dict__["_modules"].pop("conv_h"), image(channels=C)),
    ],
    ids="channels dim dtype features eps weight block device float statistics child".split(),
)
def test_what_raises(change, x, training):
    """The very same exception."""
    plain = spread(tail().double()).train(training)
    ours = joined(copy.deepcopy(plain))
    for model in (plain, ours):
        if change:
            change(model)
    assert fails(ours, x) == fails(plain, x)


def test_one_value_per_channel(calls):
    plain = spread(tail().double())
    ours, x = joined(copy.deepcopy(plain)), torch.ones(1, C, 1, 1).double()
    assert fails(ours, x) == fails(plain, x) and not calls
    assert torch.allclose(ours.eval()(x), plain.eval()(x)) and calls
    none = torch.ones(0, C, *SIZE).double()
    assert ours(none).shape == none.shape and len(calls) == 1


@pytest.mark.parametrize("bias", [True, False])
def test_a_leaf_that_is_the_map(bias, calls):
    """x is not written to, though the activation is in place."""
    model = joined(spread(tail(lambda: nn.ReLU6(inplace=True), bias=bias).double()))
    x = image(channels=C)
    kept = x.clone()
    results(model, x)
    model.eval()(x)
    assert torch.equal(x, kept) and len(calls) == 2


def test_frozen(calls):
    """Gradients for some of the tensors only."""
    plain = spread(tail().double())
    for name, p in plain.named_parameters():
        p.requires_grad_("weight" in name)
    ours = joined(copy.deepcopy(plain))
    found, truth = results(ours, image(channels=C)), results(plain, image(channels=C))
    agree(found, truth)
    assert "d 0.bias" not in found and "d 0.weight" in found and calls
