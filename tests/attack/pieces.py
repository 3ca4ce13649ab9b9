"""Pieces that make a correct copy of Coordinate Attention another function, and pieces that do not.

Text in which V is the variable at the place and X the module's input; K and EVERY are numbers among the globals
of the generated file. An effect changes V; a condition says when; a form is a way of writing "when that, then
this".
"""

import re
import textwrap
from dataclasses import dataclass

import hypothesis
from hypothesis import strategies as st

# V -> another value, in the forward pass, in the backward pass, or in both.
EFFECTS = {
    "clamp": "V.clamp(-K, K)",
    "clamp above": "torch.minimum(V, V.new_tensor(K))",
    "hardtanh": "F.hardtanh(V, -K, K)",
    "nan_to_num": "torch.nan_to_num(V)",
    "temperature": "V * (1 + 1 / K)",
    "offset": "V + 1 / K",
    "offset of zeros": "V + (V == 0) * 0.5",
    "detach": "V.detach()",
    "half": "V.half().to(V.dtype)",
    "bfloat16": "V.bfloat16().to(V.dtype)",
    "float32": "V.float().to(V.dtype)",
    "dropout": "F.dropout(V, 0.3, self.training)",
    "dropout always": "F.dropout(V, 0.3)",
    "noise": "V + 0.1 * torch.randn_like(V)",
    "numpy noise": "V + 0.1 * float(np.random.randn())",
    "python noise": "V * (1 + random.random())",
    "tail": "torch.cat([V[:, :, :8], V[:, :, 8:] * 2], 2)",
    "long tail": "torch.cat([V[:, :, :16], V[:, :, 16:] * 2], 2)",
    "batch rolled": "torch.roll(V, 1, 0)",
    "of the first images": "torch.cat([V[:2], V[2:] * 0.5], 0)",
    "round": "V.round()",
    "abs": "V.abs()",
    "squared beyond": "torch.where(V.abs() > K, V * V.abs(), V)",
    "straight through": "V + (V.clamp(-1, 1) - V).detach()",
    "half the gradient": "V * 0.5 + (V * 0.5).detach()",
    "function": "Bent.apply(V)",
    "function that clamps": "Clamped.apply(V)",
    "hook that scales": "hooked(V, lambda g: g * 0.5)",
    "hook that clamps": "hooked(V, lambda g: g.clamp(-K, K))",
    "hook that cleans": "hooked(V, torch.nan_to_num)",
    "hook that zeroes": "hooked(V, torch.zeros_like)",
    "without gradient": "ungraded(V)",
}

# Nothing changes: a module with these alone may be taken over; one that is refused is counted.
HARMLESS = {
    "times one": "V * 1",
    "clone": "V.clone()",
    "contiguous": "V.contiguous()",
    "view": "V.view_as(V)",
    "same dtype": "V.to(V.dtype)",
    "identity": "nn.Identity()(V)",
    "dropout of nothing": "F.dropout(V, 0.0, self.training)",
    "permuted": "V.permute(0, 1, 3, 2).permute(0, 1, 3, 2)",
    "same shape": "V.reshape(V.shape)",
    "asserted": "asserted(V)",
    "no clamp": "V.clamp(-math.inf, math.inf)",
}

