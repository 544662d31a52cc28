"""Files, damage, split, normalization."""

import hashlib
import http.server
import json
import os
import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from torchvision.transforms.functional import normalize as tv_normalize
from torchvision.transforms.functional import to_tensor

from allconv import data, demo
from allconv.__main__ import main

FIT = "fit --model.width 2 --trainer.max_epochs 1 --trainer.limit_train_batches 2".split()


@pytest.fixture
def real_copy(real_data, own_folder):
    """A folder of one's own with the real binary files, to be damaged."""
    shutil.copytree(real_data / "cifar-100-binary", own_folder / "data/cifar-100-binary")
    return own_folder / "data/cifar-100-binary"


@pytest.fixture(scope="session")
def as_python(real_data, tmp_path_factory):
    """The real data set in the pickled form (not the official file, so with another md5)."""
    folder = tmp_path_factory.mktemp("pickled") / "cifar-100-python"
    folder.mkdir()
    for split in data.COUNT:
        raw = np.fromfile(real_data / f"cifar-100-binary/{split}.bin", np.uint8)
        table = raw.reshape(-1, data.RECORD)
        content = {"fine_labels": table[:, 1].tolist(), "data": table[:, 2:]}
        (folder / split).write_bytes(pickle.dumps(content))
    return folder


def setup(data_dir, stage="test", **settings):
    module = data.CIFAR100(str(data_dir), **settings)
    module.setup(stage)
    return module


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def test_normalizes_as_torchvision_does():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = torch.stack(
        [tv_normalize(to_tensor(x.permute(1, 2, 0).numpy()), data.MEAN, data.STD) for x in images]
    )
    found = data.normalize(images)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_constants_are_the_training_pictures_own(real_data):
    module = setup(real_data, "fit")
    images = torch.cat([module.sets["train"].images, module.sets["val"].images])
    mean, std = data.channel_statistics(images)
    # the notebook's constants are rounded to four digits, one of them (0.4865) by half a digit
    torch.testing.assert_close(mean, torch.tensor(data.MEAN).double(), atol=6e-5, rtol=0)
    torch.testing.assert_close(std, torch.tensor(data.STD).double(), atol=6e-5, rtol=0)


def test_class_names_are_the_data_sets(real_data):
    folder = real_data / "cifar-100-binary"
    assert tuple((folder / "fine_label_names.txt").read_text().split()) == data.CLASSES
    coarse = (folder / "coarse_label_names.txt").read_text().split()
    assert list(data.SUPERCLASSES) == coarse
    table = np.fromfile(folder / "test.bin", np.uint8).reshape(-1, data.RECORD)
    for group, label in np.unique(table[:, :2], axis=0):
        assert data.CLASSES[label] in data.SUPERCLASSES[coarse[group]]


def test_split_is_balanced_and_its_own(real_data):
    module = setup(real_data, "fit")
    assert len(module.sets["train"]) == 45_000
    assert module.sets["val"].labels.bincount().tolist() == [50] * 100
    # pinned: the split that every published figure is made with
    assert module.split_fingerprint.startswith("61881655c64bcd28")
    assert setup(real_data, "fit", split_seed=1).split_fingerprint != module.split_fingerprint


def test_split_does_not_hear_of_the_runs_seed():
    labels = np.repeat(np.arange(100), 30)
    first = data.split_indices(labels, 500, 43)
    torch.manual_seed(7)
    np.random.seed(7)
    for a, b in zip(first, data.split_indices(labels, 500, 43), strict=True):
        assert np.array_equal(a, b)
    assert not set(first[0]) & set(first[1])


def test_order_in_the_file_is_forgotten(real_copy, real_data):
    path = real_copy / "test.bin"
    table = np.fromfile(path, np.uint8).reshape(-1, data.RECORD)
    path.write_bytes(table[np.random.default_rng(1).permutation(len(table))].tobytes())
    found, expected = setup("data").sets["test"], setup(real_data).sets["test"]
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)


def test_pickled_form_and_archives_give_the_same_pictures(as_python, real_data, monkeypatch):
    expected = setup(real_data).sets["test"]
    monkeypatch.setitem(data.MD5, "cifar-100-python/test", md5(as_python / "test"))
    folders = [as_python.parent]
    for form in (as_python, real_data / "cifar-100-binary"):
        archive = Path(form.name, f"{form.name}.tar.gz")
        archive.parent.mkdir()
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            for path in sorted(form.glob("test*")):
                tar.add(path, f"{form.name}/{path.name}")
        monkeypatch.setitem(data.MD5, archive.name, md5(archive))
        folders.append(archive.parent)
    for folder in folders:
        if folder.name.startswith("cifar"):  # the archive must be read, not a folder beside it
            assert data.find(folder).suffix == ".gz"
        found = setup(folder).sets["test"]
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)


