"""Finds the normalisations and activations that stand right before a block."""

import inspect
from typing import NamedTuple

from torch import nn

from coordatt_fast import plan
from coordatt_fast.code import Different, is_read
from coordatt_fast.containers import Steps, steps_of
from coordatt_fast.module import CoordAtt
from coordatt_fast.neighbours import BLOCK, activation_code, is_norm_act, is_sequence


class Neighbours(NamedTuple):
    """What a block takes in.

    path, cls: of the block; norm: the path of the BatchNorm2d before it; activation: the class of what is
    between them, "" for nothing.
    """

    path: str
    cls: str
    norm: str
    activation: str


Found = tuple[Steps, list[tuple[nn.Module, Steps]], list[Neighbours]]
Parts = list[tuple[str, nn.Module | None]]


def neighbours_in(module: nn.Module, path: str) -> Found | None:
    """How to run module so that blocks in it take in what stands before them: its steps, those of children
    that are chains themselves, and what is taken in. None where nothing is; Different where that cannot be
    told."""
    if not any(map(_holds_block, module._modules.values())):
        return None
    if is_sequence(type(module)):
        steps, rows = Steps(), [list(module._modules)]
    else:
        if list(inspect.signature(type(module).forward).parameters)[1:] != ["x"]:
            raise Different("its forward takes another input than x")  # which compilers name theirs by
        steps = steps_of(module)
        rows = [list(step.names) for step in steps.steps or () if step.names]
    chains: list[tuple[nn.Module, Steps]] = []
    found = []
    for row in rows:
        parts = _flat([(f"{path}.{name}" if path else name, module._modules[name]) for name in row])
        for i, (name, block) in enumerate(parts):
            if not _is_block(block):
                continue
            before, chain = parts[:i], _chain(parts[i - 1]) if i else None
            if chain is not None:
                before = [*before[:-1], *chain[2]]
            taken = _before(before)
            if taken is None or _first(taken[0], path) == _first(name, path):
                continue  # a Sequential inside has both
            if chain is not None:
                chains.append(chain[:2])
            found.append(Neighbours(name, type(block).__name__.removeprefix("Accelerated"), *taken))
    return (steps, chains, list(dict.fromkeys(found))) if found else None


def _first(name: str, path: str) -> str:
    """Which child of the module at path it is in."""
    return name[len(path) + 1 if path else 0 :].partition(".")[0]


def _flat(parts: Parts) -> Parts:
    """The modules and their paths; in place of one that only calls its children, these."""
    flat: Parts = []
    for path, module in parts:
        if module is not None and is_sequence(type(module)):
            flat += _flat([(f"{path}.{name}", child) for name, child in module._modules.items()])
        else:
            flat.append((path, module))
    return flat


def _holds_block(module: nn.Module | None) -> bool:
    if module is None or _is_block(module):
        return module is not None
    return is_sequence(type(module)) and any(map(_holds_block, module._modules.values()))


def _is_block(module: nn.Module | None) -> bool:
    """Whether it runs fused, where nothing else interferes with a call."""
    if type(module) is CoordAtt:
        return not module._inplace and are_known(module._modules)
    kept = getattr(module, "__dict__", {}).get(BLOCK)
    return kept is not None and are_known(kept.wiring.children(module))


def are_known(children: dict) -> bool:
    """Whether the fused kernels compute what these children do, by CoordAtt's names."""
    return (
        all(type(children[name]) is nn.Conv2d for name in ("conv1", "conv_h", "conv_w"))
        and type(children["bn1"]) in (*plan.BATCH_NORMS, nn.Identity)
        and plan.activation_code(children["act"]) is not None
    )


def _chain(part) -> tuple[nn.Module, Steps, Parts] | None:
    """The children of a module of the user's own that calls them one after the other and does no more."""
    path, module = part
    if module is None or not is_read(module) or is_norm_act(type(module)):
        return None
    if hasattr(module, "_coordatt_fast_own"):
        return None
    try:
        steps = steps_of(module)
    except Different:
        return None
    if steps.chain is None:
        return None
    return module, steps, _flat([(f"{path}.{name}", module._modules[name]) for name in steps.chain])


def _before(parts: Parts) -> tuple[str, str] | None:
    """The path of the normalisation that these end with, and the name of the activation after it."""
    activation = ""
    for path, module in reversed(parts):
        kind = type(module)
        if kind is nn.BatchNorm2d:
            return path, activation
        followers = [module]
        if kind.__base__ is nn.BatchNorm2d and is_norm_act(kind):
            followers = [module._modules["act"], module._modules["drop"]]
        for follower in followers:
            if type(follower) is nn.Identity:
                continue
            if activation or activation_code(follower) < 0:
                return None
            activation = type(follower).__name__
        if len(followers) == 2:
            return path, activation
    return None
