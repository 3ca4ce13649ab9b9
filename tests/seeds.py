"""Every random draw of the suite follows from one number: make test SEED=n."""

import os

import torch

SEED = int(os.environ.get("SEED") or 0)


def _shifted(n: int) -> int:
    return n + 1_000_003 * SEED


def generator(n: int) -> torch.Generator:
    """The generator that a test calls its n-th."""
    return torch.Generator().manual_seed(_shifted(n))


def seed(n: int) -> None:
    """As torch.manual_seed, for what draws from torch's own generator."""
    torch.manual_seed(_shifted(n))
