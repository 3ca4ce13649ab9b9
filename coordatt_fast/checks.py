"""What is wrong with a call's tensors, in words: before a slow tier runs, and after a kernel has refused."""

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


def output(out: Tensor, x: Tensor) -> None:
    """Raises RuntimeError unless out can take the result of a call on x."""
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        have = f"{list(out.shape)}, {out.dtype} on {out.device}"
        raise RuntimeError(f"out is {have}, expected as x: {list(x.shape)}, {x.dtype} on {x.device}")


def epsilon(eps: float, batch: bool) -> None:
    """Raises ValueError for an eps below zero or, under batch statistics, of zero, as F.batch_norm does."""
    if eps < 0 or (batch and eps == 0):
        wanted = "a positive number under batch statistics" if batch else "zero or a positive number"
        raise ValueError(f"eps of the normalisation is {eps}, expected {wanted}")


def _has_no_memory(t: Tensor) -> bool:
    """Whether its storage was resized to nothing."""
    try:
        return (t.is_cpu or t.is_cuda) and t.numel() > 0 and t.data_ptr() == 0
    except RuntimeError:  # a wrapped tensor, or one of another layout
        return False


def parameters(x: Tensor, tensors: tuple, names: tuple, autocast: bool, broadcast: bool = False) -> None:
    """Raises RuntimeError for the first of the tensors whose shape, device or dtype does not go with x, or
    which has no memory.

    tensors and names are in the order above, an absent tensor is None. Under autocast any dtypes go together;
    with broadcast, so do gates of one channel and maps of one channel. As in PyTorch the normalisation's
    weight and bias may have their M elements in any shape.
    """
    c, size = x.shape[1], list(x.shape)
    w1, wh = tensors[0], tensors[6]
    if w1.dim() == 4 and w1.shape[1] != c:
        takes = f"{names[0]} {list(w1.shape)} takes {w1.shape[1]}"
        raise RuntimeError(f"x has {c} channels (shape {size}), {takes}")
    m, o = (t.shape[0] if t.dim() else 0 for t in (w1, wh))
    o = o if broadcast and 1 in (c, o) else c
    shapes = [[m, c, 1, 1], [m], [m], [m], [m], [m], [o, m, 1, 1], [o], [o, m, 1, 1], [o]]
    half = x.dtype in (torch.bfloat16, torch.float16)
    for i, (name, tensor, shape) in enumerate(zip(names, tensors, shapes)):
        if tensor is None:
            continue
        fits = tensor.numel() == m if i in (2, 3) else list(tensor.shape) == shape
        if not fits:
            raise RuntimeError(
                f"{name} has shape {list(tensor.shape)}, expected {shape} for x of shape {size}"
            )
        if tensor.device != x.device:
            raise RuntimeError(f"{name} is on {tensor.device}, x is on {x.device}: move one of them")
        if _has_no_memory(tensor):
            raise RuntimeError(f"{name} has {tensor.numel()} elements, but its storage is empty")
        wide = half and len(shape) == 1 and tensor.dtype == torch.float32
        if not (autocast or wide or tensor.dtype == x.dtype):
            wanted = "convert one of them, or call under torch.autocast for x in half precision"
            raise RuntimeError(f"{name} is {tensor.dtype}, x is {x.dtype}: {wanted}")


def convolution(x: Tensor, weight: Tensor, name: str, groups: int, autocast: bool) -> None:
    """Raises RuntimeError where a convolution with this weight does not take a map like x."""
    if x.shape[1] != weight.shape[1] * groups:
        takes = f"{name} {list(weight.shape)} takes {weight.shape[1] * groups}"
        raise RuntimeError(f"x has {x.shape[1]} channels (shape {list(x.shape)}), {takes}")
    if weight.device != x.device:
        raise RuntimeError(f"{name} is on {weight.device}, x is on {x.device}: move one of them")
    if weight.dtype != x.dtype and not autocast:
        raise RuntimeError(f"{name} is {weight.dtype}, x is {x.dtype}: convert one of them")
