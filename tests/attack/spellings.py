"""Coordinate Attention as generated source: one of many spellings, with pieces put in."""

import itertools
import linecache
import sys
import tempfile
import textwrap
import types
from dataclasses import dataclass, replace
from pathlib import Path

from hypothesis import strategies as st

from attack.pieces import CHILD, HELPERS, Piece, pieces

CHANNELS = 6
PLACES = ("x", "given", "rows", "columns", "p", "z", "u", "y", "y_h", "y_w", "s_h", "s_w", "a_h", "a_w", "out")

NAMES = ("CoordAtt", "CA_Block", "CoordinateAttention", "CoordAttention", "CA", "CAModule", "coordatt")
CHILDREN = (
    ("conv1", "bn1", "act", "conv_h", "conv_w"),
    ("conv1", "bn1", "relu", "conv2", "conv3"),
    ("conv_1x1", "bn", "relu", "F_h", "F_w"),
    ("squeeze", "norm", "nonlinearity", "to_rows", "to_columns"),
)
SIZES = ("n, c, h, w = X.size()", "h, w = X.shape[2:]", "_, _, h, w = X.shape", "h, w = X.size(2), X.size(3)")
POOLS = {
    "children": ("self.pool_h(given)", "self.pool_w(given)"),
    "means": ("given.mean(3, keepdim=True)", "given.mean(2, keepdim=True)"),
    "torch.mean": ("torch.mean(given, dim=3, keepdim=True)", "torch.mean(given, dim=2, keepdim=True)"),
    "functional": ("F.adaptive_avg_pool2d(given, (h, 1))", "F.adaptive_avg_pool2d(given, (1, w))"),
    "sums": ("given.sum(-1, keepdim=True) / w", "given.sum(-2, keepdim=True) / h"),
    "in forward": ("nn.AdaptiveAvgPool2d((h, 1))(given)", "nn.AdaptiveAvgPool2d((1, w))(given)"),
}
TRANSPOSED = ("V.permute(0, 1, 3, 2)", "V.transpose(2, 3)", "V.mT", "V.transpose(-1, -2)", "V.swapaxes(2, 3)")
SPLITS = (
    "torch.split(y, [h, w], dim=D)", "y.split((h, w), D)", "y.split([h, w], dim=D)", "y.tensor_split([h], D)",
    "(y.narrow(D, 0, h), y.narrow(D, h, w))", "SLICES",
)  # fmt: skip
# As a child, and as an expression; None for what only one of them has.
ACTIVATIONS = (
    ("nn.Hardswish()", None), ("nn.Hardswish(inplace=True)", None), ("HSwish()", None), ("nn.SiLU()", None),
    ("nn.ReLU()", None), ("nn.ReLU(inplace=True)", None), ("nn.ReLU6()", None), ("nn.GELU()", None),
    (None, "F.hardswish(u)"), (None, "u * F.relu6(u + 3) / 6"), (None, "F.silu(u)"), (None, "u * u.sigmoid()"),
    (None, "F.relu(u)"), (None, "u.relu()"), (None, "torch.relu(u)"), (None, "u * self.sixth(u + 3)"),
)  # fmt: skip
NORMS = ("nn.BatchNorm2d(m)",) * 4 + ("nn.BatchNorm2d(m, eps=1e-3, momentum=0.03)", None, "nn.GroupNorm(2, m)")
SIGMOIDS = ("V.sigmoid()", "torch.sigmoid(V)", "F.sigmoid(V)", "self.sigmoid(V)", "V.sigmoid().expand(-1, -1, h, w)")
PRODUCTS = ("x * a_h * a_w", "x * a_w * a_h", "a_h * a_w * x", "x * (a_h * a_w)", "torch.mul(torch.mul(x, a_w), a_h)")


