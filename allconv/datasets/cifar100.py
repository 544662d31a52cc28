"""CIFAR-100: classes, constants, and the official files as tensors.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009),
https://www.cs.toronto.edu/~kriz/cifar.html. torchvision downloads and reads the pickled form; the
binary one (records of a coarse byte, a fine byte, 3,072 pixel bytes) is read here.
"""

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allconv.errors import UserError

# Per channel, over the 50,000 training images, as fractions of 255, rounded as in the notebook.
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)

# The 20 superclasses in the order of the coarse labels, with their five classes each.
SUPERCLASSES = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
CLASSES = tuple(sorted(name for names in SUPERCLASSES.values() for name in names))
COARSE = np.array([[c in names for names in SUPERCLASSES.values()] for c in CLASSES]).argmax(1)

TIMEOUT = 60  # seconds to wait for the server
RECORD = 2 + 3 * 32 * 32
COUNT = {"train": 50_000, "test": 10_000}
BINARY = "cifar-100-binary"
BINARY_MD5 = "03b5dce01913d631647c71ecec9e9cb8"  # of its .tar.gz, from the data set's page
PYTHON = "cifar-100-python"
PYTHON_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"  # of its .tar.gz, from torchvision
# sha256 of the records (fine byte, pixels) in canonical order, the same for both official forms.
# Computed from the official binary files.
CONTENT = {
    "train": "37a2b72bd30f9438ff20798c661450f58f138c034f556846cd744a56bbb09967",
    "test": "b9ad4d741ee82873becf8846c246715e789a57766586a9677a8bbe26c8b30279",
}


class DataError(UserError):
    """Data are missing, damaged, not the expected ones, or cannot be downloaded."""


