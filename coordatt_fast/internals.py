"""What of torch is used that torch does not document: all of it, so that a new torch breaks this file first.

Beside it, plan.py and wiring.py read nn.Module's instance dictionary ("_modules", "_parameters", "_buffers",
the hooks): every nn.Module that was ever pickled has these names.
"""

import sys
from collections.abc import Callable

import torch
from torch.autograd import Function, forward_ad
from torch.nn.modules import module as _module

is_compiling = torch.compiler.is_compiling
in_functorch = torch._C._are_functorch_transforms_active
tracing_state = torch._C._get_tracing_state
BelowAutograd = torch._C._AutoDispatchBelowAutograd
WithoutSubclasses = torch._C.DisableTorchFunctionSubclass
DelayedError = torch._C._functions.DelayedError

# Hooks on all modules: empty, where there are none.
global_forward_hooks = _module._global_forward_hooks
global_forward_pre_hooks = _module._global_forward_pre_hooks
global_backward_hooks = _module._global_backward_hooks
global_backward_pre_hooks = _module._global_backward_pre_hooks


def not_ordinary() -> str | None:
    """Why a call is more than a call on tensors; None where it is no more."""
    if in_functorch():
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode AD"
    # The flag, as torch.compiler.is_exporting() is true in every compiled call of torch 2.11.
    if torch.compiler._is_exporting_flag or (tracing_state() is not None and not is_compiling()):
        return "the call is exported or traced"
    return None


def in_transform() -> bool:
    """Whether torch.func or forward-mode AD is at work."""
    return in_functorch() or forward_ad._current_level >= 0


def shares_memory(t: torch.Tensor) -> bool:
    """Whether elements of t lie in the same place."""
    return torch._debug_has_internal_overlap(t) == 1


def mark_constant(function: Callable) -> None:
    """What torch.compiler.assume_constant_result does, without importing the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def apply_of(function: type[Function]) -> Callable:
    """Function.apply without its look for functorch's wrappers, which costs 5 us: plan.py sends those to the
    reference."""
    return super(Function, function).apply  # type: ignore[misc]


def argument_names(op) -> list[str]:
    """Of an operator of torch.ops."""
    return [argument.name for argument in op._schema.arguments]


def take_any_layout(op) -> None:
    """Lets the compiler hand an operator of torch.ops its tensors as they lie. Without this tag, which the
    stable ABI cannot give, it converts them to eager code's strides before the operator and back after."""
    tag = getattr(torch.Tag, "flexible_layout", None)
    if tag is not None and tag not in op.tags:
        op._tags = [*op.tags, tag]


def take_grad_as_x(op) -> None:
    """Has inductor write op's first argument, grad, in the layout of its second, x [N, C, H, W]: the operator
    copies what lies otherwise. Called as op is traced, when inductor has been imported if it is at work."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or op in lowering.lowerings:
        return
    from torch._inductor import ir

    fallback = lowering.fallback_handler(op)

    def lower(grad, x, *args, **kwargs):
        x = ir.ExternKernel.realize_input(x)
        if ir.is_storage_and_layout(x):
            ir.as_storage_and_layout(x, freeze=True)
        channels_last = x.get_size()[1] != 1 and x.get_stride()[1] == 1
        order = ir.NHWC_STRIDE_ORDER if channels_last else [3, 2, 1, 0]
        return fallback(ir.ExternKernel.require_stride_order(grad, order), x, *args, **kwargs)

    lowering.register_lowering(op, type_promotion_kind=None)(lower)
