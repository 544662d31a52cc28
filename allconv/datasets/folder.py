"""Your own images: `DIR/train/CLASS/*.jpg`, and optionally `DIR/val` and `DIR/test`.

The subfolders' names are the classes, in alphabetical order. Images are cropped and reduced to
32 x 32 pixels as in `predict`, and sorted by path.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from allconv.datasets import images
from allconv.datasets.cifar100 import DataError, Images
from allconv.errors import printable, say

LISTED = 10  # unreadable images that an error names


@dataclass(frozen=True)
class ImageFolder:
    """The images in a folder; made by `at`.

    Attributes:
        title: the folder's name without its location.
        classes: the class names.
        path: DIR.
    """

    title: str
    classes: tuple[str, ...]
    path: Path = field(compare=False)

    @classmethod
    def at(cls, folder: str, classes: Sequence[str] | None = None) -> "ImageFolder":
        """The data set in a folder, which also tells the classes unless they are given."""
        path = Path(folder)
        if classes is None:
            if not folder or not path.is_dir():
                raise DataError(f"data.folder is {folder or 'empty'}: no such folder")
            # there may be no train where images are only evaluated
            file = next((f for f in ("train", "test") if (path / f).is_dir()), "train")
            classes = _classes(path / file)
        return cls(printable(path.name) or "your images", tuple(classes), path)

    @property
    def superclasses(self) -> dict[str, tuple[str, ...]]:
        """A folder has no superclasses: each class by itself."""
        return {name: (name,) for name in self.classes}

    def prepare(self) -> None:
        """Nothing is downloaded."""

    def load(self, file: str, val_size: int = 5000, split_seed: int = 43) -> dict[str, Images]:
        """The splits in DIR/test, or in DIR/train and DIR/val; see `cifar100.Official.load`.

        Without DIR/val, `val_size` images of DIR/train, at most a fifth, are held out.
        """
        own_val = (self.path / "val").is_dir()
        for name in () if file == "test" or own_val else _folders(self.path):
            if name.lower() in ("val", "valid", "validation", "dev"):
                raise DataError(f"{self.path / name}: rename it to {self.path / 'val'}")
        names = ("train", "val") if file == "train" and own_val else (file,)
        listed = {name: self._list(name) for name in names}  # all before any image is read
        if file == "test" or own_val:
            return {name: Images(_read(files), labels) for name, (files, labels) in listed.items()}
        files, labels = listed["train"]
        few = (labels.bincount() < 2).nonzero()
        if val_size and len(few):
            raise DataError(
                f"{self.path / file / self.classes[few[0]]}: only 1 image, but validation needs "
                f"one as well; add more, {self.path / 'val'}, or --data.val_size 0"
            )
        return Images(_read(files), labels).split(val_size, split_seed, small=True, at_once=True)

    def digest(self, splits: dict[str, Images]) -> str | None:
        """The sha256 of the images and labels of the splits."""
        found = hashlib.sha256()
        for split in splits.values():
            found.update(split.images.permute(0, 2, 3, 1).contiguous().numpy())
            found.update(split.labels.numpy())
        return found.hexdigest()

    def _list(self, name: str) -> tuple[list[str], Tensor]:
        """The image files of a subfolder, sorted by class and path, and their labels (N,)."""
        from torchvision.datasets.folder import make_dataset  # 1.2 s

        path, classes = self.path / name, self.classes
        found = _classes(path)
        if found != classes:
            differences = {"without": {*classes} - {*found}, "with": {*found} - {*classes}}
            said = [f"{k} {', '.join(sorted(v)[:5])}" for k, v in differences.items() if v]
            raise DataError(
                f"{path}: its {len(found)} classes are not the {len(classes)}: {' and '.join(said)}"
            )

        def is_image(file: str) -> bool:
            hidden = "/." in f"/{Path(file).relative_to(path).as_posix()}"
            return not hidden and Path(file).suffix.lower() in images.SUFFIXES

        numbers = {name: i for i, name in enumerate(classes)}
        pairs = make_dataset(path, numbers, is_valid_file=is_image, allow_empty=True)
        labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
        empty = (labels.bincount(minlength=len(classes)) == 0).nonzero()
        if len(empty):
            more = f", nor in {len(empty) - 1} other classes" if len(empty) > 1 else ""
            formats = ", ".join(images.FORMATS)
            raise DataError(f"{path / classes[empty[0]]}: no images ({formats}) in it{more}")
        return [file for file, _ in pairs], labels


def _folders(path: Path) -> tuple[str, ...]:
    """The names of the subfolders, without hidden ones."""
    names = [folder.name for folder in path.iterdir() if folder.is_dir()] if path.is_dir() else []
    return tuple(sorted(name for name in names if not name.startswith(".")))


def _classes(path: Path) -> tuple[str, ...]:
    """The names of the subfolders, which have to be at least two."""
    if not path.is_dir():
        there = f"{path.parent} has {', '.join(_folders(path.parent)[:5]) or 'no folders'}"
        raise DataError(f"no folder {path}: expected one with a subfolder for each class; {there}")
    names = _folders(path)
    if len(names) < 2:
        found = f"only {names[0]}" if names else "none"
        raise DataError(
            f"{path}: expected a subfolder for each of at least 2 classes, found {found}"
        )
    for name in names:
        if not name.isprintable():
            raise DataError(f"{path}: the class name {name!a} is not printable text")
    return names


def _read(files: list[str]) -> Tensor:
    """All images as (N, 3, 32, 32) uint8, channels last in memory."""
    table, bad = torch.empty(len(files), 32, 32, 3, dtype=torch.uint8), []
    shown = {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
    for i, file in enumerate(track(files, "reading images", **shown)):
        try:
            table[i] = images.reduce(images.read(file)).permute(1, 2, 0)
        except images.ImageError as error:
            bad.append(f"{file}: {error}")
    if bad:
        say(*bad[:LISTED])
        raise DataError(f"{len(bad):,} of {len(files):,} images cannot be read: fix or remove them")
    return table.permute(0, 3, 1, 2)
