"""What is measured: one CoordAtt call, with its shape, mode, dtype, layout and device."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from bench.attention import PlainCoordAtt, randomise

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("eval", "train")
# Full-size tensors a call has to move: x twice and out once forward; g, x, g again and dx backward.
TENSORS_MOVED = {"eval": 3, "train": 7}


@dataclass(frozen=True)
class Case:
    """One CoordAtt call. ``count`` is how often the network has this shape."""

    shape: tuple[int, int, int, int]
    mode: str = "eval"
    dtype: str = "float32"
    layout: str = "nchw"
    device: str = "cpu"
    count: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON gives a list

    @property
    def name(self) -> str:
        return "x".join(str(size) for size in self.shape)

    @property
    def output_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def bytes_moved(self) -> int:
        """Bytes of full-size tensors the call has to move, the two-pass algorithm counted (not measured)."""
        return TENSORS_MOVED[self.mode] * self.output_bytes

    def tensor(self, seed: int) -> Tensor:
        """Standard normal numbers in this case's shape, dtype, layout and device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(self.shape, generator=generator, device=self.device)
        return values.to(self.device, DTYPES[self.dtype]).contiguous(memory_format=LAYOUTS[self.layout])

    def place(self, module: nn.Module) -> nn.Module:
        """The module in this case's mode, dtype, layout and device."""
        module = module.to(self.device, DTYPES[self.dtype], memory_format=LAYOUTS[self.layout])
        return module.train(self.mode == "train")

    def plain(self) -> PlainCoordAtt:
        """The published block with seeded weights and non-trivial statistics."""
        channels = self.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(channels)
            module = PlainCoordAtt(channels, channels)
        return self.place(randomise(module))

    def as_dict(self) -> dict:
        return asdict(self)
