"""Step one: real photographs through MobileNetV2-1.0 with no attention, SE, plain CoordAtt and ours, without
and with what stands before it."""

import copy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import coordatt_fast
from bench import checks, photos
from bench.attention import PlainCoordAtt, SqueezeExcite, parameter_count, settle_statistics
from bench.cases import DTYPES, LAYOUTS
from bench.instances import Effort, explain
from coordatt_fast.interleaved import Local, Race, race
from coordatt_fast.models import mobilenet_v2_ca

NONE, SE, PLAIN, OURS, NEIGHBOURS = "none", "se", "plain", "ours", "neighbours"
LABELS = {
    NONE: "no attention",
    SE: "SE",
    PLAIN: "CoordAtt, plain PyTorch",
    OURS: "CoordAtt, coordatt_fast",
    NEIGHBOURS: "with neighbours",
}
CHECKED_IMAGES = 4
# Which activations fall on which side of a kink is luck: plain PyTorch's error is the largest over this many
# copies of the photographs that differ by one rounding.
NUDGED = 8
# Relative error (norm over norm) accepted whatever plain PyTorch's is. A deep network amplifies rounding, and
# an activation that rounds to the other side of a ReLU6 kink changes its gradient outright: plain PyTorch
# itself is up to a percent off in float32. So ours is also compared in float64, where almost nothing is left
# of that.
FLOOR = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2, torch.float64: 1e-10}


