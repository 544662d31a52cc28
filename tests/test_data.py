"""The data module: the split, the batches, the image sizes; and the demo set."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO

from allconv.__main__ import main
from allconv.data import CIFAR100
from allconv.datasets import cifar100, demo

RECORD = 2 + 3 * 32 * 32


@pytest.fixture(scope="session")
def real_train(real_data):
    """The splits of the real training file, read once; reading checks that it is the official."""
    return cifar100.Official(real_data).load("train")


def test_constants_are_those_of_the_training_images(real_train):
    count = torch.zeros(3, 256, dtype=torch.long)
    for split in real_train.values():
        for channel in range(3):
            count[channel] += split.images[:, channel].flatten().bincount(minlength=256)
    values = torch.arange(256).double() / 255
    weights = count.double() / count.sum(1, keepdim=True)
    mean = weights @ values
    std = (weights @ values**2 - mean**2).sqrt()
    # the notebook's constants are rounded to four digits, one of them (0.4865) by half a digit
    torch.testing.assert_close(mean, torch.tensor(cifar100.MEAN).double(), atol=6e-5, rtol=0)
    torch.testing.assert_close(std, torch.tensor(cifar100.STD).double(), atol=6e-5, rtol=0)


def test_class_names_are_the_data_sets(real_data):
    folder = real_data / "cifar-100-binary"
    assert tuple((folder / "fine_label_names.txt").read_text().split()) == cifar100.CLASSES
    coarse = (folder / "coarse_label_names.txt").read_text().split()
    assert list(cifar100.SUPERCLASSES) == coarse
    table = np.fromfile(folder / "test.bin", np.uint8, count=3000 * RECORD).reshape(-1, RECORD)
    assert len(np.unique(table[:, 1])) == 100
    for group, label in np.unique(table[:, :2], axis=0):
        assert cifar100.CLASSES[label] in cifar100.SUPERCLASSES[coarse[group]]


def test_the_real_split_is_the_one_of_every_published_number(real_train):
    assert len(real_train["train"]) == 45_000
    images, labels = real_train["val"].images, real_train["val"].labels
    assert labels.bincount().tolist() == [50] * 100
    records = torch.cat([labels[:, None].to(torch.uint8), images.flatten(1)], 1)
    digest = hashlib.sha256(records.numpy()).hexdigest()
    assert digest.startswith("61881655c64bcd28")


def test_split_is_balanced_and_of_its_own_seed():
    labels = torch.arange(100).repeat_interleave(30)
    images = cifar100.Images(torch.arange(3000).view(-1, 1, 1, 1), labels)
    train, val = images.split(500, 43).values()
    torch.manual_seed(7)
    np.random.seed(7)
    again = images.split(500, 43)
    assert torch.equal(train.images, again["train"].images)
    assert torch.equal(val.images, again["val"].images)
    assert sorted([*train.images.flatten(), *val.images.flatten()]) == list(range(3000))
    assert val.labels.bincount().tolist() == [5] * 100
    assert not torch.equal(val.images, images.split(500, 1)["val"].images)


# --- the batches


def test_order_depends_on_seed_and_epoch_alone(own_folder, monkeypatch):
    def epoch(number, seed, batch_size=100):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        module = CIFAR100(demo=True, batch_size=batch_size)
        module.prepare_data()
        loader = module.train_dataloader()
        loader.sampler.set_epoch(number)
        return torch.cat([labels for _, labels in loader])

    first = epoch(0, 43)
    torch.manual_seed(9)
    assert torch.equal(epoch(0, 43, batch_size=64), first)
    assert not torch.equal(epoch(1, 43), first)
    assert not torch.equal(epoch(0, 44), first)
    assert first.bincount().tolist() == [32] * 100  # each image once


def test_a_single_image_of_the_dataset():
    loader = CIFAR100(demo=True).val_dataloader()
    images, labels = loader.dataset.images, loader.dataset.labels
    image, label = loader.dataset[7]
    assert image.shape == (3, 32, 32)
    assert torch.equal(image, images[7])
    assert label == labels[7]


@pytest.mark.parametrize(
    ("done", "size"),
    [(0.0, 20), (0.1499, 20), (0.15, 24), (0.4999, 24), (0.5, 32), (0.99, 32), (1.0, 32)],
)
def test_image_size_at_its_borders(done, size):
    assert CIFAR100(sizes=((0.15, 20), (0.5, 24))).image_size(done) == size


def test_image_size_until_the_end_and_without_sizes():
    assert CIFAR100(sizes=((1.0, 4),)).image_size(0.9999) == 4
    assert CIFAR100(sizes=((1.0, 4),)).image_size(1.0) == 32
    assert CIFAR100().image_size(0.0) == 32


@pytest.mark.parametrize(
    "sizes",
    [[(0, 20)], [(1.1, 20)], [(0.5, 3)], [(0.5, 33)], [(0.5, 20), (0.2, 24)]],
)
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(ValueError, match=r"data.sizes is .*: it must be pairs of a share"):
        CIFAR100(sizes=sizes)


# --- the demo set


def test_demo_is_the_same_everywhere():
    assert len(demo.CLASSES) == len(set(demo.CLASSES)) == 100
    train, test = (demo.records(split) for split in ("train", "test"))
    digest = hashlib.sha256(train.tobytes() + test.tobytes())
    assert digest.hexdigest().startswith("d7660bc29b2ccd10")


def test_demo_is_drawn_once_and_read_from_its_files(own_folder):
    module = CIFAR100(demo=True)
    module.prepare_data()
    path = Path("data/cifar-100-demo/train.bin")
    written = path.stat().st_mtime_ns
    table = np.fromfile(path, np.uint8).reshape(-1, RECORD)
    assert table[:, 1].max() == 99
    again = CIFAR100(demo=True)
    again.prepare_data()
    assert path.stat().st_mtime_ns == written
    table[:, 2:] = 7
    path.write_bytes(table.tobytes())
    again.setup("fit")
    assert again.sets["train"].images.unique().tolist() == [7]
    assert (len(again.sets["train"]), len(again.sets["val"])) == (3200, 800)


DEMO = ["fit", "--config", str(REPO / "configs/demo.yaml")]


@pytest.mark.slow
def test_demo_is_learnt(own_folder):
    main(DEMO)
    main(["validate"])
    found = json.loads(Path("lightning_logs/version_0/validate.json").read_text())
    assert 0.60 < found["val/acc"] < 0.95


@pytest.mark.slow
def test_demo_with_shuffled_labels_cannot_be_learnt(own_folder):
    """The accuracy comes from the images: with training labels shuffled, chance is left."""
    CIFAR100(demo=True).prepare_data()
    path = Path("data/cifar-100-demo/train.bin")
    table = np.fromfile(path, np.uint8).reshape(-1, RECORD)
    table[:, 1] = table[np.random.default_rng(1).permutation(len(table)), 1]
    path.write_bytes(table.tobytes())
    main(DEMO)
    main(["test"])
    assert json.loads(Path("lightning_logs/version_0/test.json").read_text())["test/acc"] < 0.03


def test_images_that_do_not_suffice_for_all_processes_are_refused(own_folder):
    data = CIFAR100(demo=True, val_size=100)
    data.setup("fit")
    data.trainer = SimpleNamespace(global_rank=0, world_size=128)
    with pytest.raises(cifar100.DataError, match="100 val images are too few for 128 processes"):
        data.val_dataloader()
