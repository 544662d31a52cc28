"""The LightningDataModule: splits, batches, and where augmentation happens.

The images are one uint8 tensor. A batch is one indexing operation; it crosses to the device as
uint8, and is augmented and normalized there.
"""

import os
from dataclasses import replace

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, default_convert
from torchvision.transforms.v2 import CutMix

from allconv import augment, datasets
from allconv.datasets.cifar100 import MEAN, STD, DataError, Images
from allconv.ranges import check_data


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
        self.save_hyperparameters()
        check_data(self.hparams)
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
        if h.sizes and self.trainer and (self.trainer.max_epochs or 0) < 0:
            raise ValueError("data.sizes are shares of trainer.max_epochs: give a number")
        if not self.trainer:
            self.prepare_data()  # a Trainer has done so
        if file not in self.sets:
            found = self.dataset.load(file, h.val_size, h.split_seed)
            self.digest = self.digest if file == "test" else self.dataset.digest(found)
            self.sets |= found
        if stage == "validate" and not len(self.sets["val"]):
            raise DataError("data.val_size is 0: there are no validation images")

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint records about the images, beside the hyperparameters."""
        return {"classes": list(self.dataset.classes), "digest": self.digest}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Refuse to resume with other images."""
        if self.digest and state.get("digest") != self.digest:  # known if the images were read
            what = f"the images in {self.hparams.folder} are not those that the run was trained"
            raise DataError(f"{what} with: start a new run with --init")

    def train_dataloader(self) -> DataLoader:
        """Shuffled uint8 batches; the order depends on the seed and the epoch only.

        They are augmented in `on_after_batch_transfer`, so only if the Trainer has this module.
        """
        return self._loader("train", self.hparams.batch_size)

    def val_dataloader(self) -> DataLoader:
        """The held-out images, shuffled, but always the same way; [] if there are none."""
        loader = self._loader("val", self.eval_batch_size)
        return loader if len(loader.dataset) else []  # Lightning would warn of an empty loader

    def test_dataloader(self) -> DataLoader:
        """The test images, shuffled, but always the same way."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """The test images in order."""
        return self._loader("test", self.eval_batch_size, ordered=True)

    def _loader(self, split: str, batch_size: int, ordered: bool = False) -> DataLoader:
        self.setup("test" if split == "test" else "fit")
        images, trainer = replace(self.sets[split]), self.trainer
        images.__getitems__ = images.batch  # the loader takes a batch by one indexing
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        if 0 < len(images) < world:
            raise DataError(f"{len(images)} {split} images are too few for {world} processes")
        if split == "train":
            # Lightning calls its set_epoch; seed_everything has set the variable
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
            sampler = DistributedSampler(images, world, rank, shuffle=True, seed=seed)
        else:
            # no padding: each image counts once; shuffled: the first batches have all classes
            n, rng = len(images), np.random.RandomState(0)
            order = np.arange(n) if ordered else rng.permutation(n)
            sampler = UnrepeatedDistributedSamplerWrapper(order, world, rank, shuffle=False)
        return DataLoader(
            images,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=default_convert,  # it is a batch already
            pin_memory=torch.cuda.is_available(),
            # a starting loader draws a seed: not from dropout's generator, or resuming would differ
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
