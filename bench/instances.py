"""Step two: one CoordAtt call against its rivals, checked, then timed in interleaved rounds."""

import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import coordatt_fast
from bench import baselines, checks, machine
from bench.baselines import CLONE, FOREIGN, OURS, OURS_OUT
from bench.cases import Case
from bench.foreign import Foreign
from bench.timing import LARGE_OUTPUT
from coordatt_fast.interleaved import Contestant, Local, Race, race


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds at most, seconds per case, seconds per block."""

    rounds: int = 15
    seconds: float = 3.0
    block: float = 0.005


class Runtimes:
    """The processes of the foreign runtimes, started when first needed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.running: dict[str, Foreign] = {}

    def get(self, name: str) -> Foreign:
        if name not in self.running:
            self.running[name] = Foreign(name, self.threads)
        return self.running[name]

    def close(self) -> None:
        for runtime in self.running.values():
            runtime.close()
        self.running.clear()


def training_step(
    function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, g: Tensor
) -> Callable[[], object]:
    """Forward and backward: gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    inputs = [x, *module.parameters()]
    return lambda: torch.autograd.grad(function(x), inputs, g)


def synchroniser(case: Case) -> Callable[[], None] | None:
    return partial(torch.cuda.synchronize, case.device) if case.device.startswith("cuda") else None


def explain(module: nn.Module, x: Tensor, training: bool) -> dict:
    """The plan of the call in the grad mode it is timed in."""
    with torch.inference_mode(not training):
        plan = coordatt_fast.explain(module, x.detach().requires_grad_(training))
    return {"tier": plan.tier, "backend": plan.backend, "reason": plan.reason}


class Bout:
    """One case being measured: builds, checks and times every contestant."""

    def __init__(self, case: Case, runtimes: Runtimes, folder: Path) -> None:
        self.case = case
        self.runtimes = runtimes
        self.folder = folder
        self.plain = case.plain()
        self.x = case.tensor(1)
        self.g = case.tensor(2) if case.mode == "train" else None
        self.exact = checks.truth(self.plain, self.x, self.g)
        baseline, module = baselines.local("eager", self.plain, case)
        self.plain_errors = checks.errors(checks.results(baseline, module, self.x, self.g), self.exact)
        self.contestants: dict[str, Contestant] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.verdicts: dict[str, checks.Verdict] = {}
        self.left_out: dict[str, str] = {}

    def enter(self, name: str, make: Callable[[], tuple] | None = None) -> None:
        """Build a contestant, check it, and let it start only if the check passes."""
        own = name in (OURS, OURS_OUT)
        try:
            found, contestant = self.foreign(name) if name in FOREIGN else self.local(name, make)
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            if own:
                self.verdicts[name] = checks.Verdict(False, "", math.nan, math.nan, reason)
            else:
                self.left_out[name] = reason
            return
        self.errors[name] = checks.errors(found, self.exact)
        factor = checks.OWN_FACTOR if own else checks.RIVAL_FACTOR
        verdict = checks.judge(self.errors[name], self.plain_errors, self.x.dtype, factor)
        self.verdicts[name] = verdict
        if verdict.passed:
            self.contestants[name] = contestant

    def local(self, name: str, make: Callable[[], tuple] | None) -> tuple[dict[str, Tensor], Local]:
        function, module = make() if make else baselines.local(name, self.plain, self.case)
        found = checks.results(function, module, self.x, self.g)
        if self.g is None:
            return found, Local(partial(function, self.x), torch.inference_mode, synchroniser(self.case))
        step = training_step(function, module, self.x, self.g)
        return found, Local(step, synchronise=synchroniser(self.case))

    def foreign(self, name: str) -> tuple[dict[str, Tensor], Foreign]:
        model = self.folder / f"{self.case.name}.onnx"
        if not model.exists():
            baselines.export(self.plain, self.x, model)
        runtime = self.runtimes.get(name)
        return {"output": torch.from_numpy(runtime.load(model, self.x.numpy()))}, runtime

    def time(self, effort: Effort) -> Race:
        self.contestants[CLONE] = Local(self.x.clone, torch.inference_mode, synchroniser(self.case))
        return race(self.contestants, rounds=effort.rounds, limit=effort.seconds, block=effort.block)


def measure(
    case: Case,
    names: list[str],
    runtimes: Runtimes,
    effort: Effort,
    make_ours: Callable[[], tuple] | None = None,
) -> dict:
    """Measure one case; the result is plain data, ready for JSON.

    ``speedup`` holds, by contestant, how many times faster ours is. ``make_ours`` replaces our module (for
    tests). Where our check fails there is no ``seconds`` and no ``speedup`` at all.
    """
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        bout = Bout(case, runtimes, Path(folder))
        bout.enter(OURS, make_ours)
        plan = explain(baselines.ours(bout.plain, case), bout.x, case.mode == "train")
        result = {
            "kind": "instance",
            "case": case.as_dict(),
            "name": case.name,
            "plan": plan,
            "seconds": {},
            "speedup": {},
            "bytes_moved": case.bytes_moved,
            "output_bytes": case.output_bytes,
            "fits_in": machine.fits_in(2 * case.output_bytes, machine.caches())
            if case.device == "cpu"
            else "",
        }
        if OURS in bout.contestants:
            if case.mode == "eval" and case.output_bytes > LARGE_OUTPUT:
                bout.enter(OURS_OUT)
            for name in names:
                bout.enter(name)
            timed = bout.time(effort)
            for name in bout.contestants:
                result["seconds"][name] = asdict(timed.seconds(name))
                result["speedup"][name] = asdict(timed.speedup(OURS, name))
            result["rounds"] = len(timed.rounds[OURS])
            result["calls_per_block"] = timed.calls
            result["gb_per_second"] = case.bytes_moved / timed.seconds(OURS).median / 1e9
    result["checks"] = {
        name: asdict(verdict) | {"text": str(verdict)} for name, verdict in bout.verdicts.items()
    }
    result["plain_error"] = checks.largest(bout.plain_errors)
    result["our_error"] = checks.largest(bout.errors[OURS]) if OURS in bout.errors else math.nan
    result["left_out"] = bout.left_out
    return result