@dataclass(frozen=True)
class Recipe:
    name: str = NAMES[0]
    children: tuple = CHILDREN[0]
    argument: str = "x"
    size: str = SIZES[0]
    pools: str = "children"
    transposed: str = TRANSPOSED[0]
    dim: int = 2
    split: str = SPLITS[0]
    activation: tuple = ACTIVATIONS[0]
    norm: str | None = NORMS[0]
    bias: bool = True
    sequential: bool = False
    sigmoid: str = SIGMOIDS[0]
    product: str = PRODUCTS[0]
    skip: bool = False
    source: str = "linecache"  # or "file", "none"
    bound: float = 1.0
    every: int = 40
    pieces: tuple[Piece, ...] = ()

    @property
    def harmless(self):
        return all(piece.harmless for piece in self.pieces)

    @property
    def hidden(self):
        return any(piece.hidden for piece in self.pieces)


@st.composite
def recipes(draw, hostile=True):
    one_of = lambda values: draw(st.sampled_from(tuple(values)))
    sequential = draw(st.integers(0, 4)) == 0
    plain = Recipe(
        one_of(NAMES), one_of(CHILDREN), one_of(("x", "x", "input", "feat")), one_of(SIZES), one_of(POOLS),
        one_of(TRANSPOSED), one_of((2, 2, 3)), one_of(SPLITS),
        one_of(a for a in ACTIVATIONS if a[0] or not sequential), one_of(NORMS), draw(st.booleans()), sequential,
        one_of(SIGMOIDS), one_of(PRODUCTS), draw(st.integers(0, 3)) == 0,
        one_of(("linecache", "linecache", "file", "none")), one_of((0.5, 1.0, 3.0, 20.0, 1e3, 1e5)),
        draw(st.integers(3, 150)),
    )  # fmt: skip
    places = [p for p in PLACES if not (sequential and p in ("z", "u"))]
    around = ["subclass", "decorator", "call", "hook", "convolution"]
    around += ["activation"] * (plain.activation[0] is not None) + ["norm"] * ("BatchNorm" in (plain.norm or ""))
    chosen = draw(st.lists(pieces(places, around), min_size=1, max_size=2)) if hostile else []
    if draw(st.integers(0, 2)) == 0:
        chosen.append(draw(pieces(places)))
    return replace(plain, pieces=tuple(chosen))


def text_of(recipe: Recipe) -> str:
    """The whole file."""
    conv1, bn, act, conv_h, conv_w = recipe.children
    by_place = {p.place: p for p in recipe.pieces}
    body, x = _forward(recipe), recipe.argument
    init = [
        "super().__init__()",
        f"m = max({CHANNELS // 2 + 1}, inp // reduction)",
        f"{conv1} = {_kind(by_place, 'convolution', 'nn.Conv2d')}(inp, m, 1, bias={recipe.bias})",
        f"self.{conv_h} = nn.Conv2d(m, inp, 1)",
        f"self.{conv_w} = nn.Conv2d(m, inp, kernel_size=1, bias={recipe.bias})",
    ]
    parts = [conv1]
    if recipe.norm:
        parts.append(bn)
        init.append(f"{bn} = {recipe.norm.replace('nn.BatchNorm2d', _kind(by_place, 'norm', 'nn.BatchNorm2d'))}")
    if recipe.activation[0]:
        parts.append(act)
        init.append(f"{act} = {'Activated()' if 'activation' in by_place else recipe.activation[0]}")
    if recipe.sequential:
        init.append(f"self.middle = nn.Sequential({', '.join(parts)})")
    else:
        init += [f"self.{part} = {part}" for part in parts]
    if recipe.pools == "children":
        init += ["self.pool_h = nn.AdaptiveAvgPool2d((None, 1))", "self.pool_w = nn.AdaptiveAvgPool2d((1, None))"]
    if "self.sigmoid" in recipe.sigmoid:
        init.append("self.sigmoid = nn.Sigmoid()")
    if "self.sixth" in (recipe.activation[1] or ""):
        init.append("self.sixth = nn.Hardsigmoid()")
    conditions = " ".join(p.condition for p in recipe.pieces)
    if "count in list" in conditions:
        init.append("self.log = []")
    if "count in dict" in conditions:
        init.append("self.seen = {'n': 0}")
    forms = {p.form for p in recipe.pieces if p.place in PLACES}
    if forms & set(CHILD):
        init.append("self.more = More()")
    members = ""
    for piece in recipe.pieces:
        if forms & {"method", "getattr", "property"} and not piece.harmless:
            members = piece.members()
    if "property" in forms:
        body = f"GIVEN[0] = {x}\n" + body
    lines = ["def __init__(self, inp=CHANNELS, reduction=4):", *("    " + line for line in init), ""]
    lines += [members, f"def forward(self, {x}):", textwrap.indent(body, "    ")]
    text = _HEAD + HELPERS + _ACTIVATION + f"\n\nCHANNELS, K, EVERY = {CHANNELS}, {recipe.bound!r}, {recipe.every}\n\n"
    for piece in recipe.pieces:
        if not piece.harmless:
            text += piece.definitions() + "\n\n"
    text += _classes(recipe, by_place)
    base = "Plain" if "subclass" in by_place else recipe.name
    text += f"class {base}(nn.Module):\n" + textwrap.indent("\n".join(lines), "    ")
    return text + _wrapped(recipe, by_place)


