"""Where a normalisation, an activation and a block may stand, what the module that holds them stays, and what is done
to it: the plain network is always the truth.
"""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import seeds
import tolerances
import torch
from paper import PaperCoordAtt
from test_accelerate import spread
from test_neighbours import (
    HOSTILE,
    C,
    Conv,
    agree,
    block,
    fails,
    image,
    joined,
    network,
    results,
    same_bits,
    tail,
)
from test_neighbours_containers import C3, Inverted
from torch import nn

from coordatt_fast import CoordAtt, accelerate, restore
from coordatt_fast.accelerate import Joined

# Sequentials ---------------------------------------------------------------------------------------


class ConvNormAct(nn.Sequential):
    """As torchvision has it."""

    def __init__(self, inp, out):
        super().__init__(nn.Conv2d(inp, out, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def of_names():
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, C, 1), bn=nn.BatchNorm2d(C), act=nn.ReLU(), att=block())
    )


SEQUENCES = {
    "in a Sequential": (lambda: nn.Sequential(nn.Conv2d(3, C, 1), *tail()), [("3", "1", "ReLU6")]),
    "by names": (of_names, [("att", "bn", "ReLU")]),
    "inside a Sequential": (
        lambda: nn.Sequential(nn.Conv2d(3, C, 1), tail(), nn.ReLU()),
        [("1.2", "1.0", "ReLU6")],
    ),
    "two blocks": (
        lambda: nn.Sequential(nn.Conv2d(3, C, 1), *tail(), *tail(None), block()),
        [("3", "1", "ReLU6"), ("5", "4", "")],
    ),
    "after a Sequential": (
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.SiLU()), block()),
        [("1", "0.1", "SiLU")],
    ),
    "first in a Sequential": (
        lambda: nn.Sequential(
            nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.Sequential(nn.Identity(), block(), nn.ReLU())
        ),
        [("2.1", "1", "")],
    ),
    "a subclass without a forward": (
        lambda: nn.Sequential(ConvNormAct(3, C), block()),
        [("1", "0.1", "ReLU")],
    ),
    "a module of its own that calls its children": (
        lambda: nn.Sequential(nn.Identity(), Conv(3, C), block()),
        [("2", "1.bn", "SiLU")],
    ),
    "the same twice": (
        lambda: (lambda conv, m: nn.Sequential(nn.Conv2d(3, C, 1), conv, m, conv, m))(Conv(C, C), block()),
        [("2", "1.bn", "SiLU"), ("4", "3.bn", "SiLU")],
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name, training, calls):
    make, expected = SEQUENCES[name]
    plain = spread(make().double()).train(training)
    ours = copy.deepcopy(plain)
    own = [set(vars(m)) for m in ours.modules()]
    report = accelerate(ours)
    assert [(row.path, row.norm, row.activation) for row in report.neighbours] == expected
    agree(results(ours, image()), results(plain, image()))
    assert len(calls) == len(expected)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in plain.named_modules()]
    assert (
        isinstance(ours, type(plain))
        and len(ours) == len(plain)
        and all(a is b for a, b in zip(ours, ours.children()))
    )
    assert restore(ours) and [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert [set(vars(m)) for m in ours.modules()] == own


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(3, C, 1), block()),
        lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.ReLU(), block()),
        lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.GELU(), block()),
        lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.MaxPool2d(2), block()),
        lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU(), nn.ReLU(), block()),
        lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.GroupNorm(2, C), block()),
        lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.SyncBatchNorm(C), block()),
        lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), CoordAtt(C, C, inplace=True)),
        lambda: nn.ModuleList([nn.BatchNorm2d(C), block()]),
        lambda: nn.ModuleDict({"bn": nn.BatchNorm2d(C), "block": block()}),
        lambda: nn.Sequential(block()),
    ],
    ids=range(11),
)
def test_nothing_to_take_in(make):
    model = make()
    kinds = [type(m) for m in model.modules()]
    report = accelerate(model)
    assert not report.neighbours and [type(m) for m in model.modules()] == kinds


def test_a_sequential_with_a_forward_of_its_own_is_read(calls):
    class Twice(nn.Sequential):
        def forward(self, x):
            for module in self:
                x = module(module(x))
            return x

    plain = spread(Twice(nn.BatchNorm2d(C), block()).double())
    ours = joined(copy.deepcopy(plain))
    agree(results(ours, image(channels=C)), results(plain, image(channels=C)))
    assert len(calls) == 1 and len(ours[:1]) == 1 and type(ours[:1]) is Twice


