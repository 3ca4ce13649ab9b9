"""Modules one after the other, where a block takes in the BatchNorm2d and the activation right before it.

Nothing is remembered between calls: whether a normalisation, perhaps an activation, and a block stand in a
row, and whether the fused operator computes what they do, is read from the modules each time.
"""

import functools
import itertools

import torch
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Identity, Module, Parameter, ReLU6, Sequential

from coordatt_fast import before as stacked
from coordatt_fast import internals, plan, reference
from coordatt_fast.codes import NORM_BATCH, NORM_GIVEN
from coordatt_fast.module import CoordAtt
from coordatt_fast.twin import laboratory, noise
from coordatt_fast.wiring import as_constant

# Where accelerate keeps what it found out: about a block; about what holds one, or is a chain of children.
BLOCK, CONTAINER = "_coordatt_fast", "_coordatt_fast_steps"

_PLAIN = frozenset((Tensor, Parameter))
_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_RELU6 = tuple(reference.ACTIVATIONS).index("relu6")
# What may stand between the normalisation and the block, and what holds no chain.
FOLLOWERS = frozenset((*map(type, plan.MADE.values()), Identity))
_LEAVES = FOLLOWERS | {nn.Conv2d, BatchNorm2d, CoordAtt, nn.Dropout, nn.MaxPool2d, nn.Upsample}
_sequential, _iterate = Sequential.forward, Sequential.__iter__
_is_compiling = internals.is_compiling


def is_sequence(kind: type) -> bool:
    """Whether modules of this class call their children one after the other and do nothing else."""
    if not issubclass(kind, Sequential) or kind.__iter__ is not _iterate:
        return False
    own = getattr(kind, "_coordatt_fast_own", None)
    if own is None:
        return kind.forward is _sequential
    return kind.forward is own.forward and own._coordatt_fast_class.forward is _sequential


def is_plain_call(x) -> bool:
    """Whether x is a tensor in a call that nobody traces or transforms."""
    return type(x) in _PLAIN and internals.not_ordinary() is None


def run(modules, x):
    """x through the modules, one after the other."""
    waiting: list[Module] = []  # a normalisation and what followed it
    for module in flat(modules):
        kind = type(module)
        if waiting:
            if kind in FOLLOWERS:
                waiting.append(module)
                continue
            out = _joined(waiting, module, x)
            if out is not None:
                x, waiting = out, []
                continue
            for waited in waiting:
                x = waited(x)
            waiting = []
        if kind is BatchNorm2d or (kind.__base__ is BatchNorm2d and is_norm_act(kind)):
            waiting = [module]
        else:
            x = module(x)
    for waited in waiting:
        x = waited(x)
    return x


def flat(modules):
    """The modules; in place of one that only calls its children, these."""
    for module in modules:
        if type(module) in _LEAVES or (inner := children_in_order(module)) is None:
            yield module
        else:
            yield from flat(inner)


def children_in_order(module: Module | None) -> list[Module] | None:
    """The children of a module that calls them one after the other, with nobody looking on; else None."""
    if module is None or _observed(module):
        return None
    d = module.__dict__
    record = d.get(CONTAINER)
    if record is not None and record.wiring.steps is not None:
        steps = as_constant(id(record)) if _is_compiling() else record.wiring
        if steps.chain is None or type(module) is not steps.kind:
            return None
        if steps.changed(module, record.wiring.codes):
            return None
        return [d["_modules"][name] for name in steps.chain]
    return list(d["_modules"].values()) if is_sequence(type(module)) else None


def _observed(module: Module):
    """Whether a call of the module does more than its class says, global hooks aside."""
    if _is_compiling():
        return plan.observed(module)
    d = module.__dict__
    return (
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
        or "_compiled_call_impl" in d
    )


def _joined(waiting: list[Module], block: Module, x):
    """The block's output by the operator that computes what is waiting too; None where each runs by
    itself."""
    found = arguments(waiting, block, x)
    if found is None:
        return None
    try:
        return stacked.attention(x, *found)
    except RuntimeError:
        plan.check_plain(block._modules if type(block) is CoordAtt else _wiring(block).children(block), x)
        raise


