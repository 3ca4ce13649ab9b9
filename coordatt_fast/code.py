"""Reads the code of a forward: what it may depend on beside its input, and what has to stay as it is.

A numeric probe sees a few inputs only. What a forward does with all others is known where its code says no
more than Coordinate Attention needs: calls of its own parts and of tensor functions that treat all sizes,
layouts and dtypes alike. Every other word is a reason to leave the module alone. Bytecode is read, so that no
source is needed.
"""

import builtins
import dis
import functools
import hashlib
import sys
import types
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Different(Exception):
    """The module computes something else, or that cannot be told; the message says why."""


# What tensors may be asked for and put through: the same for every size, layout and dtype, with no threshold
# but those of the activations. blind.py looks at the arguments.
_FREE = (
    "cat concat concatenate split split_with_sizes tensor_split narrow mean sum permute transpose "
    "swapaxes swapdims movedim unsqueeze squeeze reshape view view_as contiguous clone expand expand_as "
    "broadcast_to is_tensor adaptive_avg_pool2d avg_pool2d mul multiply add sub subtract div divide "
    "true_divide clamp clip sigmoid relu relu6 hardswish hardsigmoid hardtanh silu gelu mish tanh elu "
    "leaky_relu softplus"
).split()
WORDS = frozenset(_FREE) | {f"{word}_" for word in _FREE if hasattr(torch.Tensor, f"{word}_")} | {
    "shape", "size", "dim", "ndim", "mT", "__getitem__",
    *(f"__{kind}{name}__" for name in ("add", "sub", "mul", "truediv") for kind in ("", "r", "i")),
}  # fmt: skip
FUNCTIONS = frozenset(
    function
    for word in WORDS
    for space in (torch, F, torch.Tensor, torch.special)
    if callable(function := getattr(space, word, None))
)

_BUILTINS = frozenset(
    getattr(builtins, name)
    for name in "super len tuple list zip enumerate reversed sum getattr hasattr".split()
)
_SPACES = (torch, nn, F)
_PLAIN = (bool, int, float, complex, str, type(None))
# Handlers of exceptions make an error a branch, patterns ask for attributes, generators keep where they are.
_ODD = frozenset(
    "SETUP_FINALLY SETUP_WITH PUSH_EXC_INFO MATCH_CLASS MATCH_KEYS MATCH_MAPPING YIELD_VALUE".split()
)
_TRANSPARENT = frozenset(
    "CACHE EXTENDED_ARG RESUME NOP PUSH_NULL PRECALL COPY_FREE_VARS MAKE_CELL NOT_TAKEN".split()
)
# What containers and iterators are changed by.
_KEEPERS = frozenset(
    "append appendleft extend insert pop popitem popleft remove discard clear update setdefault send".split()
)
# What tells how a tensor lies in memory, which the hybrid tier decides by itself.
_LAYOUT = frozenset(
    "is_contiguous stride storage_offset as_strided data_ptr untyped_storage storage dim_order".split()
)
# What nn.Module keeps in an instance; a forward may ask for its own training alone.
_STATE = frozenset(nn.Module().__dict__)
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward", "__getattr__", "__getattribute__")
# Methods of nn.Module that no forward runs by itself.
_ASIDE = frozenset(
    "__init__ __init_subclass__ __repr__ __str__ __new__ __del__ __prepare_scriptable__ extra_repr "
    "reset_parameters state_dict load_state_dict train eval to cuda cpu half float double bfloat16 type "
    "apply _apply zero_grad".split()
)


class Absent:
    """Stands for an attribute that is not there."""


class _Scan(NamedTuple):
    chains: tuple[tuple[str, ...], ...]  # a global or free variable and the attributes taken of it
    first: str | None  # the first argument, where it stays what it is
    of_first: frozenset[str]  # attributes taken of the first argument, self in a method, and of super()
    attributes: frozenset[str]  # ... of anything else
    strings: frozenset[str]  # what getattr and hasattr ask the first argument for
    odd: str  # what else no probe can vouch for: why


class Link(NamedTuple):
    """A name that the code looks up in a class, among a module's globals or in an outer function, and what it
    found there."""

    get: object  # of the names
    name: str
    value: object
    where: str


