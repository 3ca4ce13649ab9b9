"""One configuration on a GPU: its phases, who takes part, and their timing."""

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from bench import baselines, checks
from bench.baselines import OURS
from bench.cases import Case
from bench.gpu import clocks
from bench.gpu.ours import Ours, chosen, contestants
from coordatt_fast.interleaved import Contestant, race

COPY = "copy"
GRAPHED = "-graph"  # suffix of a contestant that is captured and replayed
# forward: in training, with what backward needs kept; step: both.
PHASES = ("eval", "forward", "backward", "step")
# Full-size tensors that a phase moves (docs/how-it-works.md): in two passes over the map, and in one.
TENSORS_MOVED = {"eval": 3, "forward": 3, "backward": 4, "step": 7}
IN_ONE_PASS = {"eval": 2, "forward": 2, "step": 6}
SMALL = 8 << 20  # bytes of a map up to which the launches decide, so that steps and CUDA graphs take part


def tensors_moved(phase: str, way: str) -> int:
    return TENSORS_MOVED[phase] if way in ("", "chain") else IN_ONE_PASS.get(phase, TENSORS_MOVED[phase])


@dataclass
class Result:
    """By phase and contestant. seconds, host: Spread of a call's time, on the device's clock and the host's.

    speedup: of each of ours over each rival. bandwidth: of ours, bytes of full-size tensors (counted) a
    second. outlines: of the CUDA backend's ways, as cuda_forward_outline has them; estimated: the way that it
    would take.
    """

    case: dict
    name: str
    ours: list = field(default_factory=list)
    seconds: dict = field(default_factory=dict)
    host: dict = field(default_factory=dict)
    speedup: dict = field(default_factory=dict)
    bandwidth: dict = field(default_factory=dict)
    copy_bandwidth: float = float("nan")
    outlines: dict = field(default_factory=dict)
    estimated: dict = field(default_factory=dict)
    checks: dict = field(default_factory=dict)
    left_out: dict = field(default_factory=dict)
    took: float = 0.0


@dataclass
class Call:
    """What is timed in a phase, and what it is called in (grad mode, backend, way)."""

    call: Callable[[], object]
    around: Callable = nullcontext


def calls(function, module, x: Tensor, g: Tensor, around: Callable, small: bool) -> dict[str, Call]:
    """Of a training step, by phase."""
    leaf = x.detach().requires_grad_()
    inputs = [leaf, *module.parameters()]
    module.train()
    with around():
        out = function(leaf)
    backward = partial(torch.autograd.grad, out, inputs, g, retain_graph=True)
    found = {"forward": Call(partial(function, leaf), around), "backward": Call(backward, around)}
    if small:
        found["step"] = Call(lambda: torch.autograd.grad(function(leaf), inputs, g), around)
    return found


@dataclass
class Entry:
    """Who can take part in a mode: a name, what is called, and what it is called in."""

    name: str
    rival: str
    around: Callable = nullcontext
    ours: Ours | None = None


def entries(case: Case, x: Tensor, names: list[str], triton: bool, result: Result) -> list[Entry]:
    found, outlines, estimated = contestants(case, x, triton)
    result.outlines[case.mode], result.estimated[case.mode] = outlines, estimated
    ours = [Entry(one.name, OURS, partial(chosen, one), one) for one in found]
    result.ours = list(dict.fromkeys([*result.ours, *(entry.name for entry in ours)]))
    return ours + [Entry(name, name) for name in names]