DAMAGE = {
    "truncated": (lambda raw: raw[:-1], "expected 153,700,000 bytes, found 153,699,999"),
    "a record short": (lambda raw: raw[: -data.RECORD], "found 153,696,926"),
    "empty": (lambda raw: b"", "expected 153,700,000 bytes, found 0"),
    "label": (
        lambda raw: raw[: 5 * data.RECORD + 1] + b"\x64" + raw[5 * data.RECORD + 2 :],
        "expected labels 0 to 99, found 100 in record 5",
    ),
    "pixel": (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "expected the official pictures"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_before_training(damage, real_copy, refused):
    change, message = DAMAGE[damage]
    path = real_copy / "train.bin"
    path.write_bytes(change(path.read_bytes()))
    line = refused(*FIT, code=1)
    assert str(Path("data/cifar-100-binary/train.bin")) in line
    assert message in line
    assert not Path("lightning_logs").exists()


def test_missing_member_is_named(own_folder, refused):
    Path("data/cifar-100-binary").mkdir(parents=True)
    assert "data/cifar-100-binary/train.bin: expected a readable file" in refused(*FIT, code=1)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_nothing_is_unpickled_before_its_md5_is_right(own_folder, refused):
    Path("data/cifar-100-python").mkdir(parents=True)
    Path("data/cifar-100-python/train").write_bytes(pickle.dumps(Trap()))
    line = refused(*FIT, code=1)
    assert "data/cifar-100-python/train: expected md5 16019d7e3df5f24257cddd939b257f8d" in line
    assert not Path("unpickled").exists()


def test_wrong_archive_is_refused(own_folder, refused):
    Path("data").mkdir()
    Path("data/cifar-100-binary.tar.gz").write_bytes(b"not the archive")
    assert "expected md5 03b5dce01913d631647c71ecec9e9cb8" in refused(*FIT, code=1)


@pytest.fixture
def server(own_folder, monkeypatch):
    """A server on this machine that offers what lies in the folder `offered`."""
    Path("offered").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory="offered")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        name = "cifar-100-python.tar.gz"
        monkeypatch.setattr(data, "URL", f"http://127.0.0.1:{running.server_port}/{name}")
        yield Path("offered", name)
        running.shutdown()


def test_download_is_whole_and_checked(server, monkeypatch):
    server.write_bytes(b"an archive")
    monkeypatch.setitem(data.MD5, server.name, md5(server))
    data.CIFAR100("deep/data").prepare_data()
    assert Path("deep/data", server.name).read_bytes() == b"an archive"
    assert len(list(Path("deep/data").iterdir())) == 1


@pytest.mark.parametrize("offered", [b"something else", None])
def test_failed_download_says_what_to_do_and_leaves_nothing(offered, server, refused):
    if offered:
        server.write_bytes(offered)
    line = refused(*FIT, code=1).split("allconv: ")[-1]
    for part in ("download failed", str(Path("data").absolute()), "train.bin 153,700,000",
                 "eb9058c3a382ffc7106e4002c42a8d85", "03b5dce01913d631647c71ecec9e9cb8",
                 "--data.demo true"):  # fmt: skip
        assert part in line
    assert not list(Path("data").iterdir())


def test_demo_is_the_same_everywhere():
    assert len(demo.CLASSES) == len(set(demo.CLASSES)) == 100
    digest = hashlib.sha256(demo.pictures("train").tobytes() + demo.pictures("test").tobytes())
    assert digest.hexdigest().startswith("d7660bc29b2ccd10")


def test_demo_is_drawn_once_and_read_from_its_files(own_folder):
    main([*FIT, "--data.demo", "true"])
    path = Path("data/cifar-100-demo/train.bin")
    written = path.stat().st_mtime_ns
    main([*FIT, "--data.demo", "true"])
    assert path.stat().st_mtime_ns == written
    assert np.fromfile(path, np.uint8).reshape(-1, data.RECORD)[:, 1].max() == 99


DEMO = ["fit", "--config", str(REPO / "configs/demo.yaml")]


def test_demo_is_learnt(own_folder):
    main(DEMO)
    main(["validate"])
    found = json.loads(Path("lightning_logs/version_0/validate.json").read_text())
    assert 0.60 < found["val/acc"] < 0.95


def test_demo_with_shuffled_labels_cannot_be_learnt(own_folder):
    """The figures come from the pictures: with training labels shuffled, chance is left."""
    data.CIFAR100(demo=True).prepare_data()
    path = Path("data/cifar-100-demo/train.bin")
    table = np.fromfile(path, np.uint8).reshape(-1, data.RECORD)
    table[:, 1] = table[np.random.default_rng(1).permutation(len(table)), 1]
    path.write_bytes(table.tobytes())
    main(DEMO)
    main(["test"])
    assert json.loads(Path("lightning_logs/version_0/test.json").read_text())["test/acc"] < 0.03
