"""A small network learns handwritten digits, once with the paper's block and once with ours, from the same
start.
"""

import functools

import pytest
import seeds
import torch
from paper import PaperCoordAtt
from torch import nn

from coordatt_fast import CoordAtt

sklearn_datasets = pytest.importorskip("sklearn.datasets")
STEPS, BATCH = 100, 64


def digits(dtype):
    """1797 images of 8 x 8 from scikit-learn, which ships them."""
    bunch = sklearn_datasets.load_digits()
    images = torch.tensor(bunch.images, dtype=dtype)[:, None] / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=seeds.generator(0))
    images, labels = images[order], labels[order]
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def network(block, dtype, layout):
    seeds.seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        block(16, 16),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.SiLU(),
        block(24, 24),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )
    return net.to(dtype=dtype, memory_format=layout)


@functools.cache
def train(block, dtype, layout, backend=None):
    """Loss of each step and the final accuracy on images not trained on. backend only keeps results apart."""
    (images, labels), (test_images, test_labels) = digits(dtype)
    net = network(block, dtype, layout)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    order = seeds.generator(1)
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(labels), (BATCH,), generator=order)
        loss = nn.functional.cross_entropy(net(images[batch].contiguous(memory_format=layout)), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    net.eval()
    with torch.no_grad():
        right = (net(test_images).argmax(1) == test_labels).double().mean().item()
    return torch.tensor(losses, dtype=torch.float64), right


# Two runs of the paper's own block that differ only in memory format, or in how the pools sum, part by
# 1.5e-15 in float64 and by 4.5e-7 in float32 over these steps. Twenty times that and more is left for another
# machine's convolutions.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_loss_curves_coincide(backend, dtype, layout):
    theirs, their_accuracy = train(PaperCoordAtt, dtype, layout)
    ours, our_accuracy = train(CoordAtt, dtype, layout, backend)
    gap = (ours - theirs).abs().max().item()
    assert gap <= BOUND[dtype], (
        f"loss curves part by {gap:.2g} at step {(ours - theirs).abs().argmax().item()}"
    )
    assert theirs[-10:].mean() < 0.2 * theirs[0]
    assert our_accuracy > 0.9 and their_accuracy > 0.9, (our_accuracy, their_accuracy)
    if dtype is torch.float64:
        assert our_accuracy == their_accuracy
