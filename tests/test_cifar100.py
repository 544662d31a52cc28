"""The official files: read in every form, refused when damaged, downloaded."""

import hashlib
import http.server
import os
import pickle
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import cifar

from allconv.data import CIFAR100
from allconv.datasets import cifar100, demo

# of the small set: 4,000 and 1,000 images
FIT = (
    "fit --model.width 2 --trainer.max_epochs 1 --trainer.limit_train_batches 2 --data.val_size 500"
).split()
RECORD = 2 + 3 * 32 * 32


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture(scope="session")
def tables():
    """The demo images with CIFAR-100's own superclasses: records of a small CIFAR-100."""
    found = {split: demo.records(split) for split in ("train", "test")}
    for table in found.values():
        table[:, 0] = cifar100.COARSE[table[:, 1]]
    return found


@pytest.fixture
def official(tables, monkeypatch):
    """The small set is taken for the official one; gives its images as they have to be read."""
    found = {}
    for split, table in tables.items():
        # sorted by label and pixel bytes, with Python's own sort
        records = b"".join(sorted(record.tobytes()[1:] for record in table))
        monkeypatch.setitem(cifar100.COUNT, split, len(table))
        monkeypatch.setitem(cifar100.CONTENT, split, hashlib.sha256(records).hexdigest())
        content = np.frombuffer(records, np.uint8).reshape(-1, RECORD - 1)
        labels = torch.tensor(content[:, 0]).long()
        found[split] = torch.tensor(content[:, 1:]).view(-1, 3, 32, 32), labels
    return found


def write_binary(tables, data_dir):
    """The small set in the binary form."""
    folder = Path(data_dir, "cifar-100-binary")
    folder.mkdir(parents=True)
    for split, table in tables.items():
        (folder / f"{split}.bin").write_bytes(table.tobytes())
    return folder


def as_python_2(content):
    """Pickled as the official files are: by Python 2 and a numpy of its time."""
    text = pickle.dumps(content, protocol=2)
    text = text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    return text.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")  # dtype('u1', 0, 1): ints, not bools


def write_python(tables, data_dir, monkeypatch):
    """The small set in the pickled form, with its md5 where torchvision keeps the official ones."""
    folder = Path(data_dir, "cifar-100-python")
    folder.mkdir(parents=True)
    for split, table in tables.items():
        content = {"fine_labels": table[:, 1].tolist(), "data": np.ascontiguousarray(table[:, 2:])}
        (folder / split).write_bytes(as_python_2(content))
        monkeypatch.setattr(cifar.CIFAR100, f"{split}_list", [[split, md5(folder / split)]])
    (folder / "meta").write_bytes(as_python_2({"fine_label_names": list(cifar100.CLASSES)}))
    meta = {"filename": "meta", "key": "fine_label_names", "md5": md5(folder / "meta")}
    monkeypatch.setattr(cifar.CIFAR100, "meta", meta)
    return folder


def pack(folder, data_dir):
    """The archive of a folder, in another folder."""
    archive = Path(data_dir, f"{folder.name}.tar.gz")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz", compresslevel=0) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"{folder.name}/{path.name}")
    return archive


def read(data_dir):
    """All training images and the test images, as the data module has them."""
    module = CIFAR100(str(data_dir), val_size=500)
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    train, val, test = (module.sets[split] for split in ("train", "val", "test"))
    both = torch.cat([train.images, val.images]), torch.cat([train.labels, val.labels])
    return {"train": both, "test": (test.images, test.labels)}


def assert_same(found, expected):
    """Each image once with its label; the test images in canonical order as well."""
    for split, (images, labels) in expected.items():
        rows = torch.cat([labels[:, None].to(torch.uint8), images.flatten(1)], 1).numpy()
        images, labels = found[split]
        other = torch.cat([labels[:, None].to(torch.uint8), images.flatten(1)], 1).numpy()
        if split == "train":
            other = np.array(sorted(map(bytes, other)))
            rows = np.array(sorted(map(bytes, rows)))
        assert np.array_equal(other, rows), split


