"""The LightningDataModule: splits, batches, and where augmentation happens.

The images are one uint8 tensor. A batch is one indexing operation; it crosses to the device as
uint8, and is augmented and normalized there.
"""

import os

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms.v2 import CutMix

from allconv import augment, datasets
from allconv.datasets.cifar100 import MEAN, STD, DataError, Images
from allconv.errors import check_ranges


class CIFAR100(LightningDataModule):
    """CIFAR-100 or your own images, their splits and loaders.

    Args:
        data_dir: folder with CIFAR-100 in either official form; it is downloaded there if missing.
        batch_size: images per training batch and process.
        val_size: training images held out for validation, the same number of each class; at most a
            fifth of the demo set or of a folder. 0: no validation.
        split_seed: seed of this split alone; the same seed gives the same split everywhere.
        crop: shift each training image by up to this many pixels, see `allconv.augment.crop`.
        flip: flip half of the training images each epoch, the other half in the next.
        sizes: progressive resizing, as ascending pairs: a share of the run's steps, and the image
            size in pixels until then; 32 pixels after the last (Touvron et al., arXiv:1906.06423).
        cutmix: share of the training batches to which CutMix is applied: a box of each image is
            replaced by that of another, and the labels are mixed by area (Yun et al.,
            arXiv:1905.04899).
        demo: use a small synthetic data set instead, which needs no download.
        folder: use your own images instead, in one subfolder per class: FOLDER/train/CLASS/IMAGE,
            FOLDER/test for `test`, and optionally FOLDER/val instead of val_size training images.
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
        folder: str | None = None,
    ):
        super().__init__()
        step = 100 if folder is None else 1  # the same number of each class
        val_right = 0 <= val_size < 50_000 and val_size % step == 0
        sizes_right = all(0 < share <= 1 and 4 <= size <= 32 for share, size in sizes)
        rules = {
            "batch_size": (batch_size >= 1, "at least 1"),
            "val_size": (val_right, f"from 0 to 49900 in steps of {step}"),
            "split_seed": (0 <= split_seed < 2**32, f"from 0 to {2**32 - 1}"),
            "crop": (0 <= crop < 32, "from 0 to 31"),
            "sizes": (sizes_right, "pairs of a share in (0, 1] and a size from 4 to 32"),
            "cutmix": (0 <= cutmix <= 1, "from 0 to 1"),
            "folder": (not (demo and folder), "null when data.demo is true"),
        }
        self.save_hyperparameters(logger=False)
        check_ranges("data", self.hparams, rules)
        self.dataset = datasets.choose(data_dir, demo, folder)
        self.digest: str | None = None  # of a folder's training and validation images
        self.mix = CutMix(num_classes=len(self.dataset.classes))
        self.sets: dict[str, Images] = {}  # train, val, test

    def prepare_data(self) -> None:
        """Download or draw what is missing; Lightning calls this in one process per node."""
        self.dataset.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read the test file for test and predict, the training file for the other stages."""
        file, h = "test" if stage in ("test", "predict") else "train", self.hparams
        if h.sizes and self.trainer and self.trainer.max_epochs < 0:
            raise ValueError("data.sizes are shares of trainer.max_epochs: give a number")
        if file not in self.sets:
            found = self.dataset.load(file, h.val_size, h.split_seed)
            self.digest = self.digest if file == "test" else self.dataset.digest(found)
            self.sets |= found
        if file == "train" and not len(self.sets["val"]):
            if stage == "validate":
                raise DataError("data.val_size is 0: there are no validation images")
            if self.trainer:
                self.trainer.limit_val_batches = 0  # Lightning would warn of an empty loader

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint records about the images, beside the hyperparameters."""
        return {"classes": list(self.dataset.classes), "digest": self.digest}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Refuse to resume with other images."""
        if state.get("digest") != self.digest:
            what = f"the images in {self.hparams.folder} are not those that the run was trained"
            raise DataError(f"{what} with: start a new run with --init")

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches; the order depends on the seed and the epoch only."""
        return self._loader("train", self.hparams.batch_size)

    def val_dataloader(self) -> DataLoader:
        """The held-out images, shuffled, but always the same way."""
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        """The test images, shuffled, but always the same way."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """The test images in order."""
        return self._loader("test", self.eval_batch_size, ordered=True)

    def _loader(self, split: str, batch_size: int, ordered: bool = False) -> DataLoader:
        self.setup("test" if split == "test" else "fit")
        images, trainer = self.sets[split], self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        # without padding, so that each image counts once whatever the number of processes
        # by default shuffled: the first ones, as with limit_val_batches, then have all classes
        n, rng = len(images), np.random.RandomState(0)
        sampler = (np.arange(n) if ordered else rng.permutation(n))[rank::world]
        if split == "train":
            # Lightning calls its set_epoch; seed_everything has set the variable
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
            sampler = DistributedSampler(images, world, rank, shuffle=True, seed=seed)
        return DataLoader(
            images,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=lambda batch: batch,
            pin_memory=torch.cuda.is_available(),
            # a loader draws a seed when it starts, at another point of a resumed run: the draw must
            # not advance the generator that dropout uses
            generator=torch.Generator(),
        )

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], _: int):
        """Augment training images, and normalize: uint8 to float32, on the device."""
        if isinstance(batch, Tensor):  # the model summary's example input
            return batch
        (images, labels), h, trainer = batch, self.hparams, self.trainer
        if not trainer.training:
            return augment.normalize(images, MEAN, STD), labels
        if h.flip:
            images = augment.alternating_flip(images, trainer.current_epoch)
        if h.crop:
            images = augment.crop(images, h.crop)  # torch's generator: seeded every epoch
        if h.cutmix and torch.rand(()) < h.cutmix:
            images, labels = self.mix(images, labels)  # labels (B, classes) from here on
        images = augment.normalize(images, MEAN, STD)
        # share of max_epochs, as for the learning rate: max_steps only ends a run early
        steps = trainer.max_epochs * trainer.num_training_batches
        size = self.image_size(trainer.global_step * trainer.accumulate_grad_batches / steps)
        if size == 32:
            return images, labels
        full_size = [images] if getattr(trainer.lightning_module, "teacher", None) else []
        return augment.resize(images, size), labels, *full_size

    def image_size(self, done: float) -> int:
        """Size of the training images in pixels after a share `done` of the run."""
        return next((size for share, size in self.hparams.sizes if done < share), 32)
