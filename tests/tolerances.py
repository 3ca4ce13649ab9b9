"""The numerical contract as one function and one table.

For every result of a call (output, each gradient, running statistics) three values exist on the same data:
the truth (float64; long double where the case itself is float64), what plain PyTorch gives in the case's
dtype, and what is under test. The error of the latter may be at most

    factor x (plain PyTorch's error)  +  FLOOR_ULPS x eps(dtype of the result)

in each of three measures:

    norm     root mean square of the error / root mean square of the truth                 NORM_FACTOR
    tensor   largest |error| / largest |truth|                                             ELEMENT_FACTOR
    local    largest |error| / (|truth| of the same element + mean |truth| of its slice)   ELEMENT_FACTOR

A slice is one image's one channel of a feature map, one output channel of a weight, the whole of a vector.
The norm is the promise; the other two are there because a norm hides one wrong element, and a maximum one
wrong element in a dim channel. Rounding errors of a few numbers are coin flips, so a case is drawn several
times (harness.py draws small shapes more often); the draws count as one tensor with one dimension more, and
plain PyTorch's error is the largest over equivalent orders of summation: the map as it is, mirrored, and with
channels permuted. Where a result still has few numbers, that largest is a lucky one now and then; there it is
also taken over what the truth itself is off by when every input is off by up to half an ulp: the error that
no program can avoid whose inputs were rounded once, and that grows with cancellation as plain PyTorch's does.
"""

import math
from collections import defaultdict

import torch

# The promise is "never above 2x". Measured on the kernels (the table the suite prints at its end): medians of
# 0.2 to 1.0 per result and dtype, largest 1.6.
NORM_FACTOR = 2.0

# The largest of a few errors is luck: plain PyTorch in one order of summation against itself in the two
# others exceeds 2x in 1% of the suite's comparisons and reaches 8x in 0.1%; ours reaches 2.8x. A wrong
# element is off by 1e3 times and more.
ELEMENT_FACTOR = 4.0

MEASURES = {"norm": NORM_FACTOR, "tensor": ELEMENT_FACTOR, "local": ELEMENT_FACTOR}

# Plain PyTorch's error can be exactly zero on a few elements, so there is a floor. One ulp of the result's
# dtype at the scale of the slice = two roundings to nearest: one is the store, which no implementation can
# avoid, the other is the last arithmetic operation before it. Accumulation, exp and division have to fit in
# the factor.
FLOOR_ULPS = 1.0

# Gradients that batch normalisation cancels although they are not computed as zero: conv1.weight's where
# there is one channel (scaling z changes nothing) or one 1 x 1 image (both strips are equal). What is left is
# eps / var of the terms, or rounding of them divided by sqrt(eps) = 1/316; a few numbers' luck decides, so
# they are only held to be as small as this, relative to the gradient of x.
VANISHES = 2.0**-8

# Two correct float64 programs compared with each other: this one looks for a wrong formula, not for rounding.
# The worst case is the gradient of conv1.weight with one channel, which batch normalisation cancels down to
# its eps (2e-10 of what is left); everywhere else it is below 1e-12. A missing term shows at 1e-3 or more.
FORMULAS_AGREE = 1e-9

# Ratio of the norms per (dtype of x, name of the result): filled by check(), printed by conftest.py.
observed = defaultdict(list)


def _slice_mean(truth):
    """Mean size of each element's slice, over all draws too; truth is [draws, ...]."""
    size = truth.abs()
    if truth.dim() == 5 and truth.shape[3] * truth.shape[4] > 1:
        return size.mean(dim=(0, 3, 4), keepdim=True)
    if truth.dim() == 5:
        return size.mean(dim=(0, 2, 3, 4), keepdim=True)
    return size.mean()


def _relative(values, truths):
    """Every element's error in the three measures, each [draws, ...]; inf where a value is not finite."""
    for value, truth in zip(values, truths):
        assert value.shape == truth.shape, f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    value, truth = (torch.stack([t.detach().double() for t in ts]) for ts in (values, truths))
    wrong = torch.nan_to_num((value - truth).abs(), nan=math.inf, posinf=math.inf)
    if not truth.any():  # zero by algebra: no scale to relate errors to
        return wrong, wrong, wrong
    root_mean_square = truth.square().mean().sqrt()
    local = (truth.abs() + _slice_mean(truth)).clamp_min(torch.finfo(torch.float64).tiny)
    return wrong / root_mean_square, wrong / truth.abs().max(), wrong / local


