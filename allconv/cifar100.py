"""CIFAR-100: its classes, its constants, and its official files as tensors.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009),
https://www.cs.toronto.edu/~kriz/cifar.html. torchvision downloads and reads the pickled form; the
binary one (records of a coarse byte, a fine byte, 3,072 pixel bytes) is read here.
"""

import hashlib
import socket
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allconv import demo as drawn
from allconv.errors import UserError

TITLE = "CIFAR-100"
# Of each channel over the 50,000 training images, as fractions of 255, rounded as in the notebook.
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)

# The 20 superclasses in the order of the coarse labels, each with its five classes.
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

TIMEOUT = 60  # seconds without an answer from the server
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
    """A data file is missing, damaged or cannot be downloaded."""


def load(split: str, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Images and labels of "train", "val" or "test"; the other arguments are those of `load_file`.

    Returns:
        Images (N, 3, 32, 32) uint8, channels last in memory, and labels (N,) int64.
    """
    return load_file("test" if split == "test" else "train", *args, **kwargs)[split]


def load_file(
    file: str,
    data_dir: str = "data",
    val_size: int = 5000,
    split_seed: int = 43,
    demo: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The splits in one of the two files, from whichever official form lies in `data_dir`.

    Args:
        file: "train" (which holds the splits train and val) or "test".
        data_dir: folder that holds the data set.
        val_size: training images held out for validation; of the demo set a fifth at most.
        split_seed: seed of that split alone.
        demo: read the demo set.

    Returns:
        For each split what `load` returns.

    Raises:
        DataError: nothing is there, or what is there is not the official data set.
    """
    if demo:
        path = Path(data_dir, drawn.FOLDER, f"{file}.bin")
        records = read_binary(_bytes(path), path)
        val_size = min(val_size, len(records) // 500 * 100)
        if file == "train" and len(records) < 500:
            raise DataError(f"{path}: under 500 images; delete it, and it is drawn again")
    else:
        records = _read(Path(data_dir), file)
    splits = {"test": slice(None)}
    if file == "train":
        train, val = split_indices(records[:, 0], val_size, split_seed)
        splits = {"train": train, "val": val}
    return {split: _tensors(records[index]) for split, index in splits.items()}


def _tensors(records: np.ndarray) -> tuple[Tensor, Tensor]:
    table = torch.from_numpy(records)
    images = table[:, 1:].reshape(-1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return images, table[:, 0].long()


def canonical(labels: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Sorted records (N, 3073) of labels (N,) and pixels (N, 3072), in no file's order."""
    records = np.concatenate([labels[:, None], pixels], axis=1)
    return records[np.argsort(records.view(f"V{records.shape[1]}").ravel(), kind="stable")]


def read_binary(raw: bytes, name: object, count: int | None = None) -> np.ndarray:
    """Canonical records of a file in the binary form; `count` None takes any number.

    Raises:
        DataError: the size is not that of `count` records, or a label is not of the 100.
    """
    expected = f"{count * RECORD:,}" if count else f"a multiple of {RECORD:,}"
    if not raw or len(raw) % RECORD or (count and len(raw) != count * RECORD):
        raise DataError(f"{name}: expected {expected} bytes, found {len(raw):,}; get it again")
    table = np.frombuffer(raw, np.uint8).reshape(-1, RECORD)
    coarse, fine = table[:, 0], table[:, 1]
    bad = np.flatnonzero(fine >= 100)
    if count and not len(bad):
        bad = np.flatnonzero(coarse != COARSE[fine])
    if len(bad):
        found = f"{coarse[bad[0]]} and {fine[bad[0]]} in record {bad[0]:,}"
        raise DataError(f"{name}: expected superclass and class, found {found}; get it again")
    return canonical(fine, table[:, 2:])


def _read(data_dir: Path, file: str) -> np.ndarray:
    """Canonical records (N, 3073) of "train" or "test", checked to be the official ones."""
    path = data_dir / BINARY / f"{file}.bin"
    if path.exists():
        records = read_binary(_bytes(path), path, COUNT[file])
    elif (data_dir / PYTHON).is_dir():
        path = data_dir / PYTHON / file
        records = _read_python(data_dir, file)
    else:
        raise DataError(how_to_get(data_dir))
    found = hashlib.sha256(records).hexdigest()
    if found != CONTENT[file]:
        raise DataError(
            f"{path}: expected the official images (sha256 {CONTENT[file][:12]} of the sorted "
            f"records), found others ({found[:12]}); get it again"
        )
    return records


def _bytes(path: Path) -> bytes:
    if path.is_file():  # a FIFO would wait for ever
        return path.read_bytes()
    raise DataError(f"{path}: expected a file")


def _read_python(data_dir: Path, file: str) -> np.ndarray:
    """Canonical records of the pickled form; torchvision checks each md5 before it unpickles."""
    from torchvision.datasets import CIFAR100  # 1.2 s, and only this form needs it
    from torchvision.datasets.utils import check_integrity

    for name, md5 in (*CIFAR100.train_list, *CIFAR100.test_list):
        path = data_dir / PYTHON / name
        if not (path.is_file() and check_integrity(path, md5)):
            raise DataError(f"{path}: expected md5 {md5}; delete its folder and get it again")
    try:
        data = CIFAR100(data_dir, train=file == "train")
    except RuntimeError as error:  # its meta file
        raise DataError(f"{data_dir / PYTHON}: {error}") from None
    pixels = data.data.transpose(0, 3, 1, 2)  # (N, 3, 32, 32)
    return canonical(np.array(data.targets, np.uint8), pixels.reshape(-1, 3072))


def how_to_get(data_dir: Path) -> str:
    """What to do when there is no data set in `data_dir`."""
    return (
        f"no CIFAR-100 in {data_dir.absolute()} (data.data_dir); put there {PYTHON}.tar.gz "
        f"(169,001,437 bytes, md5 {PYTHON_MD5}) or {BINARY}.tar.gz (md5 {BINARY_MD5}), packed or "
        f"unpacked ({BINARY}/train.bin {COUNT['train'] * RECORD:,} and test.bin "
        f"{COUNT['test'] * RECORD:,} bytes), or try without it: --data.demo true"
    )


def prepare(data_dir: str, demo: bool = False) -> None:
    """Unpack, download or draw what is missing in `data_dir`.

    Raises:
        DataError: an archive is damaged, or the download failed; says what else can be done.
    """
    folder = Path(data_dir)
    if demo:
        drawn.draw(folder / drawn.FOLDER)
        return
    if (folder / BINARY / "train.bin").exists() or (folder / PYTHON).is_dir():
        return
    from torchvision.datasets import CIFAR100  # 1.2 s
    from torchvision.datasets.utils import check_integrity, extract_archive

    archive, before = folder / f"{BINARY}.tar.gz", socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        if archive.exists():
            if not check_integrity(archive, BINARY_MD5):
                raise DataError(f"{archive}: expected md5 {BINARY_MD5}; get it again")
            extract_archive(archive, folder)
        else:
            print(f"no CIFAR-100 in {folder.absolute()}: downloading {CIFAR100.url}", flush=True)
            CIFAR100(folder, download=True)
    # URLError, disk, permissions; the server's answer; a wrong md5
    except (OSError, HTTPException, RuntimeError) as error:
        raise DataError(f"download failed ({error}): {how_to_get(folder)}") from None
    finally:
        socket.setdefaulttimeout(before)


def split_indices(labels: np.ndarray, val_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Class-balanced split of labels (N,) into training and validation indices, both ascending.

    Raises:
        DataError: `val_size` cannot be taken in equal parts from every class.
    """
    classes, counts = np.unique(labels, return_counts=True)
    each, rest = divmod(val_size, len(classes))
    if rest or not 0 <= each < counts.min():
        raise DataError(
            f"data.val_size is {val_size}: it must be a multiple of {len(classes)} from "
            f"0 to {len(classes) * (counts.min() - 1)}"
        )
    # RandomState: its stream is frozen (NEP 19), so the split is the same with every numpy
    rng = np.random.RandomState(seed)
    val = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes])
    held_out = np.zeros(len(labels), bool)
    held_out[val] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