@pytest.fixture(params=["binary", "python", "binary archive", "python archive"])
def form(request, tables, official, monkeypatch):
    """The small set in one of its official forms, in the folder `data`."""
    kind, _, archive = request.param.partition(" ")
    where = "unpacked" if archive else "data"
    folder = (
        write_binary(tables, where)
        if kind == "binary"
        else write_python(tables, where, monkeypatch)
    )
    if archive:
        digest = md5(pack(folder, "data"))
        monkeypatch.setattr(cifar100, "BINARY_MD5", digest)
        monkeypatch.setattr(cifar.CIFAR100, "tgz_md5", digest)
    monkeypatch.setattr(cifar.CIFAR100, "url", "http://127.0.0.1:9/nothing-is-downloaded")
    return request.param


def test_every_official_form_gives_the_same_images(form, official):
    assert_same(read("data"), official)


def test_order_in_the_file_is_forgotten(tables, official, own_folder):
    draws = np.random.default_rng(1)
    mixed = {split: table[draws.permutation(len(table))] for split, table in tables.items()}
    write_binary(mixed, "data")
    found, (images, labels) = read("data"), official["test"]
    assert torch.equal(found["test"][0], images)
    assert torch.equal(found["test"][1], labels)
    write_binary(tables, "plain")
    for one, other in zip(found["train"], read("plain")["train"], strict=True):
        assert torch.equal(one, other)  # and with it the split and the shuffling


def test_images_are_channels_last_in_memory(tables, official, own_folder):
    write_binary(tables, "data")
    for found in cifar100.Official(Path("data")).load("train", val_size=500).values():
        assert found.images.dtype == torch.uint8
        assert found.labels.dtype == torch.int64
        assert found.images.is_contiguous(memory_format=torch.channels_last)


