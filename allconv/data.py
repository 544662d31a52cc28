"""CIFAR-100 as one uint8 tensor: its files, the 45,000/5,000 split, normalization, loaders.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009);
https://www.cs.toronto.edu/~kriz/cifar.html. A batch is one indexing operation; pictures cross to
the device as uint8 and are normalized there.
"""

import functools
import hashlib
import os
import pickle
import tarfile
import tempfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.accelerators import CUDAAccelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms.v2 import CutMix

from allconv import augment, demo

# Mean and standard deviation of each channel over the 50,000 training pictures, as fractions of
# 255, in the notebook's rounding; `channel_statistics` computes them again.
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)

# The 20 superclasses in the order of the data set's coarse labels, each with its five classes.
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

RECORD = 2 + 3 * 32 * 32  # a coarse byte, a fine byte, then the pixels, channels first
COUNT = {"train": 50_000, "test": 10_000}
URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
# From torchvision.datasets.CIFAR100 and the data set's page.
MD5 = {
    "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
    "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
}
# sha256 of the records in canonical order (fine byte, then pixels): the same for both official
# forms. Computed from the official binary files.
CONTENT = {
    "train": "37a2b72bd30f9438ff20798c661450f58f138c034f556846cd744a56bbb09967",
    "test": "b9ad4d741ee82873becf8846c246715e789a57766586a9677a8bbe26c8b30279",
}


class DataError(ValueError):
    """A data file is missing, damaged or cannot be had."""


