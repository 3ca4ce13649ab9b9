"""Bad input raises what the plain module raises, with a message that names the argument, the value and what
is right.
"""

import pytest
import seeds
import torch
from paper import PaperCoordAtt
from torch import nn

from coordatt_fast import CoordAtt, coord_att, explain

WIDTH = 16


def wrong_rank(build):
    return build(WIDTH), torch.randn(WIDTH, 5, 6)


def five_dimensions(build):
    return build(WIDTH), torch.randn(1, WIDTH, 5, 6, 7)


def wrong_channels(build):
    return build(WIDTH), torch.randn(2, 12, 5, 6)


def half_x(build):
    return build(WIDTH), torch.randn(2, WIDTH, 5, 6).half()


def double_x(build):
    return build(WIDTH), torch.randn(2, WIDTH, 5, 6).double()


def float_x_for_half_module(build):
    return build(WIDTH).bfloat16(), torch.randn(2, WIDTH, 5, 6)


def integer_x(build):
    return build(WIDTH), torch.ones(2, WIDTH, 5, 6, dtype=torch.long)


def boolean_x(build):
    return build(WIDTH), torch.ones(2, WIDTH, 5, 6, dtype=torch.bool)


def sparse_x(build):
    return build(WIDTH), torch.randn(2, WIDTH, 5, 6).to_sparse()


def complex_x(build):
    return build(WIDTH), torch.randn(2, WIDTH, 5, 6, dtype=torch.complex64)


def no_rows(build):
    return build(WIDTH), torch.randn(2, WIDTH, 0, 6)


def no_columns(build):
    return build(WIDTH), torch.randn(2, WIDTH, 5, 0)


def other_output_width(build):
    module = build(WIDTH)
    for name in ("conv_h", "conv_w"):
        setattr(module, name, nn.Conv2d(8, 20, 1))
    return module, torch.randn(2, WIDTH, 5, 6)


def norm_of_another_width(build):
    module = build(WIDTH)
    module.bn1 = nn.BatchNorm2d(9)
    return module, torch.randn(2, WIDTH, 5, 6)


def gate_of_another_middle(build):
    module = build(WIDTH)
    module.conv_w = nn.Conv2d(9, WIDTH, 1)
    return module, torch.randn(2, WIDTH, 5, 6)


def weight_of_another_dtype(build):
    module = build(WIDTH)
    module.conv_h.double()
    return module, torch.randn(2, WIDTH, 5, 6)


def not_a_tensor(build):
    return build(WIDTH), [[1.0]]


def nothing(build):
    return build(WIDTH), None


# What each message must contain: the value that is wrong and the one that would be right.
CASES = {
    wrong_rank: ["x", str([WIDTH, 5, 6]), "N, C, H, W"],
    five_dimensions: ["x", str([1, WIDTH, 5, 6, 7]), "N, C, H, W"],
    wrong_channels: ["x", "12", "16"],
    half_x: ["x", "float16", "float32", "autocast"],
    double_x: ["x", "float64", "float32"],
    float_x_for_half_module: ["x", "float32", "bfloat16"],
    integer_x: ["x", "int64"],
    boolean_x: ["x", "bool"],
    sparse_x: ["Sparse"],
    complex_x: ["x", "complex64"],
    no_rows: ["x", str([2, WIDTH, 0, 6])],
    no_columns: ["x", str([2, WIDTH, 5, 0])],
    other_output_width: ["conv_h", "20", "16"],
    norm_of_another_width: ["bn1", "9", "8"],
    gate_of_another_middle: ["conv_w", "9", "8"],
    weight_of_another_dtype: ["conv_h", "float64", "float32"],
    not_a_tensor: ["x", "list"],
    nothing: ["x", "NoneType"],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_module(backend, case, grad, training):
    with torch.set_grad_enabled(grad):
        module, x = case(lambda width: PaperCoordAtt(width, width).train(training))
        with pytest.raises(Exception) as theirs:
            module(x)
        module, x = case(lambda width: CoordAtt(width, width).train(training))
        before = {k: v.clone() for k, v in module.state_dict().items()}
        with pytest.raises(Exception) as ours:
            module(x)
    # A value that is no tensor has no attribute .size in the original: AttributeError; TypeError says the
    # same better.
    expected = (theirs.type, TypeError) if theirs.type is AttributeError else theirs.type
    assert issubclass(ours.type, expected), (
        f"{ours.type.__name__}, plain raises {theirs.type.__name__}: {ours.value}"
    )
    if backend == "cpu" or case in (wrong_rank, five_dimensions, not_a_tensor, nothing):
        for part in CASES[case]:
            assert part in str(ours.value), f"{part!r} not in: {ours.value}"
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} moved in a call that failed"