class _Cell:
    """A variable of an outer function, looked up as in a dict."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def get(self, name: str, default):
        try:
            return self.cell.cell_contents
        except ValueError:
            return default


class Code:
    """The code that runs for a class's forward, or for a function or a method.

    root: the class or function. own: names looked up in self. words: attributes of anything else.
    strings: what getattr and hasattr may be given. strange: words that a numeric probe cannot vouch for.
    links: what it looks up elsewhere. fingerprint: of all functions read, for copies in files.
    """

    def __init__(self, root, method: bool = False) -> None:
        self.root, self.method = root, method
        self.own: set[str] = set()
        self.words: set[str] = set()
        self.strings: set[str] = set()
        self.strange: list[str] = []
        self.links: list[Link] = []
        self.stale = ""
        self.functions: dict[types.FunctionType, tuple] = {}
        self._followed: set[str] = set()
        if isinstance(root, type):
            self._class(root)
        else:
            self._function(root, None, method)
        parts = sorted(repr(_described(code)) for code, *_ in self.functions.values())
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        self.fingerprint = f"{sys.version_info[0]}.{sys.version_info[1]} {digest}"

    def changed(self) -> str | None:
        """What is not as it was read; None when all of it is."""
        if self.stale:
            return self.stale
        for get, name, value, where in self.links:
            if get(name, Absent) is not value:
                return f"{name} has changed in {where}"
        for function, (code, defaults, by_keyword) in self.functions.items():
            if (
                function.__code__ is not code
                or function.__defaults__ is not defaults
                or function.__kwdefaults__ != by_keyword
            ):
                return f"the code of {function.__name__} has changed"
        return None

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return _loaded, (self.root, self.method, self.fingerprint)

    def _class(self, kind: type) -> None:
        for name in _CALLS:
            if getattr(kind, name, None) is not getattr(nn.Module, name, None):
                raise Different(f"{kind.__name__} overrides {name}")
        bases = [k for k in kind.__mro__ if is_of_torch(k) and k is not nn.Module]
        names = {"forward"}
        for k in _own_classes(kind):
            for name, value in vars(k).items():
                if not isinstance(value, types.FunctionType) or name in _ASIDE:
                    continue
                if _is_dunder(name):
                    raise Different(f"{kind.__name__} overrides {name}")
                if any(name in vars(base) for base in bases):
                    names.add(name)  # what a class of torch's may call in its own forward
        self.own |= names
        self._follow(names, kind)

    def _follow(self, names: set[str], kind: type | None) -> None:
        """What names mean in kind's classes, up to those of torch."""
        places = _own_classes(kind) if kind else []
        for name in names - self._followed:
            self._followed.add(name)
            if any(name in vars(k) for k in places):
                for k in places:  # all of them: super() reaches the later ones, a new one hides them
                    value = vars(k).get(name, Absent)
                    self.links.append(Link(vars(k).get, name, value, k.__name__))
                    if value is not Absent:
                        self._value(name, value, kind, method=True)

    def _value(self, name: str, value, kind: type | None, method: bool = False) -> None:
        """A global, a free variable, or an attribute of the class."""
        if isinstance(value, (staticmethod, classmethod)):
            value, method = value.__func__, False
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, types.FunctionType) and not is_of_torch(value):
            self._function(value, kind, method)
        elif any(value is space for space in _SPACES) or (callable(value) and is_of_torch(value)):
            if not _known(value):
                self.strange.append(name)
        elif not (
            isinstance(value, _PLAIN)
            or (isinstance(value, type) and kind is not None and value in kind.__mro__)
            or _known(value)
        ):
            self._foreign(name, _article(value))

    def _foreign(self, name: str, kind: str) -> None:
        """Something that no probe can vouch for and no watch sees change."""
        raise Different(f"its forward uses {name}, {kind}")

    def _odd(self, why: str) -> None:
        raise Different(why)

    def _function(self, function, kind: type | None, method: bool) -> None:
        if not isinstance(function, types.FunctionType):
            raise Different(f"{getattr(function, '__name__', function)!s} is no function of Python")
        if function in self.functions:
            return
        by_keyword = function.__kwdefaults__
        self.functions[function] = function.__code__, function.__defaults__, by_keyword and dict(by_keyword)
        for value in (*(function.__defaults__ or ()), *(by_keyword or {}).values()):
            if not isinstance(value, _PLAIN):
                raise Different(f"{function.__name__} has {_article(value)} as a default")
        scan = _scan(function.__code__)
        self.strings |= scan.strings
        if scan.odd:
            self._odd(scan.odd)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
        own = set(scan.of_first if method else ())
        words = set(scan.attributes if method else scan.attributes | scan.of_first)
        for root, *attributes in scan.chains:
            if root == "__class__":
                words.update(attributes)
                continue
            if method and root == scan.first and root not in cells:  # self, as functions inside see it
                own.update(attributes[:1])
                words.update(attributes[1:])
                continue
            if root in cells:
                try:
                    value = cells[root].cell_contents
                except ValueError:
                    raise Different(f"its forward uses {root}, which is not set") from None
                self.links.append(Link(_Cell(cells[root]).get, root, value, function.__qualname__))
            elif root in function.__globals__:
                value = function.__globals__[root]
                if not is_of_torch(value) and not any(value is space for space in _SPACES):
                    where = function.__module__ or "its module"
                    self.links.append(Link(function.__globals__.get, root, value, where))
            elif hasattr(builtins, root):
                value = getattr(builtins, root)
                exception = isinstance(value, type) and issubclass(value, Exception)
                if value not in _BUILTINS and not exception:
                    self._foreign(root, "a built-in function")
                self.links.append(Link(function.__globals__.get, root, Absent, function.__module__ or ""))
                continue
            else:
                words.update(attributes)  # a local variable of the function around
                continue
            while attributes and any(value is space for space in _SPACES):
                root, value = attributes[0], getattr(value, attributes.pop(0), Absent)
            self._value(root, value, kind)
            if isinstance(value, type) and kind is not None and value in kind.__mro__:
                own.update(attributes[:1])  # Base.forward(self, x)
                words.update(attributes[1:])
            elif attributes and value is not torch.Tensor:
                self._foreign(f"{root}.{attributes[0]}", "an attribute that no watch sees change")
            words.update(attributes[1:])
            words.update(attributes[:1] if value is torch.Tensor else ())
        self.own |= own
        self.words |= words
        self._follow(own | words, kind)