def canonical(labels: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Records (N, 3073) of label and pixel bytes, sorted: the order no longer tells the file.

    Args:
        labels: (N,) uint8.
        pixels: (N, 3072) uint8, channels first.
    """
    records = np.concatenate([labels[:, None], pixels], axis=1)
    return records[np.argsort(records.view(f"V{records.shape[1]}").ravel(), kind="stable")]


def read_binary(raw: bytes, name: str, count: int | None = None) -> np.ndarray:
    """Canonical records of a file in the binary form; `count` None takes any number.

    Raises:
        DataError: the size is not that of `count` records, or a label is not in 0..99.
    """
    expected = f"{count * RECORD:,}" if count else f"a multiple of {RECORD:,}"
    if not raw or (len(raw) != count * RECORD if count else len(raw) % RECORD):
        raise DataError(f"{name}: expected {expected} bytes, found {len(raw):,}; get it again")
    table = np.frombuffer(raw, np.uint8).reshape(-1, RECORD)
    bad = np.flatnonzero(table[:, 1] >= len(CLASSES))
    if len(bad):
        raise DataError(
            f"{name}: expected labels 0 to 99, found {table[bad[0], 1]} in record {bad[0]:,}; "
            "get it again"
        )
    return canonical(table[:, 1], table[:, 2:])


def read_python(raw: bytes, name: str, split: str) -> np.ndarray:
    """Canonical records of a file in the pickled form, unpickled only if its md5 is the known one.

    Raises:
        DataError: the md5 is another.
    """
    check_md5(raw, name, MD5[f"cifar-100-python/{split}"])
    table = pickle.loads(raw, encoding="latin1")
    return canonical(np.array(table["fine_labels"], np.uint8), table["data"])


def check_md5(raw: bytes, name: str, expected: str) -> None:
    """Raise DataError if the md5 of `raw` is not the expected one."""
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(f"{name}: expected md5 {expected}, found {found}; get it again")


def find(data_dir: Path) -> Path | None:
    """The first of the four official forms that lies in `data_dir`, unpacked ones first."""
    names = ("cifar-100-python", "cifar-100-binary")
    candidates = [data_dir / (name + end) for end in ("", ".tar.gz") for name in names]
    return next((path for path in candidates if path.exists()), None)


def read(data_dir: Path, split: str) -> np.ndarray:
    """Canonical records (N, 3073) of CIFAR-100, from whichever official form lies in `data_dir`.

    Args:
        data_dir: folder that holds one of the forms.
        split: "train" or "test".

    Raises:
        DataError: nothing is there, or what is there is not the official data set.
    """
    source = find(data_dir)
    if source is None:
        raise DataError(how_to_get(data_dir))
    if source.suffix != ".gz" and not source.is_dir():
        raise DataError(f"{source}: expected a folder, found a file; take it away")
    form = source.name.removesuffix(".tar.gz")
    member = split if form == "cifar-100-python" else f"{split}.bin"
    name = str(source / member)
    try:
        if source.is_dir():
            raw = (source / member).read_bytes()
        else:  # read in memory: nothing is unpacked into a folder that may be read-only
            check_md5(source.read_bytes(), str(source), MD5[source.name])
            with tarfile.open(source) as archive:
                raw = archive.extractfile(f"{form}/{member}").read()
    except OSError as error:
        raise DataError(f"{name}: expected a readable file, found: {error.strerror}") from None
    if form == "cifar-100-python":
        records = read_python(raw, name, split)
    else:
        records = read_binary(raw, name, COUNT[split])
    found = hashlib.sha256(records).hexdigest()
    if found != CONTENT[split]:
        raise DataError(
            f"{name}: expected the official pictures (sha256 {CONTENT[split][:12]} of the sorted "
            f"records), found others ({found[:12]}); get it again"
        )
    return records


def how_to_get(data_dir: Path) -> str:
    """What to do when there is no data set in `data_dir`."""
    size = COUNT["train"] * RECORD, COUNT["test"] * RECORD
    return (
        f"no CIFAR-100 in {data_dir.absolute()} (data.data_dir); put there cifar-100-python.tar.gz "
        f"(169,001,437 bytes, md5 {MD5['cifar-100-python.tar.gz']}) or cifar-100-binary.tar.gz "
        f"(md5 {MD5['cifar-100-binary.tar.gz']}), packed or unpacked "
        f"(cifar-100-binary/train.bin {size[0]:,} and test.bin {size[1]:,} bytes), "
        "or try without it: python -m allconv fit --data.demo true"
    )


def download(data_dir: Path) -> None:
    """Put the official archive into `data_dir`: whole and checked, or not at all.

    Raises:
        DataError: the download failed; says what else can be done.
    """
    # 0.6 s, and hardly ever needed
    from torchvision.datasets.utils import download_url

    name = URL.rsplit("/", 1)[1]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as folder:
            download_url(URL, folder, md5=MD5[name])
            os.replace(Path(folder, name), data_dir / name)
    # URLError, disk, permissions; the server's answer; a wrong md5
    except (OSError, HTTPException, RuntimeError) as error:
        raise DataError(f"download failed ({error}): {how_to_get(data_dir)}") from None


def split_indices(labels: np.ndarray, val_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Class-balanced split into training and validation indices, both ascending.

    Args:
        labels: (N,) class numbers, in canonical order.
        val_size: pictures to hold out, the same number of each class.
        seed: of this split alone.

    Raises:
        DataError: `val_size` cannot be taken in equal parts from every class.
    """
    classes, counts = np.unique(labels, return_counts=True)
    each, rest = divmod(val_size, len(classes))
    if rest or not 0 < each < counts.min():
        raise DataError(
            f"data.val_size is {val_size}: it must be a multiple of {len(classes)} from "
            f"{len(classes)} to {len(classes) * (counts.min() - 1)}"
        )
    # RandomState: its stream is frozen (NEP 19), so the split is the same with every numpy
    rng = np.random.RandomState(seed)
    val = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes])
    held_out = np.zeros(len(labels), bool)
    held_out[val] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, as fractions of 255.

    Args:
        images: (N, 3, H, W) uint8.

    Returns:
        Two (3,) float64 tensors.
    """
    counts = torch.stack([c.flatten().bincount(minlength=256) for c in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = counts @ values / counts.sum(1)
    return mean, (counts @ values**2 / counts.sum(1) - mean**2).sqrt()


@functools.cache
def _scale(device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """Factors and offsets (3W,) that normalize a row of pixels of 0..255; no step copies them."""
    mean, std = (torch.tensor(c, dtype=torch.float64).repeat(width) for c in (MEAN, STD))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def normalize(images: Tensor) -> Tensor:
    """Normalize pictures on their device, channels last in memory.

    Args:
        images: (B, 3, H, W), values 0..255, uint8 or float.

    Returns:
        (B, 3, H, W) float32 with the training set's mean 0 and standard deviation 1.
    """
    factor, offset = _scale(images.device, images.shape[3])
    # by rows: an inner loop over 3 channels is not vectorized and takes four times as long
    rows = images.permute(0, 2, 3, 1).flatten(2).float()  # (B, H, 3W)
    return torch.addcmul(offset, rows, factor).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


class Pictures(Dataset):
    """Pictures and labels, indexed a whole batch at a time.

    Args:
        records: (N, 3073) uint8, a label and the pixels each.
    """

    def __init__(self, records: np.ndarray):
        table = torch.from_numpy(records)
        self.labels = table[:, 0].long()  # (N,)
        images = table[:, 1:].reshape(-1, 3, 32, 32)
        self.images = images.contiguous(memory_format=torch.channels_last)  # (N, 3, 32, 32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, 32, 32) uint8 and labels (B,) of a list of indices."""
        index = torch.from_numpy(np.array(indices))  # half the time of torch.tensor(indices)
        # index_select on the memory as it lies copies whole pictures: 8 times as fast as [index]
        images = self.images.permute(0, 2, 3, 1).index_select(0, index)  # (B, 32, 32, 3)
        return images.permute(0, 3, 1, 2), self.labels.index_select(0, index)