DAMAGE = {
    "truncated": (lambda raw: raw[:-1], "expected 12,296,000 bytes, found 12,295,999"),
    "a record short": (lambda raw: raw[:-RECORD], "found 12,292,926"),
    "empty": (lambda raw: b"", "expected 12,296,000 bytes, found 0"),
    "label": (lambda raw: raw[: 5 * RECORD + 1] + b"\x64" + raw[5 * RECORD + 2 :], "record 5"),
    "superclass": (lambda raw: raw[: 7 * RECORD] + b"\x13" + raw[7 * RECORD + 1 :], "record 7"),
    "pixel": (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "expected the official images"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_before_training(damage, tables, official, refused):
    change, message = DAMAGE[damage]
    path = write_binary(tables, "data") / "train.bin"
    path.write_bytes(change(path.read_bytes()))
    line = refused(*FIT, code=1)
    assert str(Path("data/cifar-100-binary/train.bin")) in line
    assert message in line
    assert not Path("lightning_logs").exists()


def test_missing_file_is_named(tables, official, refused):
    (write_binary(tables, "data") / "test.bin").unlink()
    line = refused("test", "--ckpt_path", "pretrained", code=1)
    assert "test.bin" in line
    assert "(data_dir)" in line or "data/cifar-100-binary" in line


def test_a_pipe_is_no_data_file(tables, official, refused):
    path = write_binary(tables, "data") / "train.bin"
    path.unlink()
    os.mkfifo(path)
    assert "train.bin" in refused(*FIT, code=1)


def test_an_empty_folder_of_the_other_form_hides_nothing(tables, official):
    write_binary(tables, "data")
    Path("data/cifar-100-python").mkdir()
    assert_same(read("data"), official)


class Trap:
    """Leaves a folder behind when it is unpickled."""

    def __reduce__(self):
        return Path.mkdir, (Path("unpickled"),)


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_nothing_is_unpickled_before_its_md5_is_right(name, tables, official, monkeypatch, refused):
    path = write_python(tables, "data", monkeypatch) / name
    expected = md5(path)
    path.write_bytes(pickle.dumps(Trap()))
    line = refused(*FIT, code=1)
    assert "data/cifar-100-python" in line
    if name != "meta":
        assert f"{name}: expected md5 {expected}" in line
    assert not Path("unpickled").exists()
    assert not Path("lightning_logs").exists()


def test_wrong_archive_is_refused(own_folder, refused):
    Path("data").mkdir()
    Path("data/cifar-100-binary.tar.gz").write_bytes(b"not the archive")
    assert "expected md5 03b5dce01913d631647c71ecec9e9cb8" in refused(*FIT, code=1)


def test_official_md5_are_torchvisions():
    assert cifar.CIFAR100.tgz_md5 == cifar100.PYTHON_MD5
    assert cifar.CIFAR100.train_list == [["train", "16019d7e3df5f24257cddd939b257f8d"]]
    assert cifar.CIFAR100.test_list == [["test", "f0ef6b0ae62326f3e7ffdfab6717acfc"]]


NAME = "cifar-100-python.tar.gz"


class Offer(http.server.ThreadingHTTPServer):
    """A server that does not mind when its client goes away."""

    daemon_threads = True

    def handle_error(self, *args):
        pass


class Server(http.server.BaseHTTPRequestHandler):
    """Offers one file, or fails to in the way that it is told."""

    content, fault = b"", None
    stop = threading.Event()

    def do_HEAD(self):
        if self.fault == "missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        if self.fault == "cut":
            self.wfile.write(self.content[: len(self.content) // 2])
        elif self.fault == "stalls":
            self.wfile.write(self.content[:10])
            self.wfile.flush()
            self.stop.wait(20)
        elif self.fault == "other":
            self.wfile.write(self.content[::-1])
        elif self.fault is None:
            self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tables, official, own_folder, monkeypatch):
    """A server that torchvision takes for the official one; it has the small data set."""
    archive = pack(write_python(tables, "source", monkeypatch), "offered")
    monkeypatch.setattr(Server, "content", archive.read_bytes())
    monkeypatch.setattr(Server, "fault", None)
    Server.stop.clear()
    with Offer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/{NAME}"
        monkeypatch.setattr(cifar.CIFAR100, "url", url)
        monkeypatch.setattr(cifar.CIFAR100, "tgz_md5", md5(archive))
        yield Server
        Server.stop.set()
        running.shutdown()


def test_download_is_whole_checked_and_read(server, official, capfd):
    assert_same(read("deep/data"), official)
    assert md5(Path("deep/data", NAME)) == cifar.CIFAR100.tgz_md5
    assert f"downloading {cifar.CIFAR100.url}" in capfd.readouterr().out
    assert cifar100.socket.getdefaulttimeout() is None  # the time limit was the download's
    server.fault = "missing"  # from now on nothing is downloaded
    assert_same(read("deep/data"), official)


@pytest.mark.parametrize("fault", ["missing", "cut", "other", "stalls"])
def test_failed_download_says_what_to_do_and_the_next_one_works(
    fault, server, official, refused, monkeypatch
):
    server.fault = fault
    limit = cifar100.socket.setdefaulttimeout  # half a second instead of a minute
    shorter = {60: 0.5, None: None}
    monkeypatch.setattr(cifar100.socket, "setdefaulttimeout", lambda s: limit(shorter[s]))
    line = refused(*FIT, code=1).split("allconv: ")[-1]
    for part in ("download failed", str(Path("data").absolute()), "169,001,437 bytes",
                 "eb9058c3a382ffc7106e4002c42a8d85", "03b5dce01913d631647c71ecec9e9cb8",
                 "train.bin 12,296,000", "fit --config demo"):  # fmt: skip
        assert part in line
    assert not Path("lightning_logs").exists()
    server.stop.set()
    server.fault = None
    shorter[60] = 60  # on a busy machine nothing may come for half a second
    assert_same(read("data"), official)


def test_a_server_that_refuses_is_a_failed_download(own_folder, monkeypatch, refused):
    monkeypatch.setattr(cifar.CIFAR100, "url", f"http://127.0.0.1:9/{NAME}")
    assert "download failed" in refused(*FIT, code=1)
