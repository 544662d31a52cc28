"""A data set of one's own: `DIR/train/CLASS/*.jpg`, and optionally `DIR/val` and `DIR/test`.

The class names are those of the subfolders, in alphabetical order; images are cut and reduced to
32 x 32 pixels as `predict` does. The order of the images is that of their paths.
"""

import hashlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from allconv import images
from allconv.cifar100 import DataError
from allconv.errors import printable, say

LISTED = 10  # unreadable images that are named


@dataclass(frozen=True)
class ImageFolder:
    """What is known of a folder's data set without its images, as of `cifar100` and `demo`."""

    TITLE: str
    CLASSES: tuple[str, ...]

    @property
    def SUPERCLASSES(self) -> dict[str, tuple[str, ...]]:  # noqa: N802
        """Each class by itself: a folder has no superclasses."""
        return {name: (name,) for name in self.CLASSES}


def title(folder: str) -> str:
    """The folder's name, wherever it lies."""
    return printable(Path(folder).name) or "your images"


def describe(folder: str) -> ImageFolder:
    """The data set in a folder.

    Raises:
        DataError: there is none.
    """
    path = Path(folder)
    if not folder or not path.is_dir():
        raise DataError(f"data.folder is {folder or 'empty'}: no such folder")
    # where images are only evaluated, there may be no train
    split = next((s for s in ("train", "test") if (path / s).is_dir()), "train")
    return ImageFolder(title(folder), _classes(path / split))


def _classes(path: Path) -> tuple[str, ...]:
    from torchvision.datasets.folder import find_classes  # 1.2 s

    if not path.is_dir():
        raise DataError(f"no folder {path}: expected one with a subfolder of images for each class")
    try:
        names = tuple(name for name in find_classes(path)[0] if not name.startswith("."))
    except FileNotFoundError:  # no subfolder
        names = ()
    if len(names) < 2:
        found = f"only {names[0]}" if names else "none"
        raise DataError(
            f"{path}: expected a subfolder for each of at least 2 classes, found {found}"
        )
    for name in names:
        if not name.isprintable():
            raise DataError(f"{path}: the class name {name!a} is not printable text")
    return names


def load_file(
    file: str, folder: str, classes: tuple[str, ...], val_size: int = 5000, split_seed: int = 43
) -> dict[str, tuple[Tensor, Tensor]]:
    """The splits in DIR/test, or in DIR/train and DIR/val, as `cifar100.load_file` gives them.

    Args:
        file: "train" (for the splits train and val) or "test".
        folder: DIR.
        classes: the class names that the subfolders must have.
        val_size: without DIR/val, training images held out for validation; a fifth at most.
        split_seed: seed of that split alone.

    Raises:
        DataError: a folder is missing, has other classes, or has too few or unreadable images.
    """
    path = Path(folder)
    files, labels = _list(path / file, classes)
    if file == "test":
        return {"test": (_read(files), labels)}
    if (path / "val").is_dir():
        val_files, val_labels = _list(path / "val", classes)
        table = _read(files + val_files)  # both before anything is refused
        parts = table.split((len(files), len(val_files)))
        return {"train": (parts[0], labels), "val": (parts[1], val_labels)}
    if val_size and (
        single := [n for n, c in zip(classes, labels.bincount(), strict=True) if c < 2]
    ):
        raise DataError(
            f"{path / file / single[0]}: only 1 image, but validation needs one as well; add more, "
            f"{path / 'val'}, or --data.val_size 0"
        )
    table = _read(files)
    held_out = hold_out(labels.numpy(), val_size, split_seed)
    index = {"train": ~held_out, "val": held_out}
    # indexed as (N, 32, 32, 3), so that they stay channels last
    rows = table.permute(0, 2, 3, 1)
    return {split: (rows[i].permute(0, 3, 1, 2), labels[i]) for split, i in index.items()}


def hold_out(labels: np.ndarray, val_size: int, seed: int) -> torch.Tensor:
    """Which of the images with labels (N,) are for validation, as (N,) bool.

    `val_size`, but at most a fifth: as many of each class as far as they go, never above half.
    """
    n, counts = len(labels), np.bincount(labels)
    rng = np.random.RandomState(seed)  # its stream is frozen (NEP 19)
    order = rng.permutation(n)
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, random within
    turn = np.arange(n) - np.repeat(counts.cumsum() - counts, counts)  # 0, 1, ... in each class
    free = turn < np.repeat(counts // 2, counts)
    order, turn = order[free], turn[free]
    # the first of every class, then the second; of the last turn, random classes
    order = order[np.lexsort((rng.permutation(len(order)), turn))]
    found = np.zeros(n, bool)
    found[order[: min(val_size, max(1, n // 5))]] = True
    return torch.from_numpy(found)


def _list(path: Path, classes: tuple[str, ...]) -> tuple[list[str], Tensor]:
    """The image files of a split, sorted by class and path, and their labels (N,)."""
    from torchvision.datasets.folder import make_dataset  # 1.2 s

    found = _classes(path)
    if found != classes:
        missing, more = sorted({*classes} - {*found}), sorted({*found} - {*classes})
        say_missing = f"without {', '.join(missing[:5])}" if missing else ""
        say_more = f"with {', '.join(more[:5])}" if more else ""
        differs = " and ".join(filter(None, (say_missing, say_more)))
        raise DataError(f"{path}: its {len(found)} classes are not the {len(classes)}: {differs}")

    def is_image(file: str) -> bool:
        hidden = "/." in f"/{Path(file).relative_to(path).as_posix()}"
        return not hidden and Path(file).suffix.lower() in images.SUFFIXES

    numbers = {name: i for i, name in enumerate(classes)}
    pairs = make_dataset(path, numbers, is_valid_file=is_image, allow_empty=True)
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    if empty := [classes[i] for i in (labels.bincount(minlength=len(classes)) == 0).nonzero()]:
        more = f", nor in {len(empty) - 1} other classes" if empty[1:] else ""
        raise DataError(f"{path / empty[0]}: no images ({', '.join(images.FORMATS)}) in it{more}")
    return [file for file, _ in pairs], labels


def _read(files: list[str]) -> Tensor:
    """All images as (N, 3, 32, 32) uint8, channels last in memory."""
    table, bad = torch.empty(len(files), 32, 32, 3, dtype=torch.uint8), []
    for i, file in enumerate(_shown(files)):
        try:
            table[i] = images.reduce(images.read(file)).permute(1, 2, 0)
        except images.ImageError as error:
            bad.append(f"{file}: {error}")
    if bad:
        say(*bad[:LISTED])
        raise DataError(
            f"{len(bad):,} of {len(files):,} images cannot be read: mend or remove them"
        )
    return table.permute(0, 3, 1, 2)


def _shown(files: list[str]) -> Iterator[str]:
    """The files; at a terminal, with a progress bar if they take more than two seconds."""
    start = time.monotonic()
    for i, file in enumerate(files):
        if time.monotonic() - start > 2 and sys.stderr.isatty():
            shown = {"console": Console(stderr=True), "transient": True}
            yield from track(files[i:], "reading images", len(files), i, **shown)
            return
        yield file


def digest(splits: dict[str, tuple[Tensor, Tensor]]) -> str:
    """The sha256 of the images and labels of some splits."""
    found = hashlib.sha256()
    for table, labels in splits.values():
        found.update(table.permute(0, 2, 3, 1).contiguous().numpy())
        found.update(labels.numpy())
    return found.hexdigest()