class CIFAR100(LightningDataModule):
    """CIFAR-100, its split and its loaders.

    Args:
        data_dir: folder with the data set in any official form; downloaded there if it has none.
        batch_size: pictures in a training batch of one process.
        val_size: training pictures held out for validation, the same number of each class; of the
            demo set a fifth at most.
        split_seed: seed of that split alone; the same number gives the same split everywhere.
        crop: shift each training picture by up to this many pixels, see `allconv.augment.crop`.
        flip: mirror half of the training pictures each epoch, the other half in the next.
        sizes: training pictures are scaled down at first: pairs of a share of the run's steps and
            the size in pixels until then, ascending; after the last, 32 pixels (Touvron et al.,
            arXiv:1906.06423, and fast.ai's progressive resizing).
        cutmix: share of the training batches in which each picture gets a box of another one, and
            its labels their shares of the area (Yun et al., arXiv:1905.04899).
        demo: use a small drawn data set instead: no download, and no real figures.

    Raises:
        ValueError: an argument is out of its range.
    """

    eval_batch_size = 500

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 64,
        val_size: int = 5000,
        split_seed: int = 43,
        crop: int = 0,
        flip: bool = False,
        sizes: tuple[tuple[float, int], ...] = (),
        cutmix: float = 0.0,
        demo: bool = False,
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}: it must be at least 1")
        top = COUNT["train"] - len(CLASSES)
        if val_size % len(CLASSES) or not 0 < val_size <= top:
            raise ValueError(
                f"data.val_size is {val_size}: it must be a multiple of {len(CLASSES)} from "
                f"{len(CLASSES)} to {top}"
            )
        if not 0 <= split_seed < 2**32:
            raise ValueError(f"data.split_seed is {split_seed}: it must be from 0 to {2**32 - 1}")
        if not 0 <= crop < 32:
            raise ValueError(f"data.crop is {crop}: it must be from 0 to 31")
        for share, size in sizes:
            if not (0 < share <= 1 and 4 <= size <= 32):
                raise ValueError(
                    f"data.sizes has {[share, size]}: it must be pairs of a share above 0 and at "
                    "most 1, and a size from 4 to 32"
                )
        if not 0 <= cutmix <= 1:
            raise ValueError(f"data.cutmix is {cutmix}: it must be from 0 to 1")
        self.save_hyperparameters(logger=False)
        self.mix = CutMix(num_classes=len(self.class_names))
        self.sets: dict[str, Pictures] = {}  # train, val, test: filled when asked for
        self.split_fingerprint: str | None = None
        self.remark: str | None = None  # what a reader of the evaluation has to know

    @property
    def title(self) -> str:
        """The data set's name; a drawn one is always called so."""
        return "the drawn demo set (not CIFAR-100)" if self.hparams.demo else "CIFAR-100"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The 100 class names in the order of the labels."""
        return demo.CLASSES if self.hparams.demo else CLASSES

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The superclasses with their classes."""
        return demo.GROUPS if self.hparams.demo else SUPERCLASSES

    def prepare_data(self) -> None:
        """Download or draw what is missing; Lightning calls this in one process only."""
        data_dir = Path(self.hparams.data_dir)
        if self.hparams.demo:
            demo.draw(data_dir / demo.FOLDER)
        elif find(data_dir) is None:
            print(f"no CIFAR-100 in {data_dir.absolute()}: downloading {URL}", flush=True)
            download(data_dir)

    def setup(self, stage: str) -> None:
        """Read what the stage needs: test the test file, the others the training file."""
        if stage == "test":
            if "test" not in self.sets:
                self.sets["test"] = Pictures(self._read("test"))
            return
        if "train" in self.sets:
            return
        records = self._read("train")
        val_size = self.hparams.val_size
        if self.hparams.demo:
            val_size = min(val_size, len(records) // 500 * 100)
            if not val_size:
                raise DataError(
                    f"{Path(self.hparams.data_dir, demo.FOLDER, 'train.bin')}: expected 500 "
                    f"pictures or more, found {len(records)}; take the folder away"
                )
        train, val = split_indices(records[:, 0], val_size, self.hparams.split_seed)
        self.sets["train"], self.sets["val"] = Pictures(records[train]), Pictures(records[val])
        self.split_fingerprint = hashlib.sha256(records[val]).hexdigest()

    def _read(self, split: str) -> np.ndarray:
        data_dir = Path(self.hparams.data_dir)
        if not self.hparams.demo:
            return read(data_dir, split)
        path = data_dir / demo.FOLDER / f"{split}.bin"
        return read_binary(path.read_bytes(), str(path))

    def train_dataloader(self) -> DataLoader:
        """Batches in an order that only the seed and the epoch decide."""
        rank, world = self._rank_and_world()
        # Lightning calls its set_epoch; the seed is the run's, as seed_everything left it
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        sampler = DistributedSampler(self.sets["train"], world, rank, shuffle=True, seed=seed)
        return self._loader("train", self.hparams.batch_size, sampler)

    def val_dataloader(self) -> DataLoader:
        """The held-out pictures in order."""
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        """The 10,000 test pictures in order."""
        return self._loader("test", self.eval_batch_size)

    def _loader(self, split: str, batch_size: int, sampler=None) -> DataLoader:
        pictures = self.sets[split]
        if sampler is None:
            # every picture once, whatever the number of processes: nothing is padded
            rank, world = self._rank_and_world()
            sampler = range(rank, len(pictures), world)
        on_gpu = self.trainer is not None and isinstance(self.trainer.accelerator, CUDAAccelerator)
        return DataLoader(
            pictures,
            batch_size,
            sampler=sampler,
            collate_fn=lambda batch: batch,
            pin_memory=on_gpu,
            # a loader draws a seed for workers when it starts, and a resumed run starts it at
            # another moment: that draw must not come from the generator that dropout uses
            generator=torch.Generator(),
        )

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], _: int):
        """Augment if training, and normalize: uint8 becomes float32, on the device."""
        if isinstance(batch, Tensor):  # the model summary's example input
            return batch
        images, labels = batch
        if not self.trainer.training:
            return normalize(images), labels
        h, trainer = self.hparams, self.trainer
        if h.flip:
            images = augment.alternating_flip(images, trainer.current_epoch)
        if h.crop:
            images = augment.crop(images, h.crop)  # torch's generator: seeded every epoch
        if h.cutmix and torch.rand(()) < h.cutmix:
            images, labels = self.mix(images, labels)  # labels (B, classes) from here on
        images = normalize(images)
        # of max_epochs, as the rate's schedule: max_steps may stop the run and does not change it
        steps = trainer.max_epochs * trainer.num_training_batches
        done = trainer.global_step * trainer.accumulate_grad_batches / steps
        size = next((size for share, size in h.sizes if done < share), 32)
        return (augment.resize(images, size) if size < 32 else images), labels

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint remembers of the data: which set, and which pictures were held out."""
        return {"demo": self.hparams.demo, "split": self.split_fingerprint}

    def compare(self, state_dict: dict[str, object]) -> None:
        """Remark it if the net was trained on other data, or has seen what it is evaluated on."""
        now = self.state_dict()
        if now["demo"] != state_dict["demo"]:
            self.remark = "trained on another data set than it is evaluated on"
        elif now["split"] not in (None, state_dict["split"]):
            self.remark = "another split than in training: the net has seen some of these pictures"

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Compare with the data that the checkpoint was trained on.

        Raises:
            DataError: training would go on with other pictures than it began with.
        """
        self.compare(state_dict)
        now = self.state_dict()
        if self.trainer.state.fn == "fit" and self.remark:
            raise DataError(
                f"the checkpoint was trained with demo={state_dict['demo']} and split "
                f"{str(state_dict['split'])[:12]}, found demo={now['demo']} and split "
                f"{str(now['split'])[:12]}: resume with the data it began with, or start anew "
                "with --init"
            )