@pytest.mark.parametrize("inp, oup", [(16, 32), (32, 16)])
def test_widths_that_differ(backend, inp, oup):
    """The original fails at the product; ours says which argument is wrong, at the latest in the call."""
    with pytest.raises(RuntimeError):
        PaperCoordAtt(inp, oup)(torch.randn(1, inp, 4, 4))
    with pytest.raises((RuntimeError, ValueError)) as error:
        CoordAtt(inp, oup)(torch.randn(1, inp, 4, 4))
    if backend == "cpu":
        assert "16" in str(error.value) and "32" in str(error.value)


def test_one_channel_broadcasts_as_in_the_original(backend):
    """inp == 1 multiplies one channel by oup gates: odd, but the original computes it."""
    seeds.seed(0)
    theirs = PaperCoordAtt(1, 6).eval()
    ours = CoordAtt(1, 6).eval()
    ours.load_state_dict(theirs.state_dict())
    from coordatt_fast import use_backend

    x = torch.randn(2, 1, 4, 5)
    with use_backend("auto"):
        assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"activation": "mish"}, ["mish", "hard_swish", "silu", "relu", "relu6"]),
        ({"mid_channels": 0}, ["mid_channels", "0"]),
        ({"mid_channels": -3}, ["mid_channels", "-3"]),
        ({"reduction": 0}, ["reduction", "0"]),
    ],
    ids=str,
)
def test_constructor(arguments, words):
    with pytest.raises((ValueError, ZeroDivisionError)) as error:
        CoordAtt(16, 16, **arguments)
    for word in words:
        assert word in str(error.value), str(error.value)


def functional(**changes):
    module = PaperCoordAtt(WIDTH, WIDTH)
    state = module.state_dict()
    arguments = {
        "x": torch.randn(2, WIDTH, 5, 6),
        "conv1_weight": state["conv1.weight"],
        "conv1_bias": state["conv1.bias"],
        "bn_weight": state["bn1.weight"],
        "bn_bias": state["bn1.bias"],
        "running_mean": state["bn1.running_mean"],
        "running_var": state["bn1.running_var"],
        "conv_h_weight": state["conv_h.weight"],
        "conv_h_bias": state["conv_h.bias"],
        "conv_w_weight": state["conv_w.weight"],
        "conv_w_bias": state["conv_w.bias"],
    }
    return coord_att(**arguments | changes)


FUNCTIONAL = {
    "conv1_weight": (torch.randn(8, 12, 1, 1), ["12", "16"]),
    "conv1_bias": (torch.randn(9), ["9", "8"]),
    "bn_weight": (torch.randn(9), ["9", "8"]),
    "bn_bias": (torch.randn(9), ["9", "8"]),
    "running_mean": (torch.randn(9), ["9", "8"]),
    "running_var": (torch.randn(9), ["9", "8"]),
    "conv_h_weight": (torch.randn(12, 8, 1, 1), ["12", "16"]),
    "conv_h_bias": (torch.randn(9), ["9", "16"]),
    "conv_w_weight": (torch.randn(WIDTH, 9, 1, 1), ["9", "8"]),
    "conv_w_bias": (torch.randn(9), ["9", "16"]),
}


@pytest.mark.parametrize("argument", FUNCTIONAL)
def test_functional_form(cpu, argument):
    """Every argument of a wrong size is named; no kernel reads behind the end of one."""
    value, words = FUNCTIONAL[argument]
    for training in (True, False):
        with pytest.raises((RuntimeError, ValueError)) as error:
            functional(**{argument: value}, training=training)
        for word in [argument.split("_")[0], *words]:
            assert word in str(error.value), str(error.value)


def test_functional_activation(cpu):
    with pytest.raises(ValueError, match="mish.*hard_swish"):
        functional(activation="mish")


@pytest.mark.parametrize(
    "out",
    [
        lambda x: torch.empty(2, WIDTH, 5, 7),
        lambda x: torch.empty(2, WIDTH, 5, 6, dtype=torch.float64),
        lambda x: torch.empty(3, WIDTH, 5, 6),
    ],
    ids=["shape", "dtype", "batch"],
)
def test_out_of_the_wrong_kind(cpu, out):
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="out"):
        functional(out=out(None))


def test_out_with_gradients(cpu):
    x = torch.randn(2, WIDTH, 5, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="out"):
        functional(x=x, out=torch.empty_like(x))


def test_out_that_overlaps_x(cpu):
    """Shifted by one row, a kernel would read what it has just written: refused, or computed as if there were
    no overlap.
    """
    memory = torch.randn(3, WIDTH, 5, 6)
    x, out = memory[:2], memory[1:]
    seeds.seed(0)
    expected = functional(x=x.clone())
    seeds.seed(0)
    with torch.no_grad():
        try:
            functional(x=x, out=out)
        except (RuntimeError, ValueError) as error:
            assert "out" in str(error)
        else:
            assert torch.equal(out, expected)


def test_explain_reports_bad_input_like_a_call(cpu):
    with pytest.raises(ValueError, match="N, C, H, W"):
        explain(CoordAtt(16, 16), torch.randn(16, 5, 6))
