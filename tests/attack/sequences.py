"""A module and its plain twin through the same life: whatever is done to both, both compute the same."""

import copy
import io
import pickle
import warnings

import hypothesis.stateful as stateful
import torch
from hypothesis import strategies as st
from paper import PaperCoordAtt
from torch import nn

from attack.tensors import laid_out, map_of
from coordatt_fast import CoordAtt, accelerate, restore, use_backend

C, M = 6, 5
PARTS = ("conv1", "bn1", "act", "conv_h", "conv_w")
PARAMETERS = tuple(f"{m}.{p}" for m in ("conv1", "bn1", "conv_h", "conv_w") for p in ("weight", "bias"))
SIZES = ((1, 1), (1, 5), (4, 1), (3, 3), (5, 2), (2, 9), (7, 6))
KINDS = ("module", "accelerated")
# Rounding, and what a few steps in a row make of it; one state is copied over after every comparison in a
# coarser dtype than float64, so that nothing accumulates.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}

CHILDREN = {
    "bn1": (
        lambda: nn.BatchNorm2d(M, eps=0.01, momentum=0.3), lambda: nn.BatchNorm2d(M, affine=False),
        lambda: nn.BatchNorm2d(M, track_running_stats=False), lambda: nn.GroupNorm(1, M), nn.Identity,
        lambda: nn.InstanceNorm2d(M),
    ),
    "act": (nn.SiLU, nn.ReLU, nn.Hardswish, nn.GELU, nn.Tanh, lambda: nn.Hardswish(inplace=True), nn.Identity),
    "conv1": (lambda: nn.Conv2d(C, M, 1, bias=False), lambda: nn.Sequential(nn.Conv2d(C, M, 1))),
    "conv_h": (lambda: nn.Conv2d(M, C, 1, bias=False), lambda: nn.Sequential(nn.Conv2d(M, C, 1))),
    "conv_w": (lambda: nn.Conv2d(M, C, 1), lambda: nn.Conv2d(M, C, 1, bias=False)),
}  # fmt: skip

# Hooks are module-level functions, so that modules with them can be pickled.


def doubles(module, args, out):
    return out * 2


def halves_before(module, args):
    return (args[0] * 0.5, *args[1:])


def scales_gradient(module, given, got):
    return tuple(None if g is None else g * 3 for g in given)


def listens(module, args, out):
    return None


def _copied(module, how):
    """A copy, or why there is none (of parametrised modules)."""
    try:
        if how == "deepcopy":
            return copy.deepcopy(module)
        if how == "copy":
            return copy.copy(module)
        if how == "pickle":
            return pickle.loads(pickle.dumps(module))
        stream = io.BytesIO()
        torch.save(module, stream)
        stream.seek(0)
        return torch.load(stream, weights_only=False)
    except (RuntimeError, AttributeError, pickle.PicklingError) as error:
        return str(error)


HOOKS = {
    "forward": lambda child: child.register_forward_hook(doubles),
    "before": lambda child: child.register_forward_pre_hook(halves_before),
    "backward": lambda child: child.register_full_backward_hook(scales_gradient),
    "listening": lambda child: child.register_forward_hook(listens),
}


