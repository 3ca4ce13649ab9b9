"""The layer that Hugging Face's kernels maps onto the CoordAtt of any model: docs/kernels.md."""

import logging

import torch
from torch import Tensor, nn

from coordatt_fast import ops, plan, reference
from coordatt_fast.plan import Detour
from coordatt_fast.twin import laboratory, noise
from coordatt_fast.wiring import OWN, Wiring

log = logging.getLogger(__name__)

# How the authors' class runs by its children.
_WIRING = Wiring(
    conv1=("conv1",),
    bn1=("bn1",),
    act=("act",),
    conv_h=("conv_h",),
    conv_w=("conv_w",),
    chain=(("conv1",), ("bn1",), ("act",)),
    tail=None,
    activation=None,
    act_type=None,
)
# What an activation of a class of the user's own may be made of; and what frameworks set on every module.
_PARTS = frozenset((*map(type, plan.MADE.values()), nn.Sigmoid, nn.Hardsigmoid))
_USUAL = OWN | {"_is_hf_initialized", "inplace"}


class CoordAtt(nn.Module):
    """Coordinate Attention by the children of the module whose forward this one replaces.

    Without state, constructor or methods of its own, as kernels asks of a layer: self is a module of the
    user's class, with the children of the authors' (pool_h, pool_w, conv1, bn1, act, conv_h, conv_w), which
    are read at every call. Calls run fused or hybrid as those of coordatt_fast.CoordAtt do. Where that one
    would take the reference tier, the module's own forward runs; so it does where the module cannot be what
    its name says: other children, parameters or buffers beside them, pools with hooks or of another kind, a
    true attribute skip, a forward that overrides the one of the class that was given the kernel's name. A
    warning is logged for such a class. What else its own forward does is not looked at.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        found, children = arguments(self, x)
        if type(found) is tuple:
            try:
                return ops.attention(x, *found)
            except RuntimeError:
                plan.check_plain(children, x)
                raise
        if found.tier == plan.HYBRID:
            plan.check_plain(children, x)
            return _WIRING.by_children(self, x, fast=True)
        if type(self).forward is CoordAtt.forward:
            raise TypeError("this layer has no parameters: kernelize maps it onto a module that has")
        return type(self).forward(self, x)


def arguments(module: nn.Module, x) -> tuple[tuple | Detour, dict]:
    """As plan.arguments, for a module of any class; also tells when it has to run its own forward. Beside it
    the children, with torch's own activation in place of a class that computes the same."""
    children = module._modules
    if why := _stranger(module):
        if not torch.compiler.is_compiling():
            _warn(type(module), why)
        return Detour(plan.ORIGINAL, why), children
    act = children["act"]
    if plan.activation_code(act) is None:
        if why := plan.obstacle(x):
            return Detour(plan.REFERENCE, why), children
        if (kinds := _kinds(act)) and (name := _activation(kinds)):
            children = {**children, "act": plan.MADE[name]}
    found = plan.arguments({"_modules": children, "skip": False}, x)
    if type(found) is not tuple and found.tier == plan.HYBRID and plan.special_pools(children):
        found = Detour(plan.ORIGINAL, found.reason)
    return found, children


def _stranger(module: nn.Module) -> str | None:
    """Why the module cannot be the authors' CoordAtt; None where nothing speaks against it."""
    d = module.__dict__
    children = d["_modules"]
    for name in plan.CHILDREN:
        if children.get(name) is None:
            return f"it has no child {name}"
    if len(children) != len(plan.CHILDREN):
        return f"it has other children: {', '.join(set(children) - set(plan.CHILDREN))}"
    if d["_parameters"] or d["_buffers"]:
        return "it has parameters or buffers beside its children's"
    if d.get("skip") or d.get("_inplace"):
        return "it adds x, or writes into it"
    if _overrides(type(module)):
        return "its forward is not the one of the class that kernels was told of"
    return None


def _overrides(kind: type) -> bool:
    """Whether the class has the kernel's name from a base, and a forward of its own."""
    named = next((base for base in kind.__mro__ if "kernel_layer_name" in base.__dict__), kind)
    return kind.forward is not named.forward


# What torch.compiler.assume_constant_result does, without importing the compiler.
_overrides._dynamo_marked_constant = True


_warned: set[type] = set()


def _warn(kind: type, why: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        name = f"{kind.__module__}.{kind.__qualname__}"
        log.warning("%s is not the CoordAtt that this kernel is for and runs its own forward: %s", name, why)


def _kinds(act: nn.Module) -> tuple | None:
    """The classes that an activation of the user's own is made of; None where these do not say all of it."""
    if plan.observed(act):
        return None
    if type(act) in _PARTS:
        return (type(act),)
    d = act.__dict__
    if d["_parameters"] or d["_buffers"]:
        return None
    for name in d:
        if name not in _USUAL:
            return None
    inner = []
    for child in d["_modules"].values():
        if child is None or (kinds := _kinds(child)) is None:
            return None
        inner.append(kinds)
    return (type(act), *inner)


_known: dict[tuple, str | None] = {}


def _activation(kinds: tuple) -> str | None:
    """Which activation these classes compute, by value and derivative; None for another."""
    if kinds not in _known:
        try:
            _known[kinds] = _examined(kinds)
        except Exception:  # of the user's code
            _known[kinds] = None
    return _known[kinds]


_activation._dynamo_marked_constant = True


def _examined(kinds: tuple) -> str | None:
    act = kinds[0]()
    if _kinds(act) != kinds:
        return None
    with laboratory():
        x = 4 * noise((2, 3, 500, 1), torch.Generator().manual_seed(0))

        def results(function):
            given = x.clone().requires_grad_()
            out = function(given)
            return out, *torch.autograd.grad(out.sum(), given)

        for name, activation in reference.ACTIVATIONS.items():
            wanted = results(activation.function)
            if all(
                have.shape == want.shape and torch.allclose(have, want, rtol=0, atol=1e-12)
                for training in (False, True)
                for have, want in zip(results(act.train(training)), wanted)
            ):
                return name
    return None