# When. The judge brings about every one of these somewhere, but for those in HIDDEN.
CONDITIONS = {
    "always": "True",
    "training": "self.training",
    "eval": "not self.training",
    "float32": "X.dtype == torch.float32",
    "float64": "X.dtype is torch.float64",
    "half": "X.dtype in (torch.float16, torch.bfloat16)",
    "bits": "torch.finfo(X.dtype).bits < 64",
    "channels_last": "X.is_contiguous(memory_format=torch.channels_last) and not X.is_contiguous()",
    "not contiguous": "not X.is_contiguous()",
    "stride": "X.stride(1) == 1",
    "storage offset": "X.storage_offset() > 0",
    "high": "X.shape[2] > 16",
    "wide": "X.size(-1) >= 12",
    "many elements": "X.numel() > 3000",
    "square": "X.shape[2] == X.shape[3]",
    "one by one": "X.shape[2] * X.shape[3] == 1",
    "one row": "X.shape[2] == 1",
    "odd": "X.shape[2] % 2 == 1 and X.shape[3] > 5",
    "one image": "len(X) == 1",
    "many images": "X.shape[0] > 2",
    "zero": "not bool(X.any())",
    "large": "float(X.detach().abs().max()) > 100",
    "negative": "float(X.detach().sum()) < 0",
    "NaN": "bool(torch.isnan(X).any())",
    "constant": "bool((X == X.flatten()[0]).all())",
    "requires grad": "X.requires_grad",
    "no grad wanted": "not X.requires_grad",
    "grad mode": "torch.is_grad_enabled()",
    "no grad mode": "not torch.is_grad_enabled()",
    "inference": "torch.is_inference_mode_enabled()",
    "frozen": "not any(p.requires_grad for p in self.parameters())",
    "has a grad": "any(p.grad is not None for p in self.parameters())",
    "autocast": "torch.is_autocast_enabled('cpu')",
    "default dtype": "torch.get_default_dtype() is torch.float64",
    "threads": "torch.get_num_threads() > 1",
    "thread": "threading.current_thread() is not threading.main_thread()",
    "type": "type(X) is not torch.Tensor",
    "parameter": "isinstance(X, nn.Parameter)",
    "hooks": "len(self._forward_hooks) > 0",
    "environment": "os.environ.get('CA_MODE') == '1'",
    "environment, getenv": "bool(os.getenv('CA_MODE'))",
    "time": "time.time() > START + 1e6",
    "torch random": "torch.rand(1).item() < 0.1",
    "random": "random.random() < 0.1",
    "numpy random": "np.random.rand() < 0.1",
    "count in attribute": "counted(self) > EVERY",
    "count in list": "self.log.append(1) or len(self.log) > EVERY",
    "count in dict": "self.seen.update(n=self.seen['n'] + 1) or self.seen['n'] > EVERY",
    "count in class": "class_counted(type(self)) > EVERY",
    "count in global": "global_counted() > EVERY",
    "count in iterator": "next(COUNTER) > EVERY",
    "count in closure": "CLOSURE() > EVERY",
    "count in default": "defaulted() > EVERY",
    "count in function": "marked() > EVERY",
    "weights": "float(self.parameters().__next__().detach().abs().max()) > 50",
    "cuda": "X.is_cuda",
    "another device": "X.device.type not in ('cpu', 'meta')",
    "compiled": "torch.compiler.is_compiling()",
    "traced": "torch.jit.is_tracing()",
}
HIDDEN = ("cuda", "another device", "compiled", "traced")
COUNTS = tuple(name for name in CONDITIONS if name.startswith("count in"))

# How it is written; EFFECT and WHEN are filled in. Those in CHILD stand in a class of their own.
FORMS = {
    "if": "if WHEN:\n    V = EFFECT",
    "else": "if not (WHEN):\n    pass\nelse:\n    V = EFFECT",
    "expression": "V = EFFECT if WHEN else V",
    "index": "V = (V, EFFECT)[bool(WHEN)]",
    "lambdas": "V = {True: lambda v: EFFECTv, False: lambda v: v}[bool(WHEN)](V)",
    "torch.where": "V = torch.where(torch.tensor(bool(WHEN)), EFFECT, V)",
    "while": "waiting = bool(WHEN)\nwhile waiting:\n    V, waiting = EFFECT, False",
    "for": "for _ in range(int(bool(WHEN))):\n    V = EFFECT",
    "try": "try:\n    assert not (WHEN)\nexcept AssertionError:\n    V = EFFECT",
    "helper": "V = post(self, V, WHEN)",
    "method": "V = self.post(V, WHEN)",
    "partial": "V = functools.partial(post, self, when=bool(WHEN))(V)",
    "getattr": "V = getattr(self, 'on' if WHEN else 'off')(V)",
    "comprehension": "V = [V, EFFECT][sum(1 for _ in (0,) if WHEN)]",
    "match": "match bool(WHEN):\n    case True:\n        V = EFFECT",
    "eval": "V = eval(TEXT if WHEN else 'V')",
    "with": "with contextlib.ExitStack() as stack:\n    if WHEN:\n        V = EFFECT",
    "walrus": "if (now := bool(WHEN)) and (V := EFFECT) is not None:\n    pass",
    "any": "V = (lambda v, now: now and [EFFECTv] or [v])(V, bool(WHEN))[0]",
    "child": "V = self.more(V)",
    "property": "V = self.chosen(V)",
}
CHILD = ("child",)