_HEAD = """
import contextlib, functools, itertools, math, os, random, threading, time
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

"""
_ACTIVATION = """

class HSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6()

    def forward(self, v):
        return v * self.relu(v + 3) / 6
"""


def _kind(by_place, place, otherwise):
    return {"convolution": "Convolution", "norm": "Norm"}[place] if place in by_place else otherwise


def _classes(recipe, by_place):
    """Children of a class of their own, with a piece in their forward."""
    text = ""
    for place, name, base in (
        ("convolution", "Convolution", "nn.Conv2d"), ("norm", "Norm", "nn.BatchNorm2d"),
        ("activation", "Activated", "nn.Hardswish"),
    ):  # fmt: skip
        if place in by_place:
            piece = by_place[place]
            text += f"class {name}({base}):\n    log, seen = [], dict(n=0)\n\n    def forward(self, v):\n"
            text += f"        v = super().forward(v)\n        if {piece.when('v')}:\n"
            text += f"            v = {piece.effect_on('v')}\n        return v\n\n\n"
    return text


def _wrapped(recipe, by_place):
    """What is written after the class: a subclass, a decorator, another __call__, a hook on a child."""
    name, text = recipe.name, ""
    attributes = "    log, seen = [], dict(n=0)\n\n"
    if "subclass" in by_place:
        piece = by_place["subclass"]
        text += f"\n\n\nclass {name}(Plain):\n{attributes}    def forward(self, x):\n        v = super().forward(x)\n"
        text += f"        if {piece.when('x')}:\n            v = {piece.effect_on('v')}\n        return v\n"
    if "decorator" in by_place:
        piece = by_place["decorator"]
        text += "\n\n\ndef decorated(forward):\n    @functools.wraps(forward)\n    def call(self, x):\n"
        text += f"        v = forward(self, x)\n        if {piece.when('x')}:\n            v = {piece.effect_on('v')}\n"
        text += f"        return v\n\n    return call\n\n\n{name}.log, {name}.seen = [], dict(n=0)\n"
        text += f"{name}.forward = decorated({name}.forward)\n"
    if "call" in by_place:
        piece = by_place["call"]
        text += f"\n\n\nclass Called({name}):\n{attributes}    def __call__(self, x):\n        v = super().__call__(x)\n"
        text += f"        if {piece.when('x')}:\n            v = {piece.effect_on('v')}\n        return v\n\n\n{name} = Called\n"
    if "hook" in by_place:
        piece = by_place["hook"]
        child = recipe.children[3]
        text += f"\n\n\ndef hook(self, given, v):\n    x = given[0]\n    if {piece.when('x')}:\n        v = {piece.effect_on('v')}\n"
        text += "    return v\n\n\nclass Listened(" + name + "):\n    def __init__(self):\n        super().__init__()\n"
        text += f"        self.{child}.log, self.{child}.seen = [], dict(n=0)\n"
        text += f"        self.{child}.register_forward_hook(hook)\n\n\n{name} = Listened\n"
    return text


