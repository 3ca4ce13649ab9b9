"""Everything ``coordatt_fast`` is measured against, and how each is built from the same weights."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import coordatt_fast
from bench.attention import MeanCoordAtt
from bench.cases import Case

OURS = "ours"
OURS_OUT = "ours-out"
CLONE = "clone"


@dataclass(frozen=True)
class Rival:
    """``label`` stands in tables and plots, ``meaning`` in the legend."""

    label: str
    meaning: str


RIVALS = {
    "eager": Rival("eager", "the published module in plain PyTorch"),
    "mean": Rival("eager mean()", "the published module with mean() for the pools, uncompiled"),
    "compile": Rival("compile", "torch.compile of the published module"),
    "compile-mean": Rival("compile mean()", "torch.compile of the mean() rewrite"),
    "compile-max": Rival("compile max", "torch.compile of the mean() rewrite, max-autotune"),
    "onnxruntime": Rival(
        "ONNX Runtime", "the published module exported to onnxruntime; float32 NCHW inference on a CPU only"
    ),
    "openvino": Rival("OpenVINO", "the same ONNX file, computed in float32; NCHW inference on a CPU only"),
}
ANY_COMPILED = ("compile", "compile-mean", "compile-max")
FOREIGN = ("onnxruntime", "openvino")
DEFAULT_RIVALS = ("eager", "compile", "compile-mean", "onnxruntime", "openvino")

Function = Callable[[Tensor], Tensor]


def takes_part(name: str, case: Case) -> bool:
    """The foreign runtimes only take part in what they are made for."""
    plain_inference = (case.mode, case.device, case.dtype, case.layout) == ("eval", "cpu", "float32", "nchw")
    return name not in FOREIGN or plain_inference


def ours(plain: nn.Module, case: Case) -> nn.Module:
    channels = case.shape[1]
    module = coordatt_fast.CoordAtt(channels, channels)
    module.load_state_dict(plain.state_dict())
    return case.place(module)


def ours_out(plain: nn.Module, case: Case) -> Function:
    """The functional form writing into one buffer: our counterpart of runtimes that reuse their outputs."""
    out = torch.empty_like(case.tensor(0))
    conv1, bn, conv_h, conv_w = plain.conv1, plain.bn1, plain.conv_h, plain.conv_w
    weights = [
        tensor.detach()
        for tensor in (
            conv1.weight,
            conv1.bias,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            conv_h.weight,
            conv_h.bias,
            conv_w.weight,
            conv_w.bias,
        )
    ]
    return lambda x: coordatt_fast.coord_att(x, *weights, eps=bn.eps, out=out)


def local(name: str, plain: nn.Module, case: Case) -> tuple[Function, nn.Module]:
    """A rival that runs in this process: the function to call and the module that owns its parameters."""
    if name == OURS:
        module = ours(plain, case)
        return module, module
    if name == OURS_OUT:
        return ours_out(plain, case), plain
    module = copy.deepcopy(plain)
    if name in ("mean", "compile-mean", "compile-max"):
        rewritten = MeanCoordAtt(case.shape[1], case.shape[1])
        rewritten.load_state_dict(plain.state_dict())
        module = case.place(rewritten)
    if name in ANY_COMPILED:
        mode = "max-autotune-no-cudagraphs" if name == "compile-max" else "default"
        return torch.compile(module, dynamic=False, fullgraph=True, mode=mode), module
    return module, module


def export(plain: nn.Module, x: Tensor, path: Path) -> None:
    """Write ``plain`` as ONNX with input ``x`` and output ``y``, shapes fixed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copy.deepcopy(plain),
            (x,),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["y"],
        )
