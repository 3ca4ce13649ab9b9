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
wrong element in a dim channel.

Rounding errors of a few numbers are coin flips, and so is plain PyTorch's error on them. So a case is drawn
several times, and plain PyTorch's error is the largest at the drawn inputs and at others beside them: a few ulps
off, in the other memory format, hard-swish in the other spelling, each against its own truth. There the function is as well or as badly conditioned,
and every rounding falls another way. Each draw is held to its own bound, because one draw with a variance of nearly
zero has errors that drown all others; the norm may be above it in one draw where it is below in the others (root
mean square over the draws), the maxima in none. A case that is above after the few draws that nearly always do is
judged by DRAWS draws with BESIDE others each, the first ones among them: luck runs out, a wrong element stays wrong.
"""

import math
from collections import defaultdict

import torch

# The promise is "never above 2x". Measured on the kernels (the table the suite prints at its end): medians of
# 0.2 to 1.0 per result and dtype, largest 1.6.
NORM_FACTOR = 2.0

# A maximum over a few errors varies more than their norm does. A wrong element is off by 1e3 times and more.
ELEMENT_FACTOR = 4.0

MEASURES = {"norm": NORM_FACTOR, "tensor": ELEMENT_FACTOR, "local": ELEMENT_FACTOR}

# Plain PyTorch's error can be exactly zero on a few elements, so there is a floor. One ulp of the result's
# dtype at the scale of the slice = two roundings to nearest: one is the store, which no implementation can
# avoid, the other is the last arithmetic operation before it. Accumulation, exp and division have to fit in
# the factor.
FLOOR_ULPS = 1.0

# Draws, and inputs beside each of them, that settle a case which the first few leave open. An error that is one
# number, as large as plain PyTorch's usually is, exceeds ELEMENT_FACTOR times the largest of 1 + 15 in one of a
# million draws, where it exceeds that of 1 + FIRST_BESIDE in one of ten.
DRAWS, BESIDE, FIRST_BESIDE = 16, 15, 1

# How far the inputs beside a draw are off: enough that no rounding falls as before, too little to change
# a variance or a cancellation.
OFF_ULPS = 4.0

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
    """Mean size of each element's slice."""
    size = truth.abs()
    if truth.dim() == 4:
        return size.mean(dim=(2, 3) if truth.shape[2] * truth.shape[3] > 1 else (1, 2, 3), keepdim=True)
    return size.mean()


def _relative(value, truth):
    """Every element's error in the three measures; inf where the value is not finite."""
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    value, truth = value.detach().double(), truth.detach().double()
    wrong = torch.nan_to_num((value - truth).abs(), nan=math.inf, posinf=math.inf)
    if not truth.any():  # zero by algebra: no scale to relate errors to
        return wrong, wrong, wrong
    root_mean_square = truth.square().mean().sqrt()
    local = (truth.abs() + _slice_mean(truth)).clamp_min(torch.finfo(torch.float64).tiny)
    return wrong / root_mean_square, wrong / truth.abs().max(), wrong / local


def _measures(value, truth):
    """norm, tensor and local of a result."""
    norm, tensor, local = _relative(value, truth)
    if not norm.numel():
        return 0.0, 0.0, 0.0
    return norm.square().mean().sqrt().item(), tensor.max().item(), local.max().item()


def errors(value, truth):
    """tensor and local of one tensor."""
    return _measures(value, truth)[1:]


def beside(t, generator):
    """t off by up to OFF_ULPS ulps in every element."""
    draw = 2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1
    return (t.double() * (1 + OFF_ULPS * torch.finfo(t.dtype).eps * draw)).to(t.dtype)