@dataclass(frozen=True)
class NetworkCase:
    """The network at one batch size."""

    batch: int
    mode: str = "eval"
    dtype: str = "float32"
    layout: str = "nchw"
    device: str = "cpu"
    size: int = 224

    @property
    def name(self) -> str:
        return f"MobileNetV2-1.0 {self.mode}, batch {self.batch}"

    @property
    def largest_tensor(self) -> int:
        """Bytes of the widest activation: 96 channels at half the input's side."""
        return self.batch * 96 * (self.size // 2) ** 2 * DTYPES[self.dtype].itemsize

    def place(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device, DTYPES[self.dtype], memory_format=LAYOUTS[self.layout])
        return model.train(self.mode == "train")

    def images(self, count: int) -> Tensor:
        values = photos.batch(count, self.size)
        return values.to(self.device, DTYPES[self.dtype]).contiguous(memory_format=LAYOUTS[self.layout])


def square(block: type[nn.Module]):
    """A CoordAtt class as a factory of one channel count."""
    return lambda channels: block(channels, channels)


ATTENTION = {
    NONE: None,
    SE: SqueezeExcite,
    PLAIN: square(PlainCoordAtt),
    OURS: square(coordatt_fast.CoordAtt),
}


def networks(case: NetworkCase) -> dict[str, nn.Module]:
    """The networks, seeded, statistics settled on the photographs; plain and ours have the same weights.

    In the last one accelerate has the blocks take in the normalisation and activation before them.
    """
    models = {}
    images = photos.batch(CHECKED_IMAGES, case.size)
    for name in (NONE, SE, PLAIN):
        torch.manual_seed(0)
        models[name] = mobilenet_v2_ca(attention=ATTENTION[name], dropout=0.0)
        settle_statistics(models[name], images)
    models[OURS] = mobilenet_v2_ca(attention=ATTENTION[OURS], dropout=0.0)
    models[OURS].load_state_dict(models[PLAIN].state_dict())
    models[NEIGHBOURS] = copy.deepcopy(models[OURS])
    coordatt_fast.accelerate(models[NEIGHBOURS])
    return {name: case.place(model) for name, model in models.items()}


def labels(count: int, device: torch.device) -> Tensor:
    return (torch.arange(count, device=device) * 37) % 1000


def gradients(model: nn.Module, images: Tensor) -> Tensor:
    """All parameter gradients of one training step, as one vector."""
    loss = F.cross_entropy(model(images), labels(len(images), images.device))
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


def compute(model: nn.Module, images: Tensor, mode: str) -> Tensor:
    """What the check compares: the logits, or the gradients of one training step. Leaves the model as it
    was."""
    model = copy.deepcopy(model)
    if mode == "train":
        return gradients(model, images)
    with torch.inference_mode():
        return model(images)


def nudged(images: Tensor, seed: int) -> Tensor:
    """The images with up to one rounding error of their dtype in every pixel."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = images.cpu().double()
    moved = exact * (1 + torch.finfo(images.dtype).eps * (2 * noise - 1))
    return torch.empty_like(images).copy_(moved)


def agreement(models: dict[str, nn.Module], case: NetworkCase) -> dict:
    """Errors of plain PyTorch and of ours against the same network in float64, and of ours in float64.

    Errors are norms relative to the norm of the truth; ours the largest of our networks'.
    """
    images = case.images(CHECKED_IMAGES)

    def result(name: str, images: Tensor) -> Tensor:
        return compute(models[name], images, case.mode).cpu().double()

    own = [name for name in (OURS, NEIGHBOURS) if name in models]
    found = {name: result(name, images) for name in (PLAIN, *own)}
    others = [result(PLAIN, nudged(images, seed)) for seed in range(1, NUDGED)]
    in_double = {
        name: compute(copy.deepcopy(models[name]).to("cpu", torch.float64), images.cpu().double(), case.mode)
        for name in (PLAIN, *own)
    }
    exact = in_double[PLAIN]

    def error(value: Tensor) -> float:
        return ((value - exact).norm() / exact.norm()).item()

    plain_error = max(map(error, [found[PLAIN], *others]))
    our_error, in_double_error = (max(error(of[name]) for name in own) for of in (found, in_double))
    allowed = max(checks.OWN_FACTOR * plain_error, FLOOR[DTYPES[case.dtype]])
    return {
        "what": "gradients of one training step" if case.mode == "train" else "outputs",
        "images": len(images),
        "plain_error": plain_error,
        "our_error": our_error,
        "allowed": allowed,
        "float64_error": in_double_error,
        "float64_allowed": FLOOR[torch.float64],
        "largest_difference": max((found[PLAIN] - found[name]).abs().max().item() for name in own),
        "largest_value": exact.abs().max().item(),
        "passed": our_error <= allowed and in_double_error <= FLOOR[torch.float64],
    }


def contestant(model: nn.Module, images: Tensor, mode: str) -> Local:
    """Timed: inference, or forward, loss and backward (no optimiser)."""
    synchronise = torch.cuda.synchronize if images.is_cuda else None
    if mode == "eval":
        return Local(lambda: model(images), torch.inference_mode, synchronise)
    target = labels(len(images), images.device)
    parameters = list(model.parameters())
    return Local(
        lambda: torch.autograd.grad(F.cross_entropy(model(images), target), parameters),
        synchronise=synchronise,
    )


def timings(models: dict[str, nn.Module], images: Tensor, mode: str, effort: Effort) -> Race:
    """The models interleaved, each doing the same work."""
    return race(
        {name: contestant(model, images, mode) for name, model in models.items()},
        rounds=effort.rounds,
        limit=effort.seconds,
        block=effort.block,
    )


def measure(case: NetworkCase, effort: Effort) -> dict:
    """Check, then time the networks against each other; plain data, ready for JSON.

    ``images_per_second`` and ``cost`` (of the attention, as a share of the network without it) are missing
    where the check failed.
    """
    models = networks(case)
    checked = agreement(models, case)
    images = case.images(case.batch)
    attention = next(
        module for module in models[OURS].modules() if isinstance(module, coordatt_fast.CoordAtt)
    )
    sample = torch.zeros(case.batch, attention.conv1.in_channels, case.size // 4, case.size // 4)
    sample = sample.to(case.device, DTYPES[case.dtype]).contiguous(memory_format=LAYOUTS[case.layout])
    result = {
        "kind": "network",
        "case": asdict(case),
        "name": case.name,
        "agreement": checked,
        "images_per_second": {},
        "cost": {},
        "parameters": {name: parameter_count(model) for name, model in models.items()},
        "plan": explain(attention, sample, case.mode == "train"),
        "photographs": [path.name for path in photos.paths()],
    }
    if not checked["passed"]:
        return result
    timed = timings(models, images, case.mode, effort)
    for name in models:
        result["images_per_second"][name] = case.batch / timed.seconds(name).median
        result["cost"][name] = 1 / timed.speedup(name, NONE).median - 1
    result["seconds"] = {name: asdict(timed.seconds(name)) for name in models}
    result["speedup"] = asdict(timed.speedup(NEIGHBOURS, PLAIN))
    result["rounds"] = len(timed.rounds[OURS])
    return result
