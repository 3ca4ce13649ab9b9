"""What is wrong with the tensors of a call, in words: looked for before a slow tier runs, and after a kernel has refused."""

import torch
from torch import Tensor

# In the order of ops.attention's parameters.
MODULE_NAMES = (
    "conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var",
    "conv_h.weight", "conv_h.bias", "conv_w.weight", "conv_w.bias",
)  # fmt: skip
FUNCTIONAL_NAMES = (
    "conv1_weight", "conv1_bias", "bn_weight", "bn_bias", "running_mean", "running_var",
    "conv_h_weight", "conv_h_bias", "conv_w_weight", "conv_w_bias",
)  # fmt: skip


def map_size(x: Tensor) -> None:
    """Raises ValueError unless x is [N, C, H, W], RuntimeError where H or W is 0."""
    shape = list(x.shape)
    if len(shape) != 4:
        raise ValueError(f"x has shape {shape}, expected four dimensions: [N, C, H, W]")
    if 0 in shape[2:]:
        raise RuntimeError(f"x has shape {shape}, expected [N, C, H, W] with H and W of at least 1")


def not_a_map(x) -> None:
    """Raises TypeError unless x is a tensor, or stands for one as in torch.fx."""
    if not isinstance(x, Tensor) and not hasattr(type(x), "__torch_function__"):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor [N, C, H, W]")


def parameters(x: Tensor, tensors: tuple, names: tuple, autocast: bool, broadcast: bool = False) -> None:
    """Raises RuntimeError for the first of the tensors (None: absent) whose shape, device or dtype does not go with x.

    Under autocast any dtypes go together; with broadcast, so do gates of one channel and maps of one channel.
    """
    c = x.shape[1]
    w1, wh = tensors[0], tensors[6]
    if w1 is not None:
        if w1.dim() == 4 and w1.shape[1] != c:
            shapes = f"x has {c} channels (shape {list(x.shape)}), {names[0]} takes {w1.shape[1]} (shape {list(w1.shape)})"
            raise RuntimeError(shapes)
    m = w1.shape[0] if w1 is not None else None
    gates = wh.shape[0] if broadcast and wh is not None and 1 in (c, wh.shape[0]) else c
    expected = [(m, c, 1, 1), *[(m,)] * 5, *[(gates, m, 1, 1), (gates,)] * 2]
    for name, tensor, shape in zip(names, tensors, expected, strict=True):
        if tensor is None:
            continue
        if len(tensor.shape) != len(shape) or any(e not in (None, n) for e, n in zip(shape, tensor.shape, strict=True)):
            wanted = ", ".join("M" if size is None else str(size) for size in shape)
            raise RuntimeError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}] for x of shape {list(x.shape)}")
        if tensor.device != x.device:
            raise RuntimeError(f"{name} is on {tensor.device}, x is on {x.device}: move one of them")
        allowed = {x.dtype}
        if x.dtype in (torch.bfloat16, torch.float16) and len(shape) == 1:
            allowed.add(torch.float32)
        if not autocast and tensor.dtype not in allowed:
            raise RuntimeError(
                f"{name} is {tensor.dtype}, x is {x.dtype}: convert one of them, or call under torch.autocast for x in half"
            )