class Lives(stateful.RuleBasedStateMachine):
    """ours and theirs; every rule does the same to both."""

    @stateful.initialize(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), skip=st.booleans())
    def start(self, kind, seed, skip):
        self.kind, self.hooks, self.pending, self.optimizers = kind, [], None, None
        self.seed = seed
        torch.manual_seed(seed)
        self.theirs = PaperCoordAtt(C, C, mid_channels=M, skip=skip).double()
        with torch.no_grad():
            for p in self.theirs.parameters():
                p.add_(torch.randn_like(p) * 0.4)
        cls = CoordAtt if kind == "module" else PaperCoordAtt
        self.ours = cls(C, C, mid_channels=M, skip=skip).double()
        self.ours.load_state_dict(self.theirs.state_dict())
        if kind == "accelerated":
            assert accelerate(self.ours).replaced

    @property
    def both(self):
        return self.ours, self.theirs

    @property
    def coarse(self):
        return next(self.theirs.parameters()).dtype is not torch.float64

    # Calls ------------------------------------------------------------------------------------------

    def _agree(self, name, a, b, scale=0.0):
        if a is None or b is None:
            assert a is b, f"{name}: {a} and {b}"
            return
        assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.dtype}{a.shape}, {b.dtype}{b.shape}"
        if not a.is_floating_point():
            assert torch.equal(a, b), f"{name}: {a} and {b}"
            return
        size = max(float(b.abs().max()) if b.numel() else 0.0, scale, 1e-6)
        error = float((a.double() - b.double()).abs().max()) / size if b.numel() else 0.0
        assert error <= TOLERANCE[b.dtype], f"{name}: off by {error:.3g} of its largest element"

    def _map(self, seed, size, n, layout):
        generator = torch.Generator().manual_seed(seed)
        dtype = next(self.theirs.parameters()).dtype
        return laid_out(map_of("normal", (n, C, *size), generator, dtype), layout)

    @stateful.rule(
        seed=st.integers(0, 2**31), size=st.sampled_from(SIZES), n=st.integers(1, 3),
        layout=st.sampled_from(("contiguous", "channels_last", "sliced")), leaf=st.booleans(),
        mode=st.sampled_from(("grad", "grad", "grad", "no_grad", "inference")),
        backend=st.sampled_from(("auto", "auto", "cpu", "reference")),
    )  # fmt: skip
    def forward(self, seed, size, n, layout, leaf, mode, backend):
        manager = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
        if self.coarse and n * sum(size) == 2:
            n = 2  # two equal values in a normalisation: what comes out is rounding
        outs, leaves = [], []
        for module in self.both:
            torch.manual_seed(seed)
            x = self._map(seed, size, n, layout if module is self.ours else "contiguous")
            given = x.detach().requires_grad_(leaf and mode == "grad")
            with manager(), use_backend(backend if module is self.ours else "auto"):
                try:
                    outs.append(module(given))
                except RuntimeError as error:  # an activation in place behind a backward hook, say
                    outs.append(error)
            leaves.append(given)
        if any(isinstance(out, RuntimeError) for out in outs):
            assert all(isinstance(out, RuntimeError) for out in outs), outs
            return
        self._agree("output", *(out.detach() for out in outs))
        assert outs[0].requires_grad == outs[1].requires_grad
        if outs[0].requires_grad:
            self.pending = (outs, leaves, seed)

    @stateful.precondition(lambda self: self.pending is not None)
    @stateful.rule(twice=st.booleans())
    def backward(self, twice):
        outs, leaves, seed = self.pending
        self.pending = None
        generator = torch.Generator().manual_seed(seed + 1)
        grad = map_of("normal", tuple(outs[0].shape), generator, outs[0].dtype)
        raised = []
        for out in outs:
            try:
                for again in (twice, False)[: 1 + twice]:
                    out.backward(grad, retain_graph=again)
                raised.append(None)
            except RuntimeError as error:
                raised.append(error)
        # What it was computed from was written since: ours asks for all of it, plain for what that gradient needs.
        written = "modified by an inplace operation" in str(raised[0])
        assert raised[0] is None or raised[1] is not None or written, raised[0]
        if raised != [None, None]:
            for module in self.both:
                module.zero_grad()
        elif outs[0].dtype is torch.float64:
            self._agree("gradient of x", *(x.grad for x in leaves))
            self._gradients()

    def _gradients(self):
        pairs = {n: [p.grad] for n, p in self.ours.named_parameters()}
        for n, p in self.theirs.named_parameters():
            pairs[n].append(p.grad)
        sizes = [float(b.abs().max()) for _, b in pairs.values() if b is not None]
        for name, (a, b) in pairs.items():
            self._agree(f"gradient of {name}", a, b, scale=1e-3 * max(sizes, default=0.0))

    @stateful.invariant()
    def same_state(self):
        if not hasattr(self, "ours"):
            return
        theirs = self.theirs.state_dict()
        mine = self.ours.state_dict()
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            self._agree(name, value, theirs[name], scale=1e-2)
        if self.coarse:
            with torch.no_grad():
                for name, value in mine.items():
                    if not value.is_inference() and not torch.equal(value, theirs[name]):
                        value.copy_(theirs[name])
            for mine, other in zip(self.ours.parameters(), self.theirs.parameters()):
                if mine.grad is not None and other.grad is not None:
                    mine.grad.copy_(other.grad)

    # What is done to them -----------------------------------------------------------------------------

    @stateful.rule(on=st.booleans(), only=st.sampled_from((None, None, "bn1")))
    def train(self, on, only):
        for module in self.both:
            (module if only is None else getattr(module, only)).train(on)

    @stateful.rule(dtype=st.sampled_from((torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16)))
    def convert(self, dtype):
        self._forget()
        for module in self.both:
            module.to(dtype)
        self.ours.load_state_dict(self.theirs.state_dict())

    @stateful.rule(on=st.booleans(), name=st.sampled_from(("all", *PARAMETERS)))
    def freeze(self, on, name):
        for module in self.both:
            for n, p in module.named_parameters():
                if name in ("all", n):
                    p.requires_grad_(on)
        self.pending = None

    @stateful.rule(eps=st.sampled_from((1e-5, 0.1)), momentum=st.sampled_from((0.1, 0.7, None)))
    def norm_settings(self, eps, momentum):
        for module in self.both:
            if isinstance(module.bn1, nn.BatchNorm2d):
                module.bn1.eps, module.bn1.momentum = eps, momentum

    @stateful.rule(name=st.sampled_from(tuple(CHILDREN)), which=st.integers(0, 9), seed=st.integers(0, 2**31))
    def swap(self, name, which, seed):
        self._forget()
        make = CHILDREN[name][which % len(CHILDREN[name])]
        dtype, training = next(self.theirs.parameters()).dtype, self.theirs.training
        for module in self.both:
            torch.manual_seed(seed)
            setattr(module, name, make().to(dtype).train(training))

    @stateful.rule(name=st.sampled_from((*PARTS, "pool_h", "")), kind=st.sampled_from(tuple(HOOKS)))
    def hook(self, name, kind):
        self.pending = None
        for module in self.both:
            target = getattr(module, name) if name else module
            self.hooks.append(HOOKS[kind](target))

    @stateful.precondition(lambda self: self.hooks)
    @stateful.rule()
    def unhook(self):
        self.pending = None
        for handle in self.hooks:
            handle.remove()
        self.hooks = []

    @stateful.rule(lr=st.sampled_from((0.01, 0.2)), momentum=st.sampled_from((0.0, 0.9)))
    def step(self, lr, momentum):
        if self.optimizers is None:
            make = lambda module: torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum)
            self.optimizers = [make(module) for module in self.both]
        finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.theirs.parameters())
        for optimizer, module in zip(self.optimizers, self.both):
            if finite:
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
            optimizer.zero_grad()

    @stateful.rule(strict=st.booleans())
    def state_dict_round_trip(self, strict):
        for module in self.both:
            stream = io.BytesIO()
            torch.save(module.state_dict(), stream)
            stream.seek(0)
            module.load_state_dict(torch.load(stream, weights_only=True), strict=strict)
        self.pending = None

    @stateful.rule()
    def exchange_states(self):
        state = copy.deepcopy(self.ours.state_dict())
        self.ours.load_state_dict(self.theirs.state_dict())
        self.theirs.load_state_dict(state)
        self.pending = None

    @stateful.rule(how=st.sampled_from(("deepcopy", "pickle", "copy", "torch.save")))
    def copies(self, how):
        """Goes on with a copy; a shallow one shares parameters, as it does for any module."""
        self._forget()
        self.hooks = []  # their handles belong to the old ones
        made = [_copied(module, how) for module in self.both]
        assert isinstance(made[0], str) == isinstance(made[1], str), made
        if not isinstance(made[1], str):
            self.ours, self.theirs = made

    @stateful.rule()
    def channels_last(self):
        """Ours alone: a layout is no number, and PyTorch's gradients of one image in it are wrong behind a hook."""
        self.ours.to(memory_format=torch.channels_last)
        self.pending = None

    @stateful.rule(fill=st.sampled_from((0.0, 0.3)))
    def reset_statistics(self, fill):
        for module in self.both:
            for buffer in module.buffers():
                if buffer.is_floating_point() and not buffer.is_inference():
                    buffer.fill_(fill + 0.5)
        self.pending = None

    @stateful.rule()
    def parametrise(self):
        self._forget()
        for module in self.both:
            if isinstance(module.conv1, nn.Conv2d) and not nn.utils.parametrize.is_parametrized(module.conv1):
                nn.utils.parametrizations.weight_norm(module.conv1)
            elif isinstance(module.conv1, nn.Conv2d):
                nn.utils.parametrize.remove_parametrizations(module.conv1, "weight")

    @stateful.precondition(lambda self: self.kind == "accelerated")
    @stateful.rule()
    def restore_and_accelerate(self):
        restore(self.ours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accelerate(self.ours)

    def _forget(self):
        """Of the optimizers and of what waits for backward, before parameters become other objects."""
        self.optimizers = self.pending = None
        for module in self.both:
            module.zero_grad()