@dataclass(eq=False)
class Images:
    """The images and labels of a split.

    Attributes:
        images: (N, 3, 32, 32) uint8, channels last in memory.
        labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image (3, 32, 32) uint8 and its label ()."""
        return self.images[index], self.labels[index]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 32, 32) uint8 and labels (B,) at the given indices."""
        index = torch.from_numpy(np.array(indices))  # half the time of torch.tensor(indices)
        # index_select in memory order copies whole images: 8 times as fast as [index]
        images = self.images.permute(0, 2, 3, 1).index_select(0, index)  # (B, 32, 32, 3)
        return images.permute(0, 3, 1, 2), self.labels.index_select(0, index)

    def split(
        self, val_size: int, seed: int, small: bool = False, at_once: bool = False
    ) -> dict[str, "Images"]:
        """Split into train and val, with equally many images of each class in val if possible.

        Args:
            val_size: images held out for validation.
            seed: seed of the split.
            small: hold out at most a fifth of the images, and at most half of any class.
            at_once: shuffle all images at once, not class by class; this gives another split.
        """
        rng = np.random.RandomState(seed)  # its stream is frozen (NEP 19)
        labels = self.labels.numpy()
        order = rng.permutation(len(labels)) if at_once else np.arange(len(labels))
        members = [order[labels[order] == c] for c in np.unique(labels)]
        if not at_once:
            members = [rng.permutation(own) for own in members]
        if small:
            val_size = min(val_size, max(1, len(labels) // 5))
            members = [own[: len(own) // 2] for own in members]
        # round-robin over the classes; the last round takes random ones
        turn = np.concatenate([np.arange(len(own)) for own in members])
        order = np.lexsort((rng.permutation(len(turn)), turn))[:val_size]
        held_out = np.zeros(len(labels), bool)
        held_out[np.concatenate(members)[order]] = True
        indices = {"train": np.flatnonzero(~held_out), "val": np.flatnonzero(held_out)}
        return {name: Images(*self.batch(index)) for name, index in indices.items()}


@dataclass(frozen=True)
class Official:
    """CIFAR-100 from the official files in a folder, in either form.

    Attributes:
        path: folder that holds the data set, or into which it is downloaded.
    """

    path: Path = field(compare=False)
    title, classes, superclasses = "CIFAR-100", CLASSES, SUPERCLASSES
    small = False  # see `Images.split`

    def prepare(self) -> None:
        """Unpack or download what is missing.

        Raises:
            DataError: that failed; the message tells what else to do.
        """
        if (self.path / BINARY / "train.bin").exists() or (self.path / PYTHON).is_dir():
            return
        from torchvision.datasets import CIFAR100  # 1.2 s
        from torchvision.datasets.utils import check_integrity, extract_archive

        archive, before = self.path / f"{BINARY}.tar.gz", socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)
        try:
            if not archive.exists():
                print(
                    f"no CIFAR-100 in {self.path.absolute()}: downloading {CIFAR100.url}",
                    flush=True,
                )
                CIFAR100(self.path, download=True)
            elif check_integrity(archive, BINARY_MD5):
                extract_archive(archive, self.path)
            else:
                raise DataError(f"{archive}: expected md5 {BINARY_MD5}; download it again")
        # URLError, disk, permissions; the server's answer; a wrong md5
        except (OSError, HTTPException, RuntimeError) as error:
            raise DataError(f"download failed ({error}): {self._how_to_get()}") from None
        finally:
            socket.setdefaulttimeout(before)

    def load(self, file: str, val_size: int = 5000, split_seed: int = 43) -> dict[str, Images]:
        """The splits in one of the two files, by name.

        Args:
            file: "train" (the splits train and val) or "test".
            val_size: training images held out for validation.
            split_seed: seed of the split.
        """
        records = torch.from_numpy(self._read(file))
        pixels = records[:, 1:].reshape(-1, 3, 32, 32)
        images = Images(pixels.contiguous(memory_format=torch.channels_last), records[:, 0].long())
        if file == "test":
            return {"test": images}
        return images.split(val_size, split_seed, self.small)

    def digest(self, splits: dict[str, Images]) -> str | None:
        """None: these images are always the same."""

    def _read(self, file: str) -> np.ndarray:
        """Canonical records (N, 3073) of "train" or "test", verified to be the official ones."""
        path = self.path / BINARY / f"{file}.bin"
        if path.exists():
            records = read_binary(path, COUNT[file])
        elif (self.path / PYTHON).is_dir():
            path = self.path / PYTHON / file
            records = _read_python(self.path, file)
        else:
            raise DataError(self._how_to_get())
        found = hashlib.sha256(records).hexdigest()
        if found != CONTENT[file]:
            raise DataError(
                f"{path}: expected the official images (sha256 {CONTENT[file][:12]} of the sorted "
                f"records), found others ({found[:12]}); download it again"
            )
        return records

    def _how_to_get(self) -> str:
        return (
            f"no CIFAR-100 in {self.path.absolute()} (data_dir); place {PYTHON}.tar.gz "
            f"(169,001,437 bytes, md5 {PYTHON_MD5}) or {BINARY}.tar.gz (md5 {BINARY_MD5}), packed "
            f"or unpacked ({BINARY}/train.bin {COUNT['train'] * RECORD:,} and test.bin "
            f"{COUNT['test'] * RECORD:,} bytes); without it: python -m allconv fit --config demo"
        )


def read_binary(path: Path, count: int | None = None) -> np.ndarray:
    """Canonical records of a file in the binary form; `count` is their number, or None for any."""
    size = path.stat().st_size if path.is_file() else 0  # reading a FIFO would block
    if size == 0 or size % RECORD or (count and size != count * RECORD):
        expected = f"{count * RECORD:,}" if count else f"a multiple of {RECORD:,}"
        raise DataError(f"{path}: expected {expected} bytes, found {size:,}; download it again")
    table = np.fromfile(path, np.uint8).reshape(-1, RECORD)
    coarse, fine = table[:, 0], table[:, 1]
    bad = np.flatnonzero(fine >= len(CLASSES))
    if count and not len(bad):
        bad = np.flatnonzero(coarse != COARSE[fine])
    if len(bad):
        found = f"{coarse[bad[0]]} and {fine[bad[0]]} in record {bad[0]:,}"
        raise DataError(f"{path}: expected superclass and class, found {found}; download it again")
    return canonical(fine, table[:, 2:])


def _read_python(data_dir: Path, file: str) -> np.ndarray:
    """Canonical records of the pickled form; each md5 is checked before anything is unpickled."""
    from torchvision.datasets import CIFAR100  # 1.2 s, and only this form needs it
    from torchvision.datasets.utils import check_integrity

    meta = CIFAR100.meta["filename"], CIFAR100.meta["md5"]
    for name, md5 in (*CIFAR100.train_list, *CIFAR100.test_list, meta):
        path = data_dir / PYTHON / name
        if not (path.is_file() and check_integrity(path, md5)):
            raise DataError(f"{path}: expected md5 {md5}; delete its folder and download it again")
    data = CIFAR100(data_dir, train=file == "train")
    pixels = data.data.transpose(0, 3, 1, 2)  # (N, 3, 32, 32)
    return canonical(np.array(data.targets, np.uint8), pixels.reshape(-1, 3072))


def canonical(labels: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Sorted records (N, 3073) of labels (N,) and pixels (N, 3072): the same from any file."""
    records = np.concatenate([labels[:, None], pixels], axis=1)
    return records[np.argsort(records.view(f"V{records.shape[1]}").ravel(), kind="stable")]
