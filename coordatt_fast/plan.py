"""Which tier and backend a call takes, and why."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Identity,
    Module,
    Parameter,
    SyncBatchNorm,
)
from torch.nn.utils import parametrize

from coordatt_fast import checks, internals, ops
from coordatt_fast.backends import AUTO, SERVED_BY_CPU, choice, serving
from coordatt_fast.codes import NORM_BATCH, NORM_GIVEN, NORM_NONE
from coordatt_fast.internals import global_backward_hooks as _backward_hooks
from coordatt_fast.internals import global_backward_pre_hooks as _backward_pre_hooks
from coordatt_fast.internals import global_forward_hooks as _hooks
from coordatt_fast.internals import global_forward_pre_hooks as _pre_hooks
from coordatt_fast.reference import ACTIVATIONS

FUSED, HYBRID, REFERENCE, ORIGINAL = "fused", "hybrid", "reference", "original"

BATCH_NORMS = (BatchNorm2d, SyncBatchNorm)
CHILDREN = ("pool_h", "pool_w", "conv1", "bn1", "act", "conv_h", "conv_w")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)
PLAIN = frozenset((Tensor, Parameter))
_PLAIN_OR_NONE = PLAIN | {type(None)}

is_compiling = internals.is_compiling
_not_ordinary = internals.not_ordinary
_is_autocast_enabled = torch.is_autocast_enabled
_float32 = torch.float32


class Detour(NamedTuple):
    """The tier of a call that is not fused, and why."""

    tier: str
    reason: str


def _settings(module: Module) -> dict:
    d = module.__dict__
    return {name: d[name] for name in d if not name.startswith("_") and name not in ("training", "inplace")}


# One of each by name, to compare with and to stand in for what is no child; never called.
MADE = {name: activation.make() for name, activation in ACTIVATIONS.items()}
# Of those whose class is one function; the others are for activation_code to tell.
_CODES = {type(made): code for code, made in enumerate(MADE.values()) if not _settings(made)}


def activation_code(child: Module) -> int | None:
    """The operators' code for this child; None where no kernel computes it."""
    code: int | None = _CODES.get(type(child))
    if code is not None:
        return code
    for code, made in enumerate(MADE.values()):
        if type(child) is type(made) and _settings(child) == _settings(made):
            return code
    return None