class Called(Code):
    """The code of a part of a class of one's own that is called where it stands.

    It may compute what it likes, but keep nothing between calls: the probe's calls would count.
    """

    def __init__(self, root: type) -> None:
        super().__init__(root)
        if kept := sorted((self.own | self.words) & _KEEPERS):
            raise Different(f"its forward uses {kept[0]}, which keeps something between calls")
        if layout := sorted((self.words | self.strings) & _LAYOUT):
            raise Different(f"its forward uses {layout[0]}, and is not promised how its input lies in memory")

    def _foreign(self, name: str, kind: str) -> None:
        pass

    def _odd(self, why: str) -> None:
        pass


def _loaded(root, method: bool, fingerprint: str) -> Code:
    """The code of a copy that was pickled."""
    try:
        code = code_of(root, method)
        if code.fingerprint == fingerprint:
            return code
        why = f"the code of {root.__qualname__} is not what it was when it was accelerated"
    except Different as reason:
        why = str(reason)
    code = object.__new__(Code)
    code.root, code.method, code.fingerprint, code.stale = root, method, fingerprint, why
    return code


_code_of = functools.lru_cache(maxsize=256)(Code)


def code_of(root, method: bool = False) -> Code:
    """The code of a class of modules or of a function (a method: it takes self first), as it is now.

    Raises Different for what no probe may run: it would write, count, or depend on what lies outside.
    """
    code = _code_of(root, method)
    if code.changed():
        _code_of.cache_clear()
        code = _code_of(root, method)
    return code


def is_read(module: nn.Module) -> bool:
    """Whether module's class is somebody's own, so that its code says what it computes."""
    return not is_of_torch(type(module))


def strange_words(module: nn.Module, code: Code) -> list[str]:
    """What code says that Coordinate Attention needs not say, where it is module's."""
    d, kind = module.__dict__, type(module)
    places = (d, d["_parameters"], d["_buffers"], d["_modules"])

    def is_strange(word):
        return word in _STATE or (
            not any(word in place for place in places) and is_of_torch(owner(kind, word))
        )

    # What is asked of anything but self may be nobody's but a tensor's.
    strange = code.words - WORDS - {"forward"}
    # A name that self does not have cannot be run; wiring.py watches that it stays so.
    own = {word for word in code.own if hasattr(module, word)}
    return [*code.strange, *strange, *filter(is_strange, own - WORDS - {"training", "forward"})]


def owner(kind: type, name: str) -> type:
    """The class that has the attribute; Tensor for one that kind does not have."""
    return next((k for k in kind.__mro__ if name in k.__dict__ and k is not object), torch.Tensor)


