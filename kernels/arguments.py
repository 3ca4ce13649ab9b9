"""What a launch gives each kernel beside constants: a NamedTuple per kernel, its first parameters in order.

Absent tensors are None. *_image: elements between a map's images. entries.py refuses names that are not the
kernel's own.
"""

from typing import NamedTuple

from torch import Tensor


class Pool(NamedTuple):
    x_ptr: Tensor
    means_ptr: Tensor
    w1_ptr: Tensor | None
    partial_ptr: Tensor | None
    x_image: int


class Stats(NamedTuple):
    partial_ptr: Tensor
    b1_ptr: Tensor | None
    squeezed_ptr: Tensor
    stats_ptr: Tensor
    rows: int


class Gate(NamedTuple):
    """From stats_ptr on: in training alone."""

    x_ptr: Tensor
    out_ptr: Tensor
    gates_ptr: Tensor
    z_ptr: Tensor
    b1_ptr: Tensor | None
    gamma_ptr: Tensor | None
    beta_ptr: Tensor | None
    mean_ptr: Tensor | None
    var_ptr: Tensor | None
    eps: float
    wh_ptr: Tensor
    bh_ptr: Tensor | None
    ww_ptr: Tensor
    bw_ptr: Tensor | None
    x_image: int
    out_image: int
    rows: int
    stats_ptr: Tensor | None = None
    saved_mean_ptr: Tensor | None = None
    saved_var_ptr: Tensor | None = None
    blocks_of_rows: int = 1
    running_mean_ptr: Tensor | None = None
    running_var_ptr: Tensor | None = None
    tracked_ptr: Tensor | None = None
    momentum: float = 0.0
    mean_step: int = 0
    var_step: int = 0


class Update(NamedTuple):
    running_mean_ptr: Tensor | None
    running_var_ptr: Tensor | None
    tracked_ptr: Tensor | None
    mean_ptr: Tensor
    var_ptr: Tensor
    rows: int
    momentum: float
    mean_step: int
    var_step: int


class Reduce(NamedTuple):
    g_ptr: Tensor
    x_ptr: Tensor
    gates_ptr: Tensor
    ds_ptr: Tensor
    wh_ptr: Tensor
    ww_ptr: Tensor
    partial_ptr: Tensor
    g_image: int
    x_image: int


class MixBackward(NamedTuple):
    partial_ptr: Tensor
    squeezed_ptr: Tensor
    du_ptr: Tensor
    sums_ptr: Tensor
    mean_ptr: Tensor
    var_ptr: Tensor
    gamma_ptr: Tensor | None
    beta_ptr: Tensor | None
    eps: float
    rows: int


class Weights(NamedTuple):
    """splits_*: parts that the rows, the columns and both are taken in; 0: that gradient is not wanted."""

    ds_ptr: Tensor
    means_ptr: Tensor
    du_ptr: Tensor
    squeezed_ptr: Tensor
    sums_ptr: Tensor
    mean_ptr: Tensor
    var_ptr: Tensor
    gamma_ptr: Tensor | None
    beta_ptr: Tensor | None
    eps: float
    parts_ptr: Tensor | None
    dwh_ptr: Tensor | None
    dbh_ptr: Tensor | None
    dww_ptr: Tensor | None
    dbw_ptr: Tensor | None
    dw1_ptr: Tensor | None
    db1_ptr: Tensor | None
    dgamma_ptr: Tensor | None
    dbeta_ptr: Tensor | None
    images: int
    rows: int
    blocks_of_rows: int
    splits_h: int
    splits_w: int
    splits_1: int


class Spread(NamedTuple):
    """planes: programs that make dx; splits_* as in Weights."""

    grad_ptr: Tensor
    dx_ptr: Tensor | None
    gates_ptr: Tensor
    dp_ptr: Tensor
    du_ptr: Tensor
    squeezed_ptr: Tensor
    sums_ptr: Tensor
    mean_ptr: Tensor
    var_ptr: Tensor
    gamma_ptr: Tensor | None
    w1_ptr: Tensor
    eps: float
    parts_ptr: Tensor | None
    dwh_ptr: Tensor | None
    dbh_ptr: Tensor | None
    dww_ptr: Tensor | None
    dbw_ptr: Tensor | None
    dw1_ptr: Tensor | None
    grad_image: int
    dx_image: int
    rows: int
    blocks_of_rows: int
    planes: int
    splits_h: int
    splits_w: int
    splits_1: int


class PoolBackward(NamedTuple):
    grad_ptr: Tensor
    dx_ptr: Tensor
    grad_image: int
    grad_channel: int
    grad_line: int
    dx_image: int


class GateLogits(NamedTuple):
    """h_*, w_*: the steps of the logits of rows and of columns."""

    x_ptr: Tensor
    out_ptr: Tensor
    gates_ptr: Tensor
    s_h_ptr: Tensor
    s_w_ptr: Tensor
    x_image: int
    out_image: int
    h_image: int
    h_channel: int
    h_line: int
    w_image: int
    w_channel: int
    w_line: int


class GateBackward(NamedTuple):
    """As GateLogits."""

    g_ptr: Tensor
    x_ptr: Tensor
    dx_ptr: Tensor
    gates_ptr: Tensor
    ds_ptr: Tensor
    s_h_ptr: Tensor
    s_w_ptr: Tensor
    g_image: int
    x_image: int
    dx_image: int
    h_image: int
    h_channel: int
    h_line: int
    w_image: int
    w_channel: int
    w_line: int
