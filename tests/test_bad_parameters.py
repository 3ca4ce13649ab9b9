"""Parameters, maps and saved tensors that no kernel may take: on another device, of another shape, without memory."""

import promises
import pytest
import tolerances
import torch
from harness import Case, data
from paper import PaperCoordAtt
from test_forward import arguments
from test_registration import OPS, sample
from torch import nn

from coordatt_fast import CoordAtt, checks, coord_att, reference

pytestmark = pytest.mark.usefixtures("cpu")

CASE = Case((2, 16, 5, 7), 8, norm="running")
MODES = {"inference": (False, False), "training": (True, True), "frozen": (False, True)}


def call(function, tensors, training=False, grad=False, x=None, eps=1e-5):
    """function on x and tensors, its gradients too where grad is true."""
    leaves = [t.requires_grad_() if grad and i not in (4, 5) else t for i, t in enumerate(tensors)]
    with torch.set_grad_enabled(grad):
        out = function(data(CASE).x if x is None else x, *leaves, training=training, eps=eps)
        if grad:
            out.sum().backward()
    return out.detach()


def tensors():
    return [t.clone() for t in arguments(data(CASE).params)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", range(10), ids=checks.FUNCTIONAL_NAMES)
def test_on_meta(index, mode):
    """The dispatcher goes by the meta tensor: no kernel would run, and the result would be what memory held."""
    training, grad = MODES[mode]
    given = tensors()
    given[index] = given[index].to("meta")
    with pytest.raises(RuntimeError, match=f"{checks.FUNCTIONAL_NAMES[index]} is on meta.*cpu"):
        call(coord_att, given, training, grad)
    module = CoordAtt(16, 16).train(training)
    owner, _, name = checks.MODULE_NAMES[index].partition(".")
    kept = getattr(getattr(module, owner), name)
    value = kept.detach().to("meta")
    setattr(getattr(module, owner), name, nn.Parameter(value) if isinstance(kept, nn.Parameter) else value)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=f"{owner}.{name} is on meta.*cpu"):
        module(data(CASE).x)


@pytest.mark.parametrize("training", [True, False])
def test_all_parameters_on_meta(training):
    x = data(CASE).x
    for module in (PaperCoordAtt(16, 16), CoordAtt(16, 16)):
        with pytest.raises(RuntimeError):
            module.to("meta").train(training)(x)


@pytest.mark.parametrize("namespace", ["coordatt_fast", "coordatt_fast_triton"])
@pytest.mark.parametrize("op", OPS)
def test_one_argument_on_meta(op, namespace):
    """Each tensor in turn, of every operator."""
    function = getattr(getattr(torch.ops, namespace), op).default
    args = sample(op, promises.case_of(op))
    places = [i for i, t in enumerate(args) if torch.is_tensor(t)]
    for place in places if len(places) > 1 else []:
        given = list(args)
        given[place] = given[place].to("meta")
        with pytest.raises(RuntimeError, match="meta"):
            function(*given)


WEIGHTS = [(8, 16), (16, 8), (8, 16, 1), (8, 16, 1, 1, 1), (16, 8, 1, 1), (8, 16, 1, 1), (128, 1, 1, 1), (8, 4, 2, 2)]
VECTORS = [(8, 1), (1, 8), (1, 8, 1, 1), (16, 1), (1, 16), (9,), (1,), (), (0,)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", range(10), ids=checks.FUNCTIONAL_NAMES)
def test_shapes(index, mode):
    """What plain PyTorch refuses is refused, with the same exception; what it takes is computed."""
    training, grad = MODES[mode]
    taken = 0
    for shape in WEIGHTS if index in (0, 6, 8) else VECTORS:
        given = tensors()
        if list(shape) == list(given[index].shape):
            continue
        numel = torch.Size(shape).numel()
        fits = numel == given[index].numel()
        given[index] = given[index].reshape(shape) if fits else torch.rand(shape)
        try:
            expected = call(reference.coord_att, [t.clone() for t in given], training, grad)
        except Exception as error:
            with pytest.raises(type(error), match=checks.FUNCTIONAL_NAMES[index] if not fits else "shape"):
                call(coord_att, given, training, grad)
        else:
            taken += 1
            assert max(tolerances.errors(call(coord_att, given, training, grad), expected)) < 1e-5
    assert (taken > 0) == (mode == "inference" and index in (2, 3))


@pytest.mark.parametrize("op", promises.SHAPED)
def test_operators_compare_shapes(op):
    promises.refuses_other_shapes(op, torch.ops.coordatt_fast)


def test_what_is_not_contiguous_is_taken():
    given, moved = tensors(), []
    for t in given:
        spread = torch.full((*t.shape, 2), torch.nan)[..., 0]
        moved.append(spread.copy_(t))
    expected = call(reference.coord_att, given)
    assert max(tolerances.errors(call(coord_att, moved), expected)) < 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [-1.0, -1e-5, 0.0, float("nan"), 1e-5])
def test_eps(eps, training):
    """As F.batch_norm: not below zero, and not zero under batch statistics."""
    x = data(CASE).x
    theirs, ours = (cls(16, 16).train(training) for cls in (PaperCoordAtt, CoordAtt))
    ours.load_state_dict(theirs.state_dict())
    theirs.bn1.eps = ours.bn1.eps = eps
    if eps < 0 or (training and eps == 0):
        for call_it in (lambda: ours(x), lambda: call(coord_att, tensors(), training, eps=eps)):
            with pytest.raises(ValueError, match=f"eps.*{eps}"):
                call_it()
        with pytest.raises(ValueError):
            theirs(x)
    else:
        assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", range(10), ids=checks.FUNCTIONAL_NAMES)
def test_parameters_without_memory(index, mode):
    training, grad = MODES[mode]
    given = tensors()
    given[index] = promises.emptied(given[index])
    with pytest.raises(RuntimeError, match=f"{checks.FUNCTIONAL_NAMES[index]}.*elements.*storage"):
        call(coord_att, given, training, grad)


@pytest.mark.parametrize("op", OPS)
def test_arguments_without_memory(op):
    promises.refuses_what_has_no_memory(op, torch.ops.coordatt_fast)


def test_a_map_beyond_all_memory():
    """Its bytes, counted in 64 bits, come out as 2 MiB."""
    images = (2**43 + 1) // 3
    x = torch.zeros(1, 1, 1, 1).expand(images, 3, 1024, 512)
    assert x.numel() * 4 % 2**64 == 2 << 20
    module = CoordAtt(3, 3).eval()
    with torch.no_grad(), pytest.raises(RuntimeError):
        module(x)