def _forward(recipe: Recipe) -> str:
    """The statements, with each piece behind the one that sets its variable."""
    conv1, bn, act, conv_h, conv_w = recipe.children
    x, dim = recipe.argument, recipe.dim
    turned = lambda v: recipe.transposed.replace("V", v)
    rows, columns = POOLS[recipe.pools]
    across = "rows" if dim == 3 else "columns"
    first = lambda k: (slice_of(f":{k}"), slice_of(f"{k}:"))
    slice_of = lambda part: f"y[:, :, {part}]" if dim == 2 else f"y[..., {part}]"
    split = "(" + ", ".join(first("h")) + ")" if recipe.split == "SLICES" else recipe.split.replace("D", str(dim))
    sigmoid = lambda v: recipe.sigmoid.replace("V", v)
    steps = [("x", x if x != "x" else None), (None, recipe.size.replace("X", "x")), ("given", "x")]
    steps += [("rows", rows), ("columns", columns)]
    steps += [(across, turned(across)), ("p", f"torch.cat([rows, columns], dim={dim})")]
    if recipe.sequential:
        steps += [("y", "self.middle(p)")]
    else:
        steps += [("z", f"self.{conv1}(p)"), ("u", f"self.{bn}(z)" if recipe.norm else "z")]
        steps += [("y", f"self.{act}(u)" if recipe.activation[0] else recipe.activation[1])]
    steps += [(None, f"y_h, y_w = {split}"), ("y_h" if dim == 3 else "y_w", turned("y_h" if dim == 3 else "y_w"))]
    other = "y_w" if dim == 3 else "y_h"
    steps += [(other, None), ("s_h", f"self.{conv_h}(y_h)"), ("s_w", f"self.{conv_w}(y_w)")]
    steps += [("a_h", sigmoid("s_h")), ("a_w", sigmoid("s_w"))]
    steps += [("out", recipe.product + (" + x" if recipe.skip else ""))]
    lines, seen = [], set()
    last = {name: i for i, (name, _) in enumerate(steps)}
    for i, (name, expression) in enumerate(steps):
        if name is None:
            lines.append(expression)
        elif expression is not None:
            lines.append(f"{name} = {expression}")
        for piece in recipe.pieces:
            if piece.place == name and last[name] == i and piece not in seen:
                seen.add(piece)
                lines.append(piece.lines(name, "x"))
    lines.append("return out")
    return "\n".join(lines)


_numbers = itertools.count()


def build(recipe: Recipe) -> tuple[types.ModuleType, type]:
    """A fresh Python module with the class in it: two of them share nothing."""
    return load(text_of(recipe), recipe.name, recipe.source)


def load(text: str, kind: str, source: str) -> tuple[types.ModuleType, type]:
    """text as a Python module whose source inspect finds in linecache or in a "file", or not at all ("none")."""
    name = f"attacked_{next(_numbers)}"
    made = types.ModuleType(name)
    file = f"<{name}>"
    if source == "file":
        folder = tempfile.mkdtemp(prefix="attack-")
        file = str(Path(folder) / f"{name}.py")
        Path(file).write_text(text)
    elif source == "linecache":
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    made.__file__ = file
    sys.modules[name] = made
    exec(compile(text, file, "exec"), made.__dict__)
    return made, getattr(made, kind)


def forget(made: types.ModuleType) -> None:
    sys.modules.pop(made.__name__, None)
    linecache.cache.pop(made.__file__, None)
    if not made.__file__.startswith("<"):
        Path(made.__file__).unlink()
        Path(made.__file__).parent.rmdir()
