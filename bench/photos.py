"""Real photographs that come inside PyPI packages, as normalised 224 x 224 batches. Nothing is downloaded."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Package, folder inside it, photographs.
SOURCES = (
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
    ("skimage", "data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def paths() -> list[Path]:
    """The photographs found on this machine; raises ``FileNotFoundError`` when no package has any."""
    found = []
    for package, folder, names in SOURCES:
        spec = importlib.util.find_spec(package)  # the folder is all that is needed: no import
        if spec and spec.submodule_search_locations:
            root = Path(spec.submodule_search_locations[0]) / folder
            found += [root / name for name in names if (root / name).exists()]
    if not found:
        raise FileNotFoundError("no photographs: install scikit-learn (and scikit-image for more of them)")
    return found


def crop(photo: Image.Image, size: int, chooser: random.Random | None) -> np.ndarray:
    """A square of ``size`` pixels: the middle of the photograph, or with ``chooser`` a random crop, half of
    them flipped."""
    scale = size * (256 / 224 if chooser is None else chooser.uniform(1.1, 2.0)) / min(photo.size)
    resized = photo.resize([round(side * scale) for side in photo.size], Image.Resampling.BICUBIC)
    spare = [side - size for side in resized.size]
    left, top = (
        [side // 2 for side in spare] if chooser is None else [chooser.randint(0, side) for side in spare]
    )
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)))
    return pixels[:, ::-1] if chooser and chooser.random() < 0.5 else pixels


def batch(count: int, size: int = 224) -> Tensor:
    """``[count, 3, size, size]`` float32: the middle of every photograph, then random crops of them
    (seeded)."""
    photos = [Image.open(path).convert("RGB") for path in paths()]
    chooser = random.Random(0)
    crops = [
        crop(photos[index % len(photos)], size, None if index < len(photos) else chooser)
        for index in range(count)
    ]
    values = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    shape = (1, 3, 1, 1)
    return ((values - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)).contiguous()
