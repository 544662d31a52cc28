"""A synthetic data set for a first run without a download, and for the tests.

10 shapes in 10 colors make 100 classes of 32 x 32 images, in CIFAR-100's binary form. It is drawn
with sums, products and comparisons only, so that it is the same on every machine.
"""

import numpy as np

from allconv.datasets.cifar100 import DataError, Official, read_binary
from allconv.rundir import write_atomic

FOLDER = "cifar-100-demo"
PER_CLASS = {"train": 40, "test": 10}
SEED = {"train": 1, "test": 2}

COLORS = {
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

# Whether a shape contains the point (u, v), in units of its radius: u to the right, v down.
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
SUPERCLASSES = {shape: tuple(f"{color}_{shape}" for color in COLORS) for shape in SHAPES}
CLASSES = tuple(name for names in SUPERCLASSES.values() for name in names)


def records(split: str) -> np.ndarray:
    """All images of "train" or "test" as (N, 3074) uint8 records of CIFAR-100's binary form."""
    # RandomState: its stream is frozen (NEP 19)
    rng = np.random.RandomState(SEED[split])
    n = PER_CLASS[split]
    y, x = np.mgrid[:32, :32]
    found = []
    for label, name in enumerate(CLASSES):
        color, shape = name.split("_")
        radius = rng.uniform(6, 12, (n, 1, 1))
        center = rng.uniform(11, 21, (2, n, 1, 1))
        inside = SHAPES[shape]((x - center[0]) / radius, (y - center[1]) / radius)[:, None]
        paint = np.array(COLORS[color])[None, :, None, None] + rng.randint(-30, 31, (n, 3, 1, 1))
        ground = rng.randint(0, 256, (n, 3, 1, 1))
        noise = rng.randint(-40, 41, (n, 3, 32, 32))
        drawn = np.clip(np.where(inside, paint, ground) + noise, 0, 255).astype(np.uint8)
        head = np.full((n, 2), (label // 5, label), np.uint8)
        found.append(np.concatenate([head, drawn.reshape(n, -1)], axis=1))
    return np.concatenate(found)


class Demo(Official):
    """The demo set, in a subfolder of `path`."""

    title, classes, superclasses = "the demo set (not CIFAR-100)", CLASSES, SUPERCLASSES
    small = True

    def prepare(self) -> None:
        """Draw what is missing."""
        for file in PER_CLASS:
            path = self.path / FOLDER / f"{file}.bin"
            if not path.exists():
                write_atomic(path, lambda out, file=file: out.write(records(file).tobytes()))

    def _read(self, file: str) -> np.ndarray:
        path = self.path / FOLDER / f"{file}.bin"
        found = read_binary(path)
        if file == "train" and len(found) < 500:
            raise DataError(f"{path}: under 500 images; delete it, and it is drawn again")
        return found