def obstacle(x) -> str | None:
    """Why no compiled operator can take a call on x, whatever else is in it; None when they can.

    Raises what plain PyTorch does for an x that is no feature map, and RuntimeError when a backend was chosen
    by name and cannot serve the call.
    """
    why: str | None
    if type(x) not in PLAIN:
        checks.not_a_map(x)
        why = f"x is a {type(x).__name__}, not a plain tensor"
    elif (why := _not_ordinary()) is None:
        shape = x.shape
        if len(shape) != 4 or shape[2] == 0 or shape[3] == 0:
            checks.map_size(x)
        if x.dtype is not _float32 and x.dtype not in _DTYPES:
            raise NotImplementedError(f"x is {x.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
        name = choice.name
        if x.is_cpu and name in SERVED_BY_CPU:
            return None
        device = x.device
        served, why = serving(name, device.type, device.index, ops.is_long(x))
        if served is not None:
            return None
    if choice.name not in (AUTO, "reference"):
        raise RuntimeError(f"backend {choice.name!r} was chosen but cannot run this call: {why}")
    return why


def dtype_obstacle(x: Tensor, tensors: tuple, names: tuple) -> str | None:
    """Why the fused tier leaves this mix of dtypes to the children; None when it does not.

    tensors are in the order of checks.MODULE_NAMES. Raises RuntimeError where plain PyTorch does: a
    convolution in another dtype than x, outside autocast.
    """
    dtype, kind = x.dtype, x.device.type
    convolutions = {tensor.dtype for tensor in (*tensors[:2], *tensors[6:]) if tensor is not None}
    norms = {tensor.dtype for tensor in tensors[2:6] if tensor is not None}
    if not _is_autocast_enabled(kind):
        if convolutions != {dtype}:
            checks.parameters(x, tensors, names, autocast=False)
            return "a bias is in another dtype than its weight"
    elif dtype in (_float32, torch.float64):
        if convolutions != {dtype}:
            return f"x is {dtype} and a convolution is not, under autocast"
    elif dtype != torch.get_autocast_dtype(kind):
        return f"x is {dtype}, autocast computes in {torch.get_autocast_dtype(kind)}"
    elif not convolutions <= {dtype, _float32}:
        return f"x is {dtype} and a convolution is in neither that nor float32"
    if len(norms) > 1 or not norms <= {dtype, ops.accumulate_dtype(dtype)}:
        return f"x is {dtype} and bn1 is in another dtype"
    return None


def functional_obstacle(x, tensors: tuple) -> str | None:
    """Why a call of coord_att goes to the reference; None when it is fused. Raises as obstacle does.

    tensors are in the order of checks.FUNCTIONAL_NAMES.
    """
    if why := obstacle(x):
        return why
    for tensor in tensors:
        if type(tensor) not in _PLAIN_OR_NONE:
            return "a parameter is not a plain tensor"
    if x.dtype is not _float32 or _is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        return dtype_obstacle(x, tensors, checks.FUNCTIONAL_NAMES)
    return None


def pointwise(d: dict) -> bool:
    return (
        d["kernel_size"] == (1, 1) and d["stride"] == (1, 1) and d["padding"] == (0, 0) and d["groups"] == 1
    )


def _computes(conv: Module) -> bool:
    """Whether it runs nn.Conv2d's forward: it is one, or one whose weight or bias is parametrized."""
    kind = type(conv)
    if kind is Conv2d:
        return True
    computed = parametrize.is_parametrized(conv)
    return computed and kind.__bases__ == (Conv2d,) and kind.forward is Conv2d.forward


def _process_group(sync: dict):
    """The processes over which a SyncBatchNorm in training takes its statistics; None where it is as a
    BatchNorm2d.

    sync: its instance dictionary.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = sync["process_group"] or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def observed(child: Module | None) -> bool:
    """Whether a call of the child does more than its class says."""
    if child is None or _hooks or _pre_hooks or _backward_hooks or _backward_pre_hooks:
        return True
    # As attributes: the compiler then sets no guards on hooks where there are none, and one on forward.
    hooks = (
        child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
    )
    return bool(hooks or child.forward is None or "forward" in child.__dict__)


def special_pools(children: dict) -> bool:
    """Whether the pool children have to be called: someone listens to them, or they are not the usual
    means."""
    return any(
        observed(child) or type(child) is not AdaptiveAvgPool2d or child.output_size != size
        for child, size in (
            (children.get("pool_h"), (None, 1)),
            (children.get("pool_w"), (1, None)),
        )
    )


def check_plain(children: dict, x: Tensor) -> None:
    """Raises as checks.parameters does, where no child can have a say in shapes and dtypes."""
    found: list[Any] = [children.get(name) for name in CHILDREN]
    _, _, conv1, bn1, act, conv_h, conv_w = found
    if not is_eager(x) or any(map(observed, found)) or activation_code(act) is None:
        return
    if not all(type(conv) is Conv2d and pointwise(conv.__dict__) for conv in (conv1, conv_h, conv_w)):
        return
    bn = (None,) * 4 if type(bn1) is Identity else None
    if type(bn1) in BATCH_NORMS:
        bn = bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var
    if bn is not None:
        gates = conv_h.weight, conv_h.bias, conv_w.weight, conv_w.bias
        tensors = (conv1.weight, conv1.bias, *bn, *gates)
        checks.parameters(x, tensors, checks.MODULE_NAMES, autocast(x), broadcast=True)
        if type(bn1) in BATCH_NORMS:
            checks.epsilon(bn1.eps, bn1.training or bn1.running_mean is None)


def is_eager(x) -> bool:
    """Whether x is an ordinary tensor in an ordinary call, so that its sizes may be looked at."""
    return type(x) in PLAIN and not is_compiling() and internals.tracing_state() is None


def autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and _is_autocast_enabled(kind)


def laid_out(child: Module, y: Tensor, fast: bool) -> Tensor:
    """y [N, M, L, 1] in the memory format that child computes best in, where the tier is hybrid (fast).

    Plain convolutions take channels dense. All else takes contiguous tensors, since PyTorch sums the
    statistics of channels_last ones less exactly, and in float16 within its range; so do convolutions in half
    precision, which let NaN into other pixels of channels_last ones, and those that somebody listens to.
    """
    if not fast or type(y) not in PLAIN or y.dim() != 4:
        return y
    dense = type(child) is Conv2d and not (y.dtype in _HALF or autocast(y) or observed(child))
    # Its gradient comes back contiguous: to a channels_last one InstanceNorm2d gives a wrong bias gradient.
    # And one channel is contiguous whatever its stride, while some strides read as channels_last.
    if y.is_contiguous() and (y.requires_grad if dense else y.shape[1] == 1):
        y = y.flatten().view(y.shape)
    return y.contiguous(memory_format=torch.channels_last if dense else torch.contiguous_format)


def gate_fits(x: Tensor, s_h: Tensor, s_w: Tensor) -> bool:
    """Whether ops.gate returns what x * sigmoid(s_w) * sigmoid(s_h) does: no other broadcasting, no
    promotion."""
    n, c, h, w = x.shape
    kinds = {torch.promote_types(x.dtype, s.dtype) for s in (s_h, s_w)}
    plain = type(s_h) in PLAIN and type(s_w) in PLAIN
    return plain and kinds == {x.dtype} and s_h.shape == (n, c, h, 1) and s_w.shape == (n, c, 1, w)


def _why_called(child: Module, children: dict) -> str:
    """Why an observed child has to be called."""
    name = next(name for name in CHILDREN if children[name] is child)
    if "forward" in child.__dict__:
        return f"{name} has a forward of its own"
    for tensor in ("weight", "bias"):
        # weight_norm, spectral_norm and pruning keep what they compute as a plain attribute.
        if tensor in child.__dict__:
            return f"{name}.{tensor} is computed before each call, by a hook (weight_norm, pruning)"
    return f"{name} has hooks"


def _why_foreign(names: Iterable[str], cls: type, children: dict) -> str:
    """Which of these children is of another class than the kernels' own."""
    name, kind = next((name, type(children[name])) for name in names if type(children[name]) is not cls)
    return f"{name} is a {kind.__module__}.{kind.__qualname__}, not a plain nn.{cls.__name__}"


def _why_missing(missing: KeyError, children: dict) -> str:
    for child in children.values():
        if getattr(child, "_is_replica", False):
            return "it is a replica of nn.DataParallel, whose parameters are plain attributes"
    return f"no child, parameter or setting of the name {missing}"


def arguments(settings: dict, x) -> tuple | Detour:
    """What ops.attention takes after x when this call is fused; else which tier it takes, and why.

    settings: a CoordAtt's instance dictionary, or what wiring.py puts in its place ("_modules" by CoordAtt's
    names, "skip", and "_inplace" where it is so). Every call passes here. It reads instance dictionaries:
    nn.Module.__getattr__ would cost more than the operator.
    """
    why = obstacle(x)
    if why is not None:
        return Detour(REFERENCE, why)
    if _hooks or _pre_hooks or _backward_hooks or _backward_pre_hooks:
        return Detour(HYBRID, "there are global module hooks")
    children = settings["_modules"]
    try:
        pool_h, pool_w, conv1 = children["pool_h"], children["pool_w"], children["conv1"]
        bn1, act, conv_h, conv_w = children["bn1"], children["act"], children["conv_h"], children["conv_w"]
        compiling = is_compiling()
        for child in (pool_h, pool_w, conv1, bn1, act, conv_h, conv_w):
            d = child.__dict__
            if (
                observed(child)
                if compiling
                else d["_forward_hooks"]
                or d["_forward_pre_hooks"]
                or d["_backward_hooks"]
                or d["_backward_pre_hooks"]
                or "forward" in d
            ):
                return Detour(HYBRID, _why_called(child, children))
        if type(pool_h) is not AdaptiveAvgPool2d or type(pool_w) is not AdaptiveAvgPool2d:
            return Detour(HYBRID, _why_foreign(("pool_h", "pool_w"), AdaptiveAvgPool2d, children))
        if pool_h.__dict__["output_size"] != (None, 1) or pool_w.__dict__["output_size"] != (1, None):
            return Detour(HYBRID, "pool_h or pool_w pools to another size")

        convolutions = conv1, conv_h, conv_w
        stored = type(conv1) is Conv2d and type(conv_h) is Conv2d and type(conv_w) is Conv2d
        if not stored:
            if foreign := [n for n in ("conv1", "conv_h", "conv_w") if not _computes(children[n])]:
                return Detour(HYBRID, _why_foreign(foreign, Conv2d, children))
            if x.dtype in _HALF or autocast(x):
                return Detour(HYBRID, "a weight is parametrized, in half precision")
        conv1, conv_h, conv_w = conv1.__dict__, conv_h.__dict__, conv_w.__dict__
        if not (pointwise(conv1) and pointwise(conv_h) and pointwise(conv_w)):
            return Detour(HYBRID, "conv1, conv_h or conv_w is not a 1x1 convolution")
        if not conv1["in_channels"] == conv_h["out_channels"] == conv_w["out_channels"]:
            return Detour(HYBRID, "input and output have different numbers of channels")
        if stored:
            parameters = conv1["_parameters"]
            w1, b1 = parameters["weight"], parameters["bias"]
            parameters = conv_h["_parameters"]
            wh, bh = parameters["weight"], parameters["bias"]
            parameters = conv_w["_parameters"]
            ww, bw = parameters["weight"], parameters["bias"]

        group = None
        if type(bn1) in BATCH_NORMS:
            d = bn1.__dict__
            parameters, buffers = d["_parameters"], d["_buffers"]
            gamma, beta = parameters["weight"], parameters["bias"]
            mean, var, tracked = (
                buffers["running_mean"],
                buffers["running_var"],
                buffers["num_batches_tracked"],
            )
            eps, momentum, training = d["eps"], d["momentum"], d["training"]
            norm = NORM_BATCH if training or mean is None else NORM_GIVEN
            update = training and d["track_running_stats"]
            if training and type(bn1) is SyncBatchNorm and (group := _process_group(d)) is not None:
                if not ops.operators(x).row.joined:
                    return Detour(HYBRID, "bn1 is a SyncBatchNorm over processes: no kernels but the cpu's")
        elif type(bn1) is Identity:
            gamma = beta = mean = var = tracked = momentum = None
            eps, norm, update = 0.0, NORM_NONE, False
        else:
            return Detour(HYBRID, f"bn1 is a {type(bn1).__name__}")
        activation = activation_code(act)
        if activation is None:
            return Detour(HYBRID, f"no kernel for the activation {type(act).__name__}")
    except KeyError as missing:
        return Detour(HYBRID, _why_missing(missing, children))
    if not stored:  # last, once a call and in the children's order: some count, or draw random numbers
        (w1, b1), (wh, bh), (ww, bw) = [(conv.weight, conv.bias) for conv in convolutions]
    if not (
        type(w1) in PLAIN
        and type(wh) in PLAIN
        and type(ww) in PLAIN
        and type(b1) in _PLAIN_OR_NONE
        and type(bh) in _PLAIN_OR_NONE
        and type(bw) in _PLAIN_OR_NONE
        and type(gamma) in _PLAIN_OR_NONE
        and type(beta) in _PLAIN_OR_NONE
        and type(mean) in _PLAIN_OR_NONE
        and type(mean) is type(var)
    ):
        return Detour(HYBRID, "a parameter is not a plain tensor")
    if x.dtype is not _float32 or _is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        tensors = (w1, b1, gamma, beta, mean, var, wh, bh, ww, bw)
        if why := dtype_obstacle(x, tensors, checks.MODULE_NAMES):
            return Detour(HYBRID, why)
    weights = (w1, b1, gamma, beta, mean, var, eps, wh, bh, ww, bw)
    out = x if settings.get("_inplace") else None
    return weights, norm, activation, settings["skip"], tracked, momentum, update, group, out
