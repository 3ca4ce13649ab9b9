"""coord_att behind a NormAct, against the same in plain PyTorch."""

import itertools

import pytest
import seeds
import tolerances
import torch
from harness import FLOATS, LAYOUTS

from coordatt_fast import NormAct, coord_att, use_backend
from coordatt_fast.reference import ACTIVATIONS


def draw(dtype=torch.float64, layout="nchw", shape=(2, 11, 5, 6), mid=8, seed=0):
    """x, a NormAct's tensors and coord_att's."""
    c, g = shape[1], seeds.generator(seed)
    new = lambda *size: torch.randn(size, generator=g, dtype=torch.float64).to(dtype)
    x = new(*shape).contiguous(memory_format=LAYOUTS[layout])
    norm = {
        "weight": 1.5 + new(c) / 4,
        "bias": new(c),
        "running_mean": new(c),
        "running_var": 1 + new(c).square(),
    }
    block = [new(mid, c, 1, 1), new(mid), 1 + new(mid) / 4, new(mid), new(mid), 1 + new(mid).square()]
    return x, norm, [*block, new(c, mid, 1, 1), new(c), new(c, mid, 1, 1), new(c)]


def both(make, dtype=torch.float64, layout="nchw", **options):
    """The results and all that moved or got a gradient, fused and of before(x) in plain PyTorch."""
    results = []
    for fused in (True, False):
        x, norm, block = draw(dtype, layout)
        x.requires_grad_()
        for t in (norm["weight"], norm["bias"], *block[:4], *block[6:]):
            t.requires_grad_()
        stands = make(norm)
        out = (
            coord_att(x, *block, before=stands, **options)
            if fused
            else coord_att(stands(x), *block, **options)
        )
        out.sum().backward()
        leaves = [t.grad for t in (x, *norm.values(), *block) if t.requires_grad]
        moved = [t for t in (norm["running_mean"], norm["running_var"], *block[4:6]) if t is not None]
        results.append([out.detach(), *leaves, *moved, stands.num_batches_tracked])
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("training", [True, False])
def test_as_one_after_the_other(training, activation, layout, calls):
    for norm_training, momentum in itertools.product([True, False], [0.1, None]):
        make = lambda norm: NormAct(
            **norm,
            training=norm_training,
            momentum=momentum,
            activation=activation,
            num_batches_tracked=torch.tensor(2),
        )
        calls.clear()
        for ours, theirs in zip(*both(make, layout=layout, training=training)):
            assert max(tolerances.errors(ours.double(), theirs.double())) < tolerances.FORMULAS_AGREE
        assert len(calls) == 1


def test_statistics_of_the_batch_alone(calls):
    x, norm, block = draw()
    stands = NormAct(norm["weight"], norm["bias"])
    for training in (True, False):
        got = coord_att(x, *block, before=stands._replace(training=training))
        assert max(tolerances.errors(got, coord_att(stands(x), *block))) < tolerances.FORMULAS_AGREE
    assert len(calls) == 2


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("training", [True, False])
def test_x_alone_is_kept(training, activation, calls):
    """For backward: no other tensor of the map's size, neither normalised nor activated."""
    x, norm, block = draw(shape=(2, 5, 40, 50))
    x.requires_grad_()
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        coord_att(
            x, *block, training=training, before=NormAct(**norm, training=training, activation=activation)
        )
    assert [address for address, size in kept.items() if size >= x.numel() / 2] == [x.data_ptr()]
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype, calls):
    x, norm, block = draw(FLOATS[dtype])
    stands = NormAct(**norm, activation="relu")
    got, plain = coord_att(x, *block, before=stands), coord_att(stands(x), *block)
    wide = [t.double() for t in block]
    truth = coord_att(NormAct(*(t.double() for t in norm.values()), activation="relu")(x.double()), *wide)
    assert got.dtype is FLOATS[dtype] and len(calls) == 1
    ours, theirs = (max(tolerances.errors(t, truth)) for t in (got, plain))
    rounding = 4 * torch.finfo(got.dtype).eps if got.dtype is not torch.float64 else tolerances.FORMULAS_AGREE
    assert ours <= 2 * theirs + rounding


def elsewhere(x, norm, block):
    """Calls that are for plain PyTorch, by what makes them so."""
    yield "another backend", x, norm, block, "reference"
    yield "one value a channel", x[:1, :, :1, :1], norm, block, "auto"
    yield "a norm in another dtype", x, {n: t.float() for n, t in norm.items()}, block, "auto"
    yield "no images", x[:0], norm, block, "auto"
    meta = [t.to("meta") for t in block]
    yield "another device", x.to("meta"), {n: t.to("meta") for n, t in norm.items()}, meta, "auto"


@pytest.mark.parametrize("training", [True, False])
def test_elsewhere_the_parts_run(training, calls):
    """With what they return and raise."""
    for why, x, norm, block, backend in elsewhere(*draw()):
        results = []
        for fused in (True, False):
            stands = NormAct(**{n: t.clone() for n, t in norm.items()}, training=training, activation="silu")
            try:
                with use_backend(backend):
                    results.append(
                        coord_att(x, *block, before=stands) if fused else coord_att(stands(x), *block)
                    )
            except Exception as error:
                results.append(repr(error))
        assert not calls or (why == "one value a channel" and not training), why
        same = (
            results[0] == results[1] if isinstance(results[0], str) else results[0].shape == results[1].shape
        )
        if same and not (isinstance(results[0], str) or x.is_meta or not x.numel()):
            same = max(tolerances.errors(*results)) < tolerances.FORMULAS_AGREE
        assert same, (why, results)
        calls.clear()


def test_transforms(calls):
    x, norm, block = draw()
    stands = NormAct(**norm, activation="relu6")
    batched = torch.func.vmap(lambda t: coord_att(t, *block, before=stands))(torch.stack([x, 2 * x]))
    assert (
        max(tolerances.errors(batched[1], coord_att(2 * x, *block, before=stands)))
        < tolerances.FORMULAS_AGREE
    )


WRONG = [
    (dict(before=NormAct(activation="tanh")), ValueError, "before.activation is 'tanh'"),
    (dict(before=NormAct(), inplace=True), ValueError, "before goes with a result of its own"),
    (dict(before=NormAct(), out=torch.zeros(2, 11, 5, 6).double()), ValueError, "before goes with"),
    (dict(before=NormAct(torch.ones(3).double())), RuntimeError, "11"),
    (dict(before=NormAct(eps=0.0, training=True)), ValueError, "eps"),
]


@pytest.mark.parametrize("options, error, message", WRONG)
def test_what_does_not_fit_is_refused(options, error, message):
    x, _, block = draw()
    with pytest.raises(error, match=message):
        coord_att(x, *block, **options)


def test_a_block_that_does_not_fit_moves_nothing(calls):
    x, norm, block = draw()
    tracked, mean = torch.tensor(0), norm["running_mean"].clone()
    block[6] = block[6][:, :3]
    with pytest.raises(RuntimeError, match="conv_h_weight"):
        coord_att(x, *block, before=NormAct(**norm, training=True, num_batches_tracked=tracked))
    assert torch.equal(mean, norm["running_mean"]) and tracked == 0