def arguments(waiting: list[Module], block: Module, x) -> tuple | None:
    """before.attention's arguments after x; None where what is waiting and the block run by themselves."""
    if type(x) not in _PLAIN or x.dim() != 4 or x.dtype not in _DTYPES:
        return None
    kind, d = type(block), block.__dict__
    if not is_block(block) or _observed(block) or (before := _before(waiting, x)) is None:
        return None
    if kind is CoordAtt:
        found = plan.arguments(d, x)
    else:
        found = _wiring(block).arguments(block, x, d[BLOCK].wiring.codes)
    if type(found) is not tuple:
        return None
    weights, norm, activation, skip, tracked, momentum, update, group, out = found
    if group is not None or out is not None:
        return None
    if (update or before[9]) and (before[2] is weights[4] or before[3] is weights[5] or before[7] is tracked):
        return None  # one normalisation in both places reads or moves what it has moved
    return before, weights, norm, activation, skip, tracked, momentum, update


def is_block(module: Module) -> bool:
    """Whether it is a CoordAtt, or was accelerated, and runs no forward but theirs."""
    kind = type(module)
    if kind is CoordAtt:
        return True
    return BLOCK in module.__dict__ and getattr(kind, "_coordatt_fast_own", None) is kind


def _wiring(block: Module):
    record = block.__dict__[BLOCK]
    return as_constant(id(record)) if _is_compiling() else record.wiring


def _before(waiting: list[Module], x) -> tuple | None:
    """before.attention's before; None where these modules compute something else or are looked at."""
    for module in waiting:
        if _observed(module):
            return None
    norm, *followers = waiting
    d = norm.__dict__
    try:
        if type(norm) is not BatchNorm2d:
            inner = [d["_modules"]["drop"], d["_modules"]["act"]]
            if any(type(module) not in FOLLOWERS or _observed(module) for module in inner):
                return None
            followers = inner + followers
        activation = -1
        for module in followers:
            if type(module) is not Identity:
                if activation >= 0 or (activation := activation_code(module)) < 0:
                    return None
        parameters, buffers = d["_parameters"], d["_buffers"]
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, tracked = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        eps, momentum, training = d["eps"], d["momentum"], d["training"]
        update = training and d["track_running_stats"]
    except KeyError:  # a replica of nn.DataParallel, whose parameters are attributes
        return None
    batch = training or mean is None
    if not stacked.serves(x, (weight, bias, mean, var), eps, batch):
        return None
    if update:
        if tracked is None:
            if momentum is None:
                return None
        elif type(tracked) is not Tensor or tracked.dtype is not torch.int64 or not tracked.is_cpu:
            return None
    kind = NORM_BATCH if batch else NORM_GIVEN
    return weight, bias, mean, var, eps, kind, activation, tracked, momentum, update


def activation_code(module: Module) -> int:
    """As plan.activation_code, -1 for none."""
    if type(module) is ReLU6:
        d = module.__dict__
        return _RELU6 if d["min_val"] == 0 and d["max_val"] == 6 else -1
    code = plan.activation_code(module)
    return -1 if code is None else code


# timm's BatchNormAct2d ------------------------------------------------------------------------------


def is_norm_act(kind: type) -> bool:
    """Whether the class is timm's BatchNorm2d that calls its children drop and act after it."""
    if kind.__name__ != "BatchNormAct2d" or not kind.__module__.startswith("timm."):
        return False
    return _is_norm_act(kind, getattr(kind.forward, "__code__", None))


@functools.lru_cache(maxsize=16)
def _is_norm_act(kind: type, code) -> bool:
    """By numbers, in each case that BatchNorm2d's own forward tells apart."""
    try:
        with laboratory():
            for training, track, momentum in itertools.product((False, True), (False, True), (0.1, None)):
                made = kind(3, track_running_stats=track, act_layer=nn.SiLU)
                results = []
                for module in (made, BatchNorm2d(3, track_running_stats=track)):
                    generator, module.momentum = torch.Generator().manual_seed(0), momentum
                    for tensor in module.double().train(training).state_dict().values():
                        if tensor.is_floating_point():
                            tensor.copy_(noise(tensor.shape, generator).square() + 0.1)
                    out = module(noise((2, 3, 4, 5), generator))
                    results.append({"out": out} | module.state_dict())
                ours, theirs = results
                theirs["out"] = nn.functional.silu(theirs["out"])
                if ours.keys() != theirs.keys() or not all(torch.allclose(ours[n], theirs[n]) for n in ours):
                    return False
        return [*made._modules] == ["drop", "act"]
    except Exception:  # of another version's class
        return False


# What the compiler need not look into.
internals.mark_constant(is_norm_act)
internals.mark_constant(is_sequence)