def _measures(values, truths):
    """norm, tensor and local of a result given as one tensor per draw."""
    norm, tensor, local = _relative(values, truths)
    if not norm.numel():
        return 0.0, 0.0, 0.0
    return norm.square().mean().sqrt().item(), tensor.max().item(), local.max().item()


def errors(value, truth):
    """tensor and local of one tensor."""
    return _measures([value], [truth])[1:]


class Yardstick:
    """The truth of each draw, and plain PyTorch's largest error over all draws and orders of summation.

    truths: one dict (result name to tensor) per draw. plain: per order of summation one such list, in the
    dtype tested. shaken(): more such lists, of truths for inputs off by up to half an ulp; asked for where a
    result has fewer than FEW numbers.
    """

    FEW = 256

    def __init__(self, truths, plain, shaken=None):
        self.truths = truths
        self.dtypes = {name: value.dtype for name, value in plain[0][0].items()}
        self.errors, more = {}, None
        for name in self.dtypes:
            truth = [t[name] for t in truths]
            lists = plain
            if shaken is not None and sum(t.numel() for t in truth) < self.FEW:
                more = shaken() if more is None else more
                lists = [*plain, *more]
            each = [_measures([p[name] for p in order], truth) for order in lists]
            self.errors[name] = [max(pair) for pair in zip(*each)]


def check(results, yardstick, *, key, exactly_zero=(), vanishing=()):
    """Compares results (one dict per draw) with the yardstick. Raises AssertionError that lists every
    failure.

    exactly_zero names results whose truth is zero by algebra: they must be zero in every bit, plain is not
    consulted. vanishing names those of VANISHES.
    """
    failures = []
    for name, dtype in yardstick.dtypes.items():
        values, truths = [r[name] for r in results], [t[name] for t in yardstick.truths]
        if name in exactly_zero:
            for value in values:
                if torch.count_nonzero(value) or torch.isnan(value).any():
                    failures.append(f"{name}: must be exactly zero, is {value.flatten()[:8].tolist()}")
            continue
        if name in vanishing:
            for value, truth, result in zip(values, truths, results):
                if not (
                    (value.double() - truth).abs() <= VANISHES * result["d x"].double().abs().max()
                ).all():
                    failures.append(f"{name}: must vanish, is {value.flatten()[:8].tolist()}")
            continue
        for value in values:
            assert value.dtype == dtype, f"{name}: {value.dtype}, plain gives {dtype}"
        eps = torch.finfo(dtype).eps
        all_ours = _measures(values, truths)
        for index, (measure, factor) in enumerate(MEASURES.items()):
            ours, theirs = all_ours[index], yardstick.errors[name][index]
            bound = factor * theirs + FLOOR_ULPS * eps
            if not ours <= bound:
                relative = _relative(values, truths)[index]
                where = tuple(int(i) for i in torch.unravel_index(relative.argmax(), relative.shape))
                failures.append(
                    f"{name} [{measure}]: error {ours:.3g} = {ours / eps:.1f} ulp, allowed {bound:.3g} "
                    f"(plain PyTorch {theirs:.3g}); worst in draw {where[0]}, element {list(where[1:])}: got "
                    f"{values[where[0]][where[1:]].item()!r}, truth {truths[where[0]][where[1:]].item()!r}"
                )
        if math.isfinite(all_ours[0]):
            observed[key, name].append((all_ours[0] + eps / 2) / (yardstick.errors[name][0] + eps / 2))
    assert not failures, "\n".join(failures)


def assert_same_bits(a, b, message=""):
    """Equal in every bit that carries meaning: values, signs of zero, and NaN in the same places."""
    assert a.shape == b.shape and a.dtype == b.dtype, message
    nan_a, nan_b = torch.isnan(a), torch.isnan(b)
    assert torch.equal(nan_a, nan_b), f"{message}: NaN in different places"
    zero = torch.zeros((), dtype=a.dtype)
    same = torch.equal(a.masked_fill(nan_a, 0), b.masked_fill(nan_b, 0))
    signs = torch.equal(
        torch.signbit(torch.where(nan_a, zero, a)), torch.signbit(torch.where(nan_b, zero, b))
    )
    if not (same and signs):
        differ = (a != b) & ~nan_a
        raise AssertionError(f"{message}: {int(differ.sum())} of {a.numel()} elements differ in their bits")
