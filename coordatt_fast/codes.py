"""The integers that the operators of csrc/bindings.h take for names. Imports nothing: all may import it.

Activations have theirs by their order in reference.ACTIVATIONS.
"""

# Norm of csrc/coordatt.h: none; by given statistics; by those of the batch.
NORM_NONE, NORM_GIVEN, NORM_BATCH = 0, 1, 2

# attend_backward's needs, Need of csrc/coordatt.h: a bit for each of its results, in their order.
GRADIENTS = (
    "x",
    "conv1_weight",
    "conv1_bias",
    "bn_weight",
    "bn_bias",
    "conv_h_weight",
    "conv_h_bias",
    "conv_w_weight",
    "conv_w_bias",
)
NEEDS_X, NEEDS_CONV1_WEIGHT = 1 << 0, 1 << 1
NEEDS_CONV_H, NEEDS_CONV_W = 1 << 5 | 1 << 6, 1 << 7 | 1 << 8  # a weight and its bias are made together
NEEDS_ALL = (1 << len(GRADIENTS)) - 1
NEEDS_PARAMETERS = NEEDS_ALL & ~NEEDS_X