EDITS = {
    "append": lambda m: m.append(nn.Tanh()),
    "insert": lambda m: m.insert(1, nn.Conv2d(C, C, 1).double()),
    "insert between": lambda m: m.insert(2, nn.Tanh()),
    "delete the block": lambda m: m.__delitem__(3),
    "delete the normalisation": lambda m: m.__delitem__(1),
    "replace": lambda m: m.__setitem__(2, nn.SiLU()),
    "extend": lambda m: m.extend([nn.BatchNorm2d(4).double(), CoordAtt(4, 4).double()]),
    "pop": lambda m: m.pop(0),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited(edit, calls):
    plain = network().eval()
    ours = joined(copy.deepcopy(plain))
    for model in (plain, ours):
        seeds.seed(3)
        EDITS[edit](model)
    x = image(channels=C if edit == "pop" else 3)
    agree(results(ours, x), results(plain, x))
    assert len(calls) == {
        "insert between": 0,
        "delete the block": 0,
        "delete the normalisation": 0,
        "extend": 2,
    }.get(edit, 1)


def test_parts_of_it(calls):
    """Slices are plain Sequentials of the same modules, and so are sums and products."""
    plain = network().eval()
    ours = joined(copy.deepcopy(plain))
    x = image(channels=C)
    for part in (slice(1, None), slice(1, 4), slice(-4, -1)):
        assert type(ours[part]) is nn.Sequential and all(a is b for a, b in zip(ours[part], list(ours)[part]))
        same_bits(results(ours[part], x), results(plain[part], x))
    for made in (ours + plain, plain + ours, plain * 2):
        assert type(made) is nn.Sequential
    assert ours[3] is list(ours)[3] and not calls
    assert joined(ours[1:])(x).shape == plain[1:](x).shape and calls
    assert len(ours[1:]) == 4 and next(iter(ours[1:].state_dict())) == "1.weight"
    twice = ours * 2
    assert type(twice) is nn.Sequential and twice[0] is twice[5] is ours[0]


def test_a_child_that_is_none():
    plain = nn.Sequential(nn.BatchNorm2d(C), block()).double()
    ours = joined(copy.deepcopy(plain))
    for model in (plain, ours):
        model._modules["0"] = None
    assert fails(ours, image(channels=C))[0] is fails(plain, image(channels=C))[0] is TypeError


# Copies, compilers, exporters ----------------------------------------------------------------------


def foreign():
    return network(block=PaperCoordAtt)


def copies(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [network, Inverted, C3])
def test_copies(make, calls):
    model = joined(spread(make().double()))
    truth = results(model, image())
    fresh = copies(joined(spread(make().double())))
    for twin in fresh:
        calls.clear()
        assert type(twin) is type(model) and isinstance(twin, Joined)
        assert results(twin, image()).keys() == truth.keys() and calls
        assert twin.__dict__ is not model.__dict__ and list(twin.state_dict()) == list(model.state_dict())
        assert restore(twin) and not isinstance(twin, Joined)
    assert isinstance(model, Joined)
    shallow = copy.copy(model)
    assert type(shallow) is type(model) and shallow._modules == model._modules


@pytest.mark.parametrize(
    "make, training, backend",
    [
        (network, True, "aot_eager"),
        (foreign, False, "eager"),
        (Inverted, False, "eager"),
        (C3, True, "eager"),
    ],
)
def test_compiled(make, training, backend, calls):
    plain = spread(make().double()).train(training)
    ours = joined(copy.deepcopy(plain))
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    found = {n.replace("_orig_mod.", ""): t for n, t in results(compiled, image()).items()}
    agree(found, results(plain, image()))
    assert calls


def test_compiled_code_sees_changes(calls):
    plain = network().eval()
    ours = joined(copy.deepcopy(plain))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for change in (
        lambda m: None,
        lambda m: m[1].train(),
        lambda m: setattr(m[1], "eps", 0.5),
        HOSTILE["another activation"],
    ):
        change(ours), change(plain)
        with torch.no_grad():
            assert max(tolerances.errors(compiled(image()), plain(image()))) < tolerances.FORMULAS_AGREE
    assert len(calls) == 3


@pytest.mark.parametrize("make", [network, Inverted, C3])
def test_scripted_exported_and_traced(make, calls):
    plain = spread(make().double()).eval()
    ours, x = joined(copy.deepcopy(plain)), image()
    expected = plain(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [
            torch.export.export(ours, (x,), dynamic_shapes=None).module()(x),
            torch.fx.symbolic_trace(ours)(x),
            torch.jit.trace(ours, x, check_trace=False)(x),
            torch.jit.script(copy.deepcopy(ours))(x),
        ]
    for out in found:
        assert torch.allclose(out, expected)
    assert not calls
    names = dict(torch.fx.symbolic_trace(ours).named_modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in names.values())
    assert (
        torch.equal(torch.func.functional_call(ours, dict(ours.named_parameters()), (x,)), ours(x)) and calls
    )
    assert isinstance(ours, Joined)


def test_replicas_and_wrappers(calls):
    """A replica of nn.DataParallel has its parameters as attributes: there the parts run by themselves."""
    plain = network().eval()
    ours = joined(copy.deepcopy(plain))
    replica = ours._replicate_for_data_parallel()
    replica._modules = {name: child._replicate_for_data_parallel() for name, child in ours._modules.items()}
    replica._modules["3"]._modules = dict(ours[3]._modules)
    for name in ("0", "1", "4"):
        child = replica._modules[name]
        for key, p in ours._modules[name]._parameters.items():
            object.__setattr__(child, key, p)
        child._parameters = {}
    assert torch.allclose(replica(image()), plain(image())) and not calls
    assert torch.allclose(nn.DataParallel(ours)(image()), plain(image())) and calls
    wrapped = nn.DataParallel(copy.deepcopy(plain))
    assert [row.path for row in accelerate(wrapped).neighbours] == ["module.3"]
    half = ours.half()
    assert half(image(dtype=torch.float16)).dtype == torch.float16 and len(calls) == 2


def test_forward_and_attributes(calls):
    plain = network()
    ours = copy.deepcopy(plain)
    objects, tensors = list(ours.modules()), [id(t) for t in (*ours.parameters(), *ours.buffers())]
    flags = [m.training for m in ours.modules()]
    joined(ours)
    assert all(a is b for a, b in zip(ours.modules(), objects))
    assert [id(t) for t in (*ours.parameters(), *ours.buffers())] == tensors
    assert [m.training for m in ours.modules()] == flags
    assert torch.allclose(ours.forward(image()), plain(image()))
    assert torch.allclose(ours(input=image()), plain(input=image())) and len(calls) == 2
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert torch.equal(p, q)


def test_a_framework_subclasses_it():
    """A class made of ours: restore leaves it, and the parts run by themselves."""
    ours = joined(network().eval())
    expected = ours(image())
    ours.__class__ = type("Framework", (type(ours),), {})
    assert torch.equal(ours(image()), expected)
    assert restore(ours) == [""] and torch.allclose(ours(image()), expected)


@pytest.mark.parametrize("name", ["forward", "__iter__"])
def test_a_framework_subclasses_what_is_inside(name, calls):
    """With a forward or an order of its own around ours: it is called, and not looked into."""
    inner = joined(spread(tail().double()))
    kind, x = type(inner), image(channels=C)
    outer = joined(nn.Sequential(inner, nn.BatchNorm2d(C), block()).double().eval())
    values = {
        "forward": lambda self, input: kind.forward(self, input) * 2,
        "__iter__": lambda self: reversed(self._modules.values()),
    }
    inner.__class__ = type("Framework", (kind,), {name: values[name]})
    expected = outer[2](outer[1](inner(x)))
    calls.clear()
    assert torch.allclose(outer(x), expected)
    assert len(calls) == 1


def test_an_attribute_of_the_class_that_was_read(calls):
    """Set later, it hides a child from forward."""

    class Read(Inverted):
        pass

    ours = joined(spread(Read().double()))
    before = ours(image())
    assert len(calls) == 1
    Read.bn2 = nn.Identity()
    assert not torch.allclose(ours(image()), before) and len(calls) == 1


def test_nothing_is_run_or_written():
    class Watched(Inverted):
        def __init_subclass__(cls):
            raise AssertionError("a subclass")

    model = Watched()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for m in model.modules():
        m.register_forward_pre_hook(lambda module, args: pytest.fail("run"))
    random = torch.get_rng_state()
    assert accelerate(model).neighbours
    assert torch.equal(torch.get_rng_state(), random) and not model.__dict__.get("count")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