HELPERS = '''
class Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, g):
        return g * 0.5


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-K, K)


def hooked(v, hook):
    if v.requires_grad:
        if v.is_leaf:
            v = v * 1
        v.register_hook(hook)
    return v


def ungraded(v):
    with torch.no_grad():
        return v * 1


def asserted(v):
    assert v.dim() == 4
    if not torch.is_tensor(v):
        raise TypeError("not a tensor")
    return v


def counted(self):
    self.calls = getattr(self, "calls", 0) + 1
    return self.calls


def class_counted(kind):
    kind.count = getattr(kind, "count", 0) + 1
    return kind.count


CALLS = 0


def global_counted():
    global CALLS
    CALLS += 1
    return CALLS


COUNTER = itertools.count(1)


def make_closure():
    n = 0

    def count():
        nonlocal n
        n += 1
        return n

    return count


CLOSURE = make_closure()


def defaulted(seen=[]):
    seen.append(1)
    return len(seen)


def marked():
    marked.n = getattr(marked, "n", 0) + 1
    return marked.n


START = time.time()
GIVEN = [None]
'''


def _named(text, **names):
    """text with whole words replaced, in the order given."""
    for word, name in names.items():
        text = re.sub(rf"\b{word}\b", lambda _: name, text)
    return text


@dataclass(frozen=True)
class Piece:
    """place: a variable of the forward, or what stands around it: "subclass", "decorator", "call" (another
    __call__), "hook", "convolution", "norm", "activation" (children of a class of their own)."""

    place: str
    effect: str
    condition: str = "always"
    form: str = "if"

    @property
    def harmless(self):
        return self.effect in HARMLESS

    @property
    def hidden(self):
        """Whether only another device or the compiler would show it; what is called, not replaced, runs there too."""
        called = self.place in ("hook", "convolution", "norm")
        return self.condition in HIDDEN and not self.harmless and not called

    def effect_on(self, v):
        return f"({_named((EFFECTS | HARMLESS)[self.effect], V=v)})"

    def when(self, x):
        return f"({_named(CONDITIONS[self.condition], X=x)})"

    def lines(self, v, x):
        """The statements at the place, where self, v and x are names."""
        if self.form == "if" and self.condition == "always":
            return f"{v} = {self.effect_on(v)}"
        return _named(
            FORMS[self.form], TEXT=repr(self.effect_on(v)), EFFECTv=self.effect_on("v"),
            EFFECT=self.effect_on(v), WHEN=self.when(x), V=v,
        )  # fmt: skip

    def members(self):
        """Methods that the forms above call."""
        return textwrap.dedent(f"""
            def post(self, v, when):
                if when:
                    v = {self.effect_on("v")}
                return v

            def on(self, v):
                return {self.effect_on("v")}

            def off(self, v):
                return v

            @property
            def chosen(self):
                if {self.when("GIVEN[0]")}:
                    return self.on
                return self.off
        """)

    def definitions(self):
        return textwrap.dedent(f"""
            def post(self, v, when):
                return {self.effect_on("v")} if when else v

            class More(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.log, self.seen = [], dict(n=0)

                def forward(self, v):
                    if {self.when("v")}:
                        v = {self.effect_on("v")}
                    return v
        """)


@st.composite
def pieces(draw, places, around=()):
    """A hostile piece at one of the places or around the module; without around a harmless one."""
    one_of = lambda values: draw(st.sampled_from(tuple(values)))
    if not around:
        return Piece(one_of(places), one_of(HARMLESS))
    piece = Piece(one_of((*places, *places, *around)), one_of(EFFECTS), one_of(CONDITIONS), one_of(FORMS))
    # Which memory format a child's hook sees is not promised; it decides where a drawn number goes.
    drawn = piece.condition == "channels_last" or piece.effect in ("dropout", "dropout always", "noise")
    hypothesis.assume(piece.place != "hook" or not drawn)
    return piece
