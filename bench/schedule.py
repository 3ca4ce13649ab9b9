"""Decides what a run measures, in which process, and what it leaves out."""

import itertools
from dataclasses import asdict, dataclass

from bench import networks
from bench.cases import Case
from bench.instances import Effort
from bench.lab import Jobs
from bench.rivals import COMPILED, takes_part
from bench.timing import LARGE_OUTPUT
from bench.whole_network import NetworkCase


@dataclass(frozen=True)
class Efforts:
    """Effort for one CoordAtt call and for a whole network."""

    instance: Effort
    network: Effort


FULL = Efforts(Effort(rounds=15, seconds=1.5), Effort(rounds=9, seconds=4.0, block=0.02))
QUICK = Efforts(Effort(rounds=3, seconds=0.2, block=0.001), Effort(rounds=2, seconds=0.2, block=0.001))


def spread_out(items: list, count: int) -> list:
    """``count`` of the items, first and last included, evenly spread."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def cases(options) -> list[Case]:
    """Every CoordAtt call to measure: mode by mode, batch by batch, in network order."""
    modes = ("eval", "train") if options.mode == "both" else (options.mode,)
    kind = {"dtype": options.dtype, "layout": options.layout, "device": options.device}
    if options.shape:
        return [Case(shape, mode, **kind) for mode in modes for shape in options.shape]
    instances = networks.distinct([instance for name in options.network for instance in networks.find(name)])
    chosen = spread_out(list(instances), 2) if options.quick else list(instances)
    return [
        Case((batch, i.channels, i.height, i.width), mode, count=instances[i], **kind)
        for mode in modes
        for batch in options.batch
        for i in chosen
    ]


def network_cases(options) -> list[NetworkCase]:
    modes = ("eval", "train") if options.mode == "both" else (options.mode,)
    size = 64 if options.quick else 224
    return [
        NetworkCase(batch, mode, options.dtype, options.layout, options.device, size)
        for batch in options.photo_batch
        for mode in modes
    ]


def pages_for(size: int, device: str) -> tuple[str, ...]:
    """Page states a case with full-size tensors of ``size`` bytes is measured in."""
    return ("fresh", "kept") if size > LARGE_OUTPUT and device == "cpu" else ("plain",)


def compiled_cases(chosen: list[Case], per_group: int) -> set[Case]:
    """The cases torch.compile takes part in: ``per_group`` for every mode and batch."""
    groups: dict[tuple, list[Case]] = {}
    for case in chosen:
        groups.setdefault((case.mode, case.shape[0]), []).append(case)
    return {case for group in groups.values() for case in spread_out(group, per_group)}


def plan(options) -> tuple[list[Jobs], list[str]]:
    """The labs in the order they run, and in words what is left out on purpose."""
    efforts = QUICK if options.quick else FULL
    labs = [Jobs(threads, pages) for threads in options.threads for pages in ("plain", "fresh", "kept")]
    left_out = []
    order = itertools.count()

    def add(pages: tuple[str, ...], job: dict) -> None:
        job |= {"expected": expected(job), "order": next(order)}
        for lab in labs:
            if lab.pages in pages:
                lab.jobs.append(job)

    if not options.no_photos:
        for case in network_cases(options):
            add(
                pages_for(case.largest_tensor, options.device),
                {"kind": "network", "case": asdict(case), "effort": asdict(efforts.network), "rivals": []},
            )
    if not options.photos_only:
        chosen = cases(options)
        compiled = compiled_cases(chosen, options.compile_shapes)
        for case in chosen:
            rivals = [
                name
                for name in options.rivals
                if takes_part(name, case) and (name not in COMPILED or case in compiled)
            ]
            add(
                pages_for(case.output_bytes, options.device),
                {
                    "kind": "instance",
                    "case": case.as_dict(),
                    "effort": asdict(efforts.instance),
                    "rivals": rivals,
                },
            )
        wanted = any(name in COMPILED for name in options.rivals)
        if wanted and len(compiled) < len(chosen):
            how_many = f"{len(chosen) - len(compiled)} of {len(chosen)}"
            left_out.append(
                f"torch.compile on {how_many} cases, to save time (--compile-shapes 99 --budget 0 for all)"
            )
    return [lab for lab in labs if lab.jobs], left_out


def expected(job: dict) -> float:
    """Seconds a job takes on an idle machine, compiling included; shares of the budget follow it."""
    train = job["case"]["mode"] == "train"
    setup = (6.0 if train else 2.0) if job["kind"] == "network" else 0.7
    compiled = sum(name in COMPILED for name in job["rivals"])
    return setup + job["effort"]["seconds"] + compiled * (5.0 if train else 2.0)
