"""One configuration on a GPU: its phases, who takes part, and their timing by device events."""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from bench import baselines, checks
from bench.baselines import COMPILED, OURS
from bench.cases import Case
from bench.timing import Contestant, Local, race

COPY = "copy"
GRAPHED = "-graph"  # suffix of a contestant that is captured once and replayed
PHASES = ("eval", "forward", "backward")  # forward: in training, with what backward needs kept
# Full-size tensors that a phase has to move (docs/how-it-works.md), the algorithm in two big passes.
TENSORS_MOVED = {"eval": 3, "forward": 3, "backward": 4}
SMALL = 8 << 20  # bytes of a map up to which the launches decide, so that CUDA graphs take part


class OnStream:
    """A callable timed by events of the current stream; launches count where they outlast the work."""

    rest = 0.0

    def __init__(self, call: Callable[[], object], around: Callable = nullcontext) -> None:
        self.call = call
        self.around = around
        self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run(self, calls: int) -> float:
        with self.around():
            self.start.record()
            for _ in repeat(None, calls):
                self.call()
            self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def contestant(case: Case, call: Callable[[], object], around: Callable = nullcontext) -> Contestant:
    return OnStream(call, around) if case.device.startswith("cuda") else Local(call, around)


def captured(call: Callable[[], object], around: Callable = nullcontext) -> Callable[[], object]:
    """The replay of a CUDA graph of the call, warmed up as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), around():
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with around(), torch.cuda.graph(graph):
        call()
    return graph.replay


def calls(name: str, function, module, x: Tensor, g: Tensor) -> dict[str, tuple[Callable, Callable]]:
    """phase -> (what to call, the grad mode it is called in)."""
    leaf = x.detach().requires_grad_()
    inputs = [leaf, *module.parameters()]
    module.train()
    out = function(leaf)
    backward = partial(torch.autograd.grad, out, inputs, g, retain_graph=True)
    return {"forward": (partial(function, leaf), nullcontext), "backward": (backward, nullcontext)}


@dataclass
class Result:
    """seconds: phase -> contestant -> Spread; speedup: phase -> contestant -> how much faster ours is."""

    case: dict
    name: str
    backend: str
    seconds: dict
    speedup: dict
    bandwidth: dict  # phase -> bytes of full-size tensors (counted) per second of ours
    copy_bandwidth: float
    checks: dict
    left_out: dict
    took: float


def measure(case: Case, names: list[str], rounds: int, block: float) -> Result:
    """Check and time one configuration in every phase.

    A contestant that fails its check gets no time; where ours fails there are none at all.
    """
    began = time.perf_counter()
    torch._dynamo.reset()
    result = Result(case.as_dict(), case.name, "", {}, {}, {}, math.nan, {}, {}, 0.0)
    graphed = case.device.startswith("cuda") and case.output_bytes <= SMALL
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        evaluating = Case(**case.as_dict() | {"mode": "eval"})
        training = Case(**case.as_dict() | {"mode": "train"})
        x, g = case.tensor(1), case.tensor(2)
        entered: dict[str, dict[str, Contestant]] = {phase: {} for phase in PHASES}
        for kind in (evaluating, training):
            plain = kind.plain()
            grad = g if kind is training else None
            exact = checks.truth(plain, x, grad, case.device)
            allowed = checks.errors(checks.results(*baselines.local("eager", plain, kind), x, grad), exact)
            for name in (OURS, *names):
                try:
                    enter(kind, name, plain, x, grad, g, exact, allowed, graphed, entered, result)
                except Exception as error:
                    first = (str(error).strip().splitlines() or [""])[0][:200]
                    result.left_out[f"{name} {kind.mode}"] = f"{type(error).__name__}: {first}"
        for phase, contestants in entered.items():
            if OURS not in contestants:
                continue
            out = torch.empty_like(x)
            contestants[COPY] = contestant(case, partial(out.copy_, x), torch.inference_mode)
            timed = race(contestants, rounds=rounds, block=block)
            result.seconds[phase] = {name: asdict(timed.seconds(name)) for name in contestants}
            result.speedup[phase] = {name: asdict(timed.speedup(OURS, name)) for name in contestants}
            result.bandwidth[phase] = TENSORS_MOVED[phase] * case.output_bytes / timed.seconds(OURS).median
            result.copy_bandwidth = 2 * case.output_bytes / timed.seconds(COPY).median
    result.took = time.perf_counter() - began
    return result


def enter(kind: Case, name, plain, x, grad, g, exact, allowed, graphed, entered, result) -> None:
    """Build, check and enter one contestant in this mode's phases, also graphed where launches decide."""
    function, module = baselines.local(name, plain, kind)
    found = checks.errors(checks.results(function, module, x, grad), exact)
    factor = checks.OWN_FACTOR if name == OURS else checks.RIVAL_FACTOR
    verdict = checks.judge(found, allowed, x.dtype, factor)
    result.checks[f"{name} {kind.mode}"] = asdict(verdict) | {"text": str(verdict)}
    if not verdict.passed:
        return
    if kind.mode == "eval":
        phases = {"eval": (partial(function, x), torch.inference_mode)}
        if name == OURS:
            with torch.inference_mode():
                result.backend = baselines.coordatt_fast.explain(module, x).backend
    else:
        phases = calls(name, function, module, x, g)
    for phase, (call, around) in phases.items():
        entered[phase][name] = contestant(kind, call, around)
        if graphed and phase == "eval" and (name in (OURS, "eager") or name in COMPILED):
            entered[phase][name + GRAPHED] = contestant(kind, captured(call, around))