class Yardstick:
    """The truth of each draw of a case, and plain PyTorch's largest error there and beside it.

    draw(seed) gives inputs, beside(inputs, index) others a few ulps off; truth(inputs) and plain(inputs) the results,
    dicts of tensors by name. Computed when asked for, and kept.
    """

    def __init__(self, draw, beside, truth, plain):
        self._draw, self._beside, self._truth, self._plain = draw, beside, truth, plain
        self._truths, self._errors, self.dtypes = {}, {}, {}

    def truth(self, seed):
        if seed not in self._truths:
            self._truths[seed] = self._truth(self._draw(seed))
        return self._truths[seed]

    def errors(self, seed, count):
        """By name of the result, plain PyTorch's largest error in each measure at a draw and at count inputs beside."""
        known = self._errors.setdefault(seed, [])
        for index in range(len(known), count + 1):
            inputs = self._draw(seed)
            if index:
                inputs = self._beside(inputs, index)
            truth = self._truth(inputs) if index else self.truth(seed)
            results = self._plain(inputs)
            self.dtypes = {name: value.dtype for name, value in results.items()}
            known.append({name: _measures(value, truth[name]) for name, value in results.items()})
        return {name: [max(each) for each in zip(*(e[name] for e in known[: count + 1]))] for name in self.dtypes}


def check(under_test, yardstick, *, key, draws, floor=FLOOR_ULPS, exactly_zero=(), vanishing=()):
    """Compares under_test(seed), a dict of results, with the yardstick. Raises AssertionError that lists every
    failure.

    draws: how many are nearly always enough. exactly_zero names results whose truth is zero by algebra: they must
    be zero in every bit, plain is not consulted. vanishing names those of VANISHES.
    """
    results = []
    for count, near in ((draws, FIRST_BESIDE), (max(draws, DRAWS), BESIDE)):
        results += [under_test(seed) for seed in range(len(results), count)]
        allowed = [yardstick.errors(seed, near) for seed in range(count)]
        found, ratios = _failures(results, yardstick, allowed, floor, exactly_zero, vanishing)
        if not found:
            break
    for name, ratio in ratios.items():
        observed[key, name].append(ratio)
    assert not found, "\n".join(found)


def _failures(results, yardstick, allowed, floor, exactly_zero, vanishing):
    """What is wrong, in words, and by name the norm of our error over plain PyTorch's."""
    failures, ratios = [], {}
    for name, dtype in yardstick.dtypes.items():
        values, truths = [r[name] for r in results], [yardstick.truth(seed)[name] for seed in range(len(results))]
        if name in exactly_zero:
            for value in values:
                if torch.count_nonzero(value) or torch.isnan(value).any():
                    failures.append(f"{name}: must be exactly zero, is {value.flatten()[:8].tolist()}")
            continue
        if name in vanishing:
            for value, truth, result in zip(values, truths, results):
                if not ((value.double() - truth).abs() <= VANISHES * result["d x"].double().abs().max()).all():
                    failures.append(f"{name}: must vanish, is {value.flatten()[:8].tolist()}")
            continue
        for value in values:
            assert value.dtype == dtype, f"{name}: {value.dtype}, plain gives {dtype}"
        eps = torch.finfo(dtype).eps
        ours, theirs = [_measures(*pair) for pair in zip(values, truths)], [a[name] for a in allowed]
        for index, (measure, factor) in enumerate(MEASURES.items()):
            bounds = [factor * t[index] + floor * eps for t in theirs]
            # Where plain PyTorch itself has no finite number, nothing is promised.
            parts = [0.0 if math.isinf(b) else o[index] / b for o, b in zip(ours, bounds)]
            if not (_root_mean_square(parts) if measure == "norm" else max(parts)) <= 1:
                draw = max(range(len(parts)), key=parts.__getitem__)
                relative = _relative(values[draw], truths[draw])[index]
                where = tuple(int(i) for i in torch.unravel_index(relative.argmax(), relative.shape))
                failures.append(
                    f"{name} [{measure}]: error {ours[draw][index]:.3g} = {ours[draw][index] / eps:.1f} ulp, allowed "
                    f"{bounds[draw]:.3g} (plain PyTorch {theirs[draw][index]:.3g}); worst in draw {draw} of {len(parts)}, "
                    f"element {list(where)}: got {values[draw][where].item()!r}, truth {truths[draw][where].item()!r}"
                )
        norms = [_root_mean_square([e[0] for e in side]) + eps / 2 for side in (ours, theirs)]
        if math.isfinite(norms[0]):
            ratios[name] = norms[0] / norms[1]
    return failures, ratios


def _root_mean_square(numbers):
    return math.sqrt(sum(x * x for x in numbers) / len(numbers))


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