def measure(case: Case, names: list[str], rounds: int, block: float, triton: bool = True) -> Result:
    """Check and time one configuration in every phase. What fails its check gets no time."""
    began = time.perf_counter()
    torch._dynamo.reset()
    result = Result(case.as_dict(), case.name)
    small = case.output_bytes <= SMALL
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        x, g = case.tensor(1), case.tensor(2)
        entered: dict[str, dict[str, Call]] = {phase: {} for phase in PHASES}
        for mode in ("eval", "train"):
            kind = replace(case, mode=mode)
            plain, grad = kind.plain(), g if mode == "train" else None
            exact = checks.truth(plain, x, grad, case.device)
            allowed = checks.errors(checks.results(*baselines.local("eager", plain, kind), x, grad), exact)
            for entry in entries(kind, x, names, triton, result):
                with left_out(result, f"{entry.name} {mode}"):
                    enter(kind, entry, plain, x, g, exact, allowed, small, entered, result)
        for phase, found in entered.items():
            if any(name in found for name in result.ours):
                time_phase(case, phase, found, x, small, rounds, block, result)
    result.took = time.perf_counter() - began
    return result


class left_out:
    """What goes wrong within is noted under the name; what CUDA cannot recover from is not caught."""

    def __init__(self, result: Result, name: str) -> None:
        self.result, self.name = result, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> bool:
        if error is None or not isinstance(error, Exception) or isinstance(error, torch.OutOfMemoryError):
            return False
        first = (str(error).strip().splitlines() or [""])[0][:200]
        self.result.left_out[self.name] = f"{kind.__name__}: {first}"
        if self.result.case["device"].startswith("cuda"):
            torch.cuda.synchronize()
        return True


def enter(kind, entry: Entry, plain, x, g, exact, allowed, small, entered, result: Result) -> None:
    """Build and check one contestant, and enter it in this mode's phases."""
    function, module = baselines.local(entry.rival, plain, kind)
    with entry.around():
        found = checks.errors(
            checks.results(function, module, x, g if kind.mode == "train" else None), exact
        )
    factor = checks.OWN_FACTOR if entry.ours else checks.RIVAL_FACTOR
    verdict = checks.judge(found, allowed, x.dtype, factor)
    result.checks[f"{entry.name} {kind.mode}"] = asdict(verdict) | {"text": str(verdict)}
    if not verdict.passed:
        return
    if kind.mode == "eval":
        around = partial(entry.around, torch.inference_mode) if entry.ours else torch.inference_mode
        entered["eval"][entry.name] = Call(partial(function, x), around)
        return
    for phase, call in calls(function, module, x, g, entry.around, small).items():
        # Backward is the same after every way forward.
        if not (phase == "backward" and entry.ours and entry.ours.way not in ("", "chain")):
            entered[phase][entry.name] = call


def time_phase(case, phase, entered: dict[str, Call], x, small, rounds, block, result: Result) -> None:
    """Race the contestants of a phase; small maps also as CUDA graphs, one image also by the host's clock."""
    contestants: dict[str, Contestant] = {}
    for name, call in entered.items():
        contestants[name] = clocks.on_device(case.device, call.call, call.around)
        # Backward alone would run on the stream of a forward pass outside the graph.
        if small and phase != "backward" and case.device.startswith("cuda"):
            with left_out(result, f"{name}{GRAPHED} {phase}"):
                contestants[name + GRAPHED] = clocks.graphed(call.call, call.around)
    out = torch.empty_like(x)
    contestants[COPY] = clocks.on_device(case.device, partial(out.copy_, x), torch.inference_mode)
    timed = race(contestants, rounds=rounds, block=block)
    result.seconds[phase] = {name: asdict(timed.seconds(name)) for name in contestants}
    ours = [name for name in contestants if name in result.ours]
    rivals = [name for name in contestants if name.removesuffix(GRAPHED) not in result.ours]
    result.speedup[phase] = {
        name: {rival: asdict(timed.speedup(name, rival)) for rival in rivals} for name in ours
    }
    result.bandwidth[phase] = {
        name: tensors_moved(phase, name.partition(" ")[2]) * case.output_bytes / timed.seconds(name).median
        for name in ours
    }
    result.copy_bandwidth = 2 * case.output_bytes / timed.seconds(COPY).median
    if case.shape[0] == 1:
        hosts = {n: clocks.on_host(case.device, c.call, c.around) for n, c in entered.items()}
        timed = race(hosts, rounds=rounds, block=block)
        result.host[phase] = {name: asdict(timed.seconds(name)) for name in hosts}