def is_of_torch(value) -> bool:
    space = getattr(value, "__module__", None)
    return value in FUNCTIONS if space is None else str(space).partition(".")[0] == "torch"


def _known(value) -> bool:
    """Whether a forward may use this of torch: a function that treats all maps alike, or a layer's class."""
    try:
        is_layer = isinstance(value, type) and issubclass(value, nn.Module) and is_of_torch(value)
        return is_layer or value in FUNCTIONS or value is torch.Tensor
    except TypeError:  # unhashable
        return False


def is_data(value) -> bool:
    """Whether an instance's attribute that a forward reads is plain, or a function that is read too."""
    function = isinstance(value, types.FunctionType) and not is_of_torch(value)
    return function or isinstance(value, _PLAIN) or _known(value)


def _own_classes(kind: type) -> list[type]:
    """Of kind and what it inherits from, those that are neither torch's nor Python's."""
    return [k for k in kind.__mro__ if not is_of_torch(k) and k is not object]


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _article(value) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _described(code: types.CodeType) -> tuple:
    constants = [_described(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return code.co_code, code.co_names, code.co_freevars, constants


@functools.lru_cache(maxsize=1024)
def _scan(code: types.CodeType) -> _Scan:
    chains, of_first, attributes, strings = set(), set(), set(), set()
    chain: list[str] = []
    odd = ""
    first = code.co_varnames[0] if code.co_argcount else None
    steps = [step for step in dis.get_instructions(code) if step.opname not in _TRANSPARENT]
    stores = (step for step in steps if step.opname.startswith(("STORE_FAST", "STORE_DEREF")))
    both = "STORE_FAST_LOAD_FAST"  # stores one, then loads another
    if any(first in (_names_of(step)[:1] if step.opname == both else _names_of(step)) for step in stores):
        first = None
    on_first = on_super = False  # what the next attribute is taken of
    calls_super = False  # super is loaded, its call is to come
    for i, step in enumerate(steps):
        op, name = step.opname, step.argval
        if op.startswith("LOAD_") and op.endswith(("_ATTR", "_METHOD")):
            if chain:
                chain.append(name)
            else:
                (of_first if on_first or on_super else attributes).add(name)
            on_first = on_super = calls_super = False
            continue
        loads = op.startswith("LOAD_FAST") or op == both
        on_first = loads and first is not None and _names_of(step)[-1] == first
        on_super = calls_super and op.startswith("CALL")
        calls_super = calls_super and not on_super
        if chain:
            chains.add(tuple(chain))
            chain = []
        if op in ("LOAD_GLOBAL", "LOAD_NAME") or (op.startswith("LOAD_") and op.endswith("DEREF")):
            chain = [name]
            calls_super = calls_super or name == "super"
            if name in ("getattr", "hasattr"):
                asked = _asked(steps[i + 1 : i + 3], first)
                strings.add(asked) if asked else None
                odd = odd or ("" if asked else f"its forward uses {name} of something other than self")
        elif op in ("STORE_ATTR", "DELETE_ATTR"):
            raise Different(f"its forward sets attributes ({name})")
        elif op in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"):
            raise Different("its forward writes into items")
        elif op.endswith("E_GLOBAL") or (op.endswith("_DEREF") and name in code.co_freevars):
            raise Different(f"its forward sets the variable {name} outside itself")
        elif op == "IMPORT_NAME":
            raise Different(f"its forward imports {name}")
        elif op in _ODD:
            odd = odd or "its forward handles exceptions, matches patterns or yields"
    if chain:
        chains.add(tuple(chain))
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found = _scan(inner)
            chains |= set(found.chains)
            attributes |= found.attributes | found.of_first
            strings |= found.strings
            odd = odd or found.odd
    found = map(frozenset, (of_first, attributes, strings))
    return _Scan(tuple(sorted(chains)), first, *found, odd)


def _asked(steps: list, first: str | None) -> str | None:
    """The name that getattr or hasattr is given for the first argument; None for anything else."""
    if len(steps) < 2 or first is None:
        return None
    of_first = steps[0].opname.startswith("LOAD_FAST") and _names_of(steps[0]) == (first,)
    name = steps[1].argval if steps[1].opname == "LOAD_CONST" else None
    return name if of_first and isinstance(name, str) else None


def _names_of(step: dis.Instruction) -> tuple:
    """The local variables of an instruction; some have two."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)
