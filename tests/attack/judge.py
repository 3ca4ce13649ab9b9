"""Taken over must mean equal: an accelerated module beside an untouched copy of its own, on 200 fresh inputs."""

import contextlib
import os
import random
import threading
import time
import warnings
from unittest import mock

import numpy as np
import torch
from torch import nn

from attack import spellings
from attack.tensors import laid_out, map_of
from coordatt_fast import accelerate

PHASES, CALLS = 20, 10
SIZES = (
    (1, 1), (1, 7), (6, 1), (2, 2), (3, 5), (5, 3), (4, 4), (7, 6), (2, 13), (9, 9), (17, 3), (20, 18), (3, 24),
)  # fmt: skip
LAYOUTS = ("contiguous", "channels_last", "sliced", "offset", "transposed", "expanded n")
# Where plain PyTorch's rounding and that of the kernels part, relative to the largest element.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
# Gradients that algebra cancels are noise: they are measured against the largest of the call's others.
NOISE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 1.0, torch.float16: 1.0}


class Tagged(torch.Tensor):
    """A tensor of another type."""


def judge(recipe: spellings.Recipe, seed: int = 0) -> str:
    """"refused", "taken" or "not seen" (hostile, taken over, no input told it apart); AssertionError with the
    source where it was taken over and differs."""
    rng = random.Random(seed)
    files = [spellings.build(recipe) for _ in range(2)]
    try:
        torch.manual_seed(seed)
        theirs = files[1][1]()
        spread(theirs)
        ours = files[0][1]()
        ours.load_state_dict(theirs.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = accelerate(ours)
        if not report.replaced:
            return "refused"
        if recipe.hidden:
            raise AssertionError("taken over, though another device or the compiler would see another function")
        compare(Pair(files[0][0], files[1][0], ours, theirs), rng)
        return "taken" if recipe.harmless else "not seen"
    except AssertionError as error:
        raise AssertionError(f"{error}\n{recipe}\n{shown(recipe)}") from None
    finally:
        for made, _ in files:
            spellings.forget(made)


def shown(recipe):
    """The source without its fixed head."""
    text = spellings.text_of(recipe)
    return text[text.index("CHANNELS, K, EVERY") :]


def spread(module: nn.Module) -> None:
    """Weights that spread the gates, statistics that are not zero and one."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn_like(p) * (0.6 if p.dim() == 4 else 0.5) + (1 if "norm" in name or "bn" in name else 0))
        for name, b in module.named_buffers():
            if b.is_floating_point():
                b.copy_(torch.rand_like(b) + 0.5 if name.endswith("var") else torch.randn_like(b) * 0.3)


class Pair:
    """The two modules, the Python modules they live in, and their state before any phase."""

    def __init__(self, our_file, their_file, ours, theirs):
        self.files, self.modules = (our_file, their_file), (ours, theirs)
        self.state = {name: t.clone() for name, t in theirs.state_dict().items()}

    def to(self, dtype, training, load=True):
        for module in self.modules:
            module.to(dtype).train(training)
            if load:
                module.load_state_dict(self.state)
            elif module is self.modules[0]:  # what half precision has left apart
                module.load_state_dict(self.modules[1].to(dtype).state_dict())
            module.requires_grad_(True).zero_grad()

    def side_effects(self):
        """What forward may have counted, in whatever place, per module."""
        return [_counts(file, module) for file, module in zip(self.files, self.modules)]


def _counts(file, module):
    kinds = [v for v in vars(file).values() if isinstance(v, type) and v.__module__ == file.__name__]
    found = {f"class {k.__name__}.{n}": _size(v) for k in kinds for n, v in vars(k).items()}
    found |= {f"global {n}": _size(v) for n, v in vars(file).items() if n != "GIVEN"}
    for name, child in module.named_modules():
        found |= {f"{name}.{n}": _size(v) for n, v in vars(child).items() if n[0] != "_" and n != "training"}
    for name in ("marked", "defaulted"):
        function = getattr(file, name, None)
        found |= {name: (getattr(function, "n", 0), len((function.__defaults__ or ([],))[0]))} if function else {}
    return {name: size for name, size in found.items() if size is not None}


def _size(value):
    if isinstance(value, (bool, int)):
        return value
    if isinstance(value, (list, dict)):
        return (len(value), value.get("n") if isinstance(value, dict) else None)
    return None


# The inputs -----------------------------------------------------------------------------------------


def compare(pair: Pair, rng: random.Random, phases=PHASES, load=True) -> None:
    """Raises AssertionError for the first of phases * CALLS inputs on which the two differ.

    load: every phase starts from the same parameters and statistics.
    """
    before = pair.side_effects()
    doubts = 0
    for phase in range(phases):
        # Every dtype and mode comes up, whatever the seed; the rest by chance.
        dtype = (torch.float64, torch.float64, torch.float32, torch.float64, torch.float16, torch.bfloat16)[phase % 6]
        training = phase % 4 in (1, 2)
        pair.to(dtype, training, load)
        names = ("frozen", "CA_MODE", "time", "thread", "hook", "autocast", "default dtype", "two threads", "grads", "weights")
        around = {name for name in names if rng.random() < 0.12}
        around.add("autocast" if dtype is torch.float32 and phase % 12 > 6 else names[phase % len(names)])
        if dtype is not torch.float32:
            around.discard("autocast")
        if dtype is not torch.float64:
            around.discard("weights")
        with contextlib.ExitStack() as stack:
            _surround(stack, around, pair)
            for _ in range(CALLS):
                given = _input(rng, dtype, training, around)
                wrong = _one(pair, given, around)
                # A gradient may meet a kink of the activation in a coarse dtype: only when it goes on it is wrong.
                if wrong and dtype is not torch.float64 and wrong.startswith("gradient"):
                    doubts += 1
                    wrong = wrong if doubts > 6 else None
                assert not wrong, f"{wrong}\n{given}, {'training' if training else 'eval'}, {sorted(around)}"
                if training and given["values"] == "huge":  # what rounding of 1e300 leaves in the statistics
                    for ours, theirs in zip(*(module.buffers() for module in pair.modules)):
                        ours.copy_(theirs)
        _same_counts(before, pair.side_effects())


def _same_counts(before, after):
    moved = [{n: v for n, v in now.items() if then.get(n) != v} for then, now in zip(before, after)]
    assert moved[0].keys() == moved[1].keys(), f"forward keeps {moved[1]}, taken over it keeps {moved[0]}"


def _surround(stack, around, pair):
    if "CA_MODE" in around:
        stack.enter_context(mock.patch.dict(os.environ, {"CA_MODE": "1"}))
    if "time" in around:
        later = time.time
        stack.enter_context(mock.patch("time.time", lambda: later() + 1e9))
    if "hook" in around:
        for module in pair.modules:
            stack.callback(module.register_forward_hook(lambda m, args, out: None).remove)
    if "default dtype" in around:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
    if "two threads" in around:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(2)
    for module in pair.modules:
        module.requires_grad_("frozen" not in around)
        if "weights" in around:
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(100)


def _input(rng, dtype, training, around):
    """One call in words, for _one to carry out and for the message."""
    exact = dtype is torch.float64
    kinds = ["normal"] * 4 + ["zero", "constant", "positive", "negative"]
    if exact:
        kinds += ["large", "huge", "tiny", "nan", "inf", "mixed", "large", "constant"]
    elif dtype is torch.float32 and not training and "autocast" not in around:
        kinds += ["large", "large"]
    sizes = SIZES if exact or not training else [s for s in SIZES if s[0] * s[1] > 8]
    grads = ["none", "normal", "normal", "large", "huge", "nan"] if exact else ["none", "normal", "normal", "huge"]
    if dtype is torch.float16:
        grads.remove("huge")
    values = rng.choice(kinds if not training or exact else kinds[:4])
    size, n = rng.choice(sizes), rng.choice((1, 2, 3, 4))
    if training and n * sum(size) == 2:
        n = 2  # of two values a statistic the gradient is what rounding leaves of a difference
    return {
        "dtype": dtype, "size": size, "n": n, "values": values,
        "layout": rng.choice(LAYOUTS), "grad": rng.choice(grads), "requires_grad": rng.random() < 0.8,
        "mode": rng.choice(("grad", "grad", "grad", "no_grad", "inference")),
        "type": rng.choice(("tensor",) * 12 + ("parameter", "tagged")), "seed": rng.randrange(2**31),
        "autocast": "autocast" in around, "training": training,
    }  # fmt: skip


def _one(pair, given, around):
    """What is different between the two on this input; None where nothing is."""
    generator = torch.Generator().manual_seed(given["seed"])
    shape = (given["n"], spellings.CHANNELS, *given["size"])
    values = given["values"]
    x = map_of({"positive": "normal", "negative": "normal"}.get(values, values), shape, generator, given["dtype"])
    x = x.abs() if values == "positive" else -x.abs() if values == "negative" else x
    grad = None
    if given["grad"] != "none" and given["mode"] == "grad":
        grad = map_of(given["grad"], shape, generator, given["dtype"])
    results = [_elsewhere(module, x, grad, given, around) for module in pair.modules]
    _forget_order(results, laid_out(x, given["layout"]).detach())
    wrong = _difference(*results, given, grad)
    if wrong and given["dtype"] is torch.float16 and any(p.abs().max() > 100 for p in pair.modules[1].parameters()):
        return None  # the untouched module's own intermediate results overflow
    if wrong and not any("raised" in r for r in results):
        # How far rounding alone moves the untouched module: where it is ill-conditioned, so may the other be.
        near = [None if t is None else _nudged(t, generator, given["autocast"]) for t in (x, grad)]
        kept = [(b, b.clone()) for b in pair.modules[1].buffers()]
        moved = _elsewhere(pair.modules[1], *near, given, around)
        for buffer, before in kept:
            buffer.copy_(before)
        slack = {n: 50 * _most(moved[n].double() - t.double()) for n, t in results[1].items() if _number(t)}
        wrong = _difference(*results, given, grad, slack)
    return wrong


def _forget_order(results, x):
    """An infinite x gives NaN or infinity by the order of its three factors, where two tiny gates make zero."""
    if any("raised" in r or r["output"].shape != x.shape for r in results):
        return
    free = x.isinf() & ~results[0]["output"].isfinite() & ~results[1]["output"].isfinite()
    for r in results:
        r["output"] = torch.where(free, torch.inf, r["output"])


def _number(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def _nudged(t, generator, autocast):
    """t off by a few roundings; under autocast the untouched module rounds to bfloat16."""
    noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16 if autocast else t.dtype).eps
    return (t.double() * (1 + 4 * eps * noise)).to(t.dtype)


def _elsewhere(module, x, grad, given, around):
    found = {}
    call = lambda: found.update(_results(module, x, grad, given, around))
    if "thread" in around:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        call()
    return found


def _results(module, x, grad, given, around):
    _seed(given["seed"])
    x = laid_out(x, given["layout"]).detach()
    leaf = given["requires_grad"] and given["mode"] == "grad"
    if given["type"] == "parameter":
        x = nn.Parameter(x, requires_grad=leaf)
    elif given["type"] == "tagged":
        x = x.as_subclass(Tagged).requires_grad_(leaf)
    else:
        x.requires_grad_(leaf)
    mode = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[given["mode"]]
    cast = torch.autocast("cpu", torch.bfloat16) if "autocast" in around else contextlib.nullcontext()
    for p in module.parameters():
        p.grad = torch.zeros_like(p) if "grads" in around else None
    try:
        with mode(), cast:
            out = module(x)
        if grad is not None and out.requires_grad:
            out.backward(grad)
    except Exception as error:
        return {"raised": type(error).__name__}
    results = {"output": out.detach().as_subclass(torch.Tensor), "gradient of x": x.grad}
    results["random"] = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3])
    for name, p in module.named_parameters():
        results[f"gradient of {name}"] = None if p.grad is None else p.grad.clone()
    return results | {n: b.clone() for n, b in module.named_buffers()}


def _seed(seed):
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _difference(ours, theirs, given, grad, slack=None):
    if "raised" in ours or "raised" in theirs:
        return None if ours.keys() == theirs.keys() else f"raised: {ours.get('raised')} for {theirs.get('raised')}"
    a, b = ours["random"], theirs["random"]
    if not torch.equal(a[0], b[0]) or a[1] != b[1] or a[2][1] != b[2][1] or not np.array_equal(a[2][0], b[2][0]):
        return "the random number generators have moved apart"
    largest = max((_most(t) for n, t in theirs.items() if n.startswith("gradient") and t is not None), default=0.0)
    slack = slack or {}
    overflowed = not bool(theirs["output"].isfinite().all())
    for name in sorted(theirs.keys() - {"random"}):
        a, b = ours[name], theirs[name]
        if (a is None) != (b is None):
            return f"{name} is {'absent' if a is None else 'there'}"
        if a is not None and (why := _apart(name, a, b, given, grad, largest, slack.get(name, 0.0), overflowed)):
            return why
    return None


def _most(t):
    t = t[t.isfinite()]
    return float(t.abs().max()) if t.numel() else 0.0


def _apart(name, a, b, given, grad, largest, slack, overflowed):
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name} is {a.dtype}{tuple(a.shape)}, not {b.dtype}{tuple(b.shape)}"
    if not a.is_floating_point():
        return None if torch.equal(a, b) else f"{name} is {a.tolist()}, not {b.tolist()}"
    dtype, gradient = given["dtype"], name.startswith("gradient")
    special = given["values"] in ("nan", "inf", "mixed") or given["grad"] == "nan" or overflowed
    if gradient and special:
        # What a sum of several infinities is has tests of its own; a NaN that comes in must come out.
        lost = name == "gradient of x" and grad is not None
        lost = lost and bool((a.isnan() & b.isfinite() & ~grad.isfinite()).any())
        return f"{name}: finite where a gradient that is not finite comes in" if lost else None
    if given["values"] == "huge" and (gradient or given["training"]):
        return None  # rounding of 1e300 over batch statistics
    if dtype is torch.float64 and not torch.equal(a.isnan(), b.isnan()):
        return f"{name} has NaN in {int(a.isnan().sum())} elements, not {int(b.isnan().sum())}"
    both = a.isfinite() & b.isfinite()
    if dtype in (torch.float64, torch.float32) and not torch.equal(a.isfinite(), b.isfinite()):
        return f"{name} is finite in {int(a.isfinite().sum())} elements, not {int(b.isfinite().sum())}"
    a, b = a[both].double(), b[both].double()
    scale = max(_most(b), NOISE[dtype] * largest if gradient else 0.0, 1e-300 if dtype is torch.float64 else 1e-5)
    tolerance = TOLERANCE[dtype] if not given["autocast"] else TOLERANCE[torch.bfloat16]
    if given["values"] in ("large", "huge") and dtype is not torch.float64:
        tolerance = max(tolerance, 0.05)
    error = max(0.0, _most(a - b) - slack) / scale
    return f"{name} differs by {error:.2g} of its largest element" if error > tolerance else None


