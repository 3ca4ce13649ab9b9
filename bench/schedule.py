"""Decides what a run measures, in which process, and what it leaves out."""

from dataclasses import asdict, dataclass

from bench import networks
from bench.baselines import ANY_COMPILED, takes_part
from bench.cases import Case
from bench.instances import Effort
from bench.lab import Jobs
from bench.timing import PAGES, pages_for
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


def compiled_cases(chosen: list[Case], per_group: int) -> set[Case]:
    """The cases torch.compile takes part in: ``per_group`` for every mode and batch."""
    groups: dict[tuple, list[Case]] = {}
    for case in chosen:
        groups.setdefault((case.mode, case.shape[0]), []).append(case)
    return {case for group in groups.values() for case in spread_out(group, per_group)}


def network_jobs(options, effort: Effort) -> list[dict]:
    """One job for each batch and mode of step one."""
    return [
        {
            "kind": "network",
            "case": asdict(case),
            "pages": pages_for(case.largest_tensor, options.device),
            "effort": asdict(effort),
            "rivals": [],
        }
        for case in network_cases(options)
    ]


def instance_jobs(options, effort: Effort) -> list[dict]:
    """One job for each CoordAtt call of step two."""
    chosen = cases(options)
    compiled = compiled_cases(chosen, options.compile_shapes)
    return [
        {
            "kind": "instance",
            "case": case.as_dict(),
            "pages": pages_for(case.output_bytes, options.device),
            "effort": asdict(effort),
            "rivals": [
                name
                for name in options.rivals
                if takes_part(name, case) and (name not in ANY_COMPILED or case in compiled)
            ],
        }
        for case in chosen
    ]


def plan(options) -> tuple[list[Jobs], list[str]]:
    """The labs in the order they run, and in words what is left out on purpose."""
    efforts = QUICK if options.quick else FULL
    jobs = [] if options.no_photos else network_jobs(options, efforts.network)
    jobs += [] if options.photos_only else instance_jobs(options, efforts.instance)
    jobs.sort(key=lambda job: job["kind"] == "network" and job["pages"] != ("plain",))  # the longest last
    labs = [Jobs(threads, pages) for threads in options.threads for pages in PAGES]
    for order, job in enumerate(jobs):
        job |= {"expected": expected(job), "order": order}
        for lab in labs:
            if lab.pages in job["pages"]:
                lab.jobs.append(job)
    left_out = []
    wanted = {name for name in options.rivals if name in ANY_COMPILED}
    without = sum(job["kind"] == "instance" and not wanted & {*job["rivals"]} for job in jobs)
    if wanted and without:
        left_out.append(
            f"torch.compile in {without} cases, to save time (--compile-shapes 99 --budget 0 for all)"
        )
    return [lab for lab in labs if lab.jobs], left_out


def expected(job: dict) -> float:
    """Seconds a job takes on an idle machine, compiling included; shares of the budget follow it."""
    train = job["case"]["mode"] == "train"
    setup = (6.0 if train else 2.0) if job["kind"] == "network" else 0.7
    compiled = sum(name in ANY_COMPILED for name in job["rivals"])
    return setup + job["effort"]["seconds"] + compiled * (5.0 if train else 2.0)
