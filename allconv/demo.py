"""A drawn data set for a first run without a download, and for the tests: 10 shapes in 10 colours.

100 classes of 32 x 32 pictures in CIFAR-100's binary form; nothing in it comes from CIFAR-100.
Only sums, products and comparisons are used, so that it is the same on every machine.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

FOLDER = "cifar-100-demo"
EACH = {"train": 40, "test": 10}  # pictures of a class
SEED = {"train": 1, "test": 2}

COLOURS = {
    "red": (210, 40, 40),
    "orange": (235, 130, 30),
    "yellow": (235, 220, 60),
    "green": (50, 160, 60),
    "cyan": (70, 200, 210),
    "blue": (45, 70, 200),
    "violet": (130, 60, 180),
    "pink": (240, 140, 190),
    "brown": (120, 75, 40),
    "white": (240, 240, 240),
}

# Membership of points (u, v) in units of the shape's radius: u to the right, v down.
SHAPES = {
    "disc": lambda u, v: u**2 + v**2 < 1,
    "ring": lambda u, v: (u**2 + v**2 < 1) & (u**2 + v**2 > 0.35),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.85,
    "frame": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.9) & (np.maximum(abs(u), abs(v)) > 0.5),
    "diamond": lambda u, v: abs(u) + abs(v) < 1.1,
    "plus": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 1),
    "cross": lambda u, v: (abs(abs(u) - abs(v)) < 0.35) & (np.maximum(abs(u), abs(v)) < 0.9),
    "triangle": lambda u, v: (v < 0.8) & (v > 2 * abs(u) - 1),
    "bars": lambda u, v: (np.maximum(abs(u), abs(v)) < 1) & (np.floor(2.5 * (u + 1)) % 2 == 0),
    "stripes": lambda u, v: (np.maximum(abs(u), abs(v)) < 1) & (np.floor(2.5 * (v + 1)) % 2 == 0),
}
GROUPS = {shape: tuple(f"{colour}_{shape}" for colour in COLOURS) for shape in SHAPES}
CLASSES = tuple(name for names in GROUPS.values() for name in names)


def pictures(split: str) -> np.ndarray:
    """All pictures of "train" or "test" as (N, 3074) uint8 records of CIFAR-100's binary form."""
    # RandomState: its stream is frozen (NEP 19)
    rng = np.random.RandomState(SEED[split])
    n = EACH[split]
    y, x = np.mgrid[:32, :32]
    records = []
    for label, name in enumerate(CLASSES):
        colour, shape = name.split("_")
        radius = rng.uniform(6, 12, (n, 1, 1))
        centre = rng.uniform(11, 21, (2, n, 1, 1))
        inside = SHAPES[shape]((x - centre[0]) / radius, (y - centre[1]) / radius)[:, None]
        paint = np.array(COLOURS[colour])[None, :, None, None] + rng.randint(-30, 31, (n, 3, 1, 1))
        ground = rng.randint(0, 256, (n, 3, 1, 1))  # (n, 3, 1, 1)
        noise = rng.randint(-40, 41, (n, 3, 32, 32))
        drawn = np.clip(np.where(inside, paint, ground) + noise, 0, 255).astype(np.uint8)
        head = np.full((n, 2), (label // 5, label), np.uint8)
        records.append(np.concatenate([head, drawn.reshape(n, -1)], axis=1))
    return np.concatenate(records)


def draw(folder: Path) -> None:
    """Write `train.bin` and `test.bin` into `folder` unless they are there."""
    for split in EACH:
        path = folder / f"{split}.bin"
        if path.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(pictures(split).tobytes())
        os.replace(file.name, path)
