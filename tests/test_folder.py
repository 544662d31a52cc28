"""Images of one's own: a folder with a subfolder per class, through every command."""

import json
import os
import re
import shutil
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from conftest import LAST, RUN
from PIL import Image
from safetensors.torch import load_file

from allconv import checkpoints, load
from allconv.__main__ import main
from allconv.data import CIFAR100
from allconv.datasets import images
from allconv.datasets.cifar100 import Images
from allconv.datasets.folder import ImageFolder
from allconv.model import AllCNN
from allconv.task import Classifier

FOLDERS = {"small": True, "at_once": True}  # how a folder is split
FIT = "fit --data.folder pets --model.width 2 --trainer.max_epochs 1".split()


def write(path, n, seed=0, size=(40, 36)):
    """N images of random colors."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *os.fsencode(path.name)])
    for i in range(n):
        pixels = np.full((*size, 3), rng.integers(256, size=3), np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")


def pets(train=12, val=0, test=5, classes=("ant_eater", "bat", "cat, $x$")):
    for split, n in (("train", train), ("val", val), ("test", test)):
        for name in classes if n else ():
            write(Path("pets", split, name), n, seed=len(split))


@pytest.fixture
def own_run(own_folder):
    """A tiny run on three classes."""
    pets()
    main(FIT)


def result(command):
    return json.loads((RUN / f"{command}.json").read_text())


def test_images_are_reduced_as_predict_does_and_sorted_by_path(own_folder):
    pets(val=2)
    data = CIFAR100(folder="pets")
    data.setup("fit")
    files = sorted(str(p) for p in Path("pets/train").rglob("*.png"))
    expected = torch.stack([images.reduce(images.read(file)) for file in files])
    assert torch.equal(data.sets["train"].images, expected)
    assert data.sets["train"].images.is_contiguous(memory_format=torch.channels_last)
    assert data.sets["train"].labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert data.sets["val"].labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_what_is_hidden_or_no_image_is_ignored(own_folder):
    pets()
    shutil.copytree("pets/train/bat", "pets/train/.ipynb_checkpoints")
    write(Path("pets/train/bat/.thumbnails"), 1)
    Path("pets/train/bat/._0.png").write_text("macOS")
    Path("pets/train/notes.txt").write_text("notes")
    Path("pets/train/bat/notes.txt").write_text("notes")
    found = ImageFolder.at("pets").load("train", 0)
    assert found["train"].labels.bincount().tolist() == [12, 12, 12]


@pytest.mark.parametrize(
    ("counts", "val_size", "expected"),
    [
        ([10, 10], 5000, [2, 2]),  # a fifth
        ([10, 10], 2, [1, 1]),
        ([100, 2, 10], 5000, [16, 1, 5]),  # never above half of a class
        ([100, 100, 100], 30, [10, 10, 10]),
        ([2, 2], 5000, None),  # at least one
    ],
)
def test_held_out_images_are_balanced_as_far_as_they_go(counts, val_size, expected):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    whole = Images(torch.arange(sum(counts)).view(-1, 1, 1, 1), labels)
    found = whole.split(val_size, 43, **FOLDERS)["val"]
    per_class = found.labels.bincount(minlength=len(counts)).tolist()
    assert per_class == expected if expected else sum(per_class) == 1
    assert torch.equal(found.images, whole.split(val_size, 43, **FOLDERS)["val"].images)


def test_the_split_is_of_its_seed():
    labels = torch.arange(3).repeat_interleave(40)
    whole = Images(torch.arange(120).view(-1, 1, 1, 1), labels)
    one, other = (whole.split(9, seed, **FOLDERS)["val"] for seed in (43, 1))
    assert not torch.equal(one.images, other.images)


def test_every_command_knows_the_classes(own_run, capfd):
    names = ("ant_eater", "bat", "cat, $x$")
    for command, n in (("test", 15), ("validate", 7)):
        main([command])
        found = result(command)
        assert (found["data"], found["remark"]) == ("pets", None)
        assert found["test/n" if command == "test" else "val/n"] == n
        assert (RUN / f"{command}_confusion.png").is_file()
    assert result("test")["test/top5"] == 1
    main(["report"])
    page = (RUN / "report.html").read_text()
    assert "cat, $x$" in page
    assert "superclass" not in page
    assert load("best").classes == names
    data = CIFAR100.load_from_checkpoint(LAST)
    trainer = lightning.Trainer(logger=False, enable_progress_bar=False)
    trainer.test(Classifier.load_from_checkpoint(LAST), data, ckpt_path=LAST, verbose=False)
    assert trainer.callback_metrics["test/n"] == 15
    capfd.readouterr()
    main("predict pets/test/bat/0.png --ckpt_path best --format json".split())
    top = json.loads(capfd.readouterr().out)[0]["top"]
    assert {best["class"] for best in top} == {*names}
    main(["runs"])
    assert " pets " in capfd.readouterr().out
    for file in ("net.safetensors", "net.onnx"):
        main(["export", "--out", file])
    assert load("net.safetensors").classes == names
    text = capfd.readouterr()
    assert str(Path.cwd()) not in json.dumps(checkpoints.load(Path("net.safetensors")).metadata)
    assert "--data.folder DIR" in text.out
    main("test --ckpt_path net.safetensors --data.folder pets".split())
    assert json.loads(Path("test.json").read_text())["test/acc"] == result("test")["test/acc"]
    import onnx

    metadata = {p.key: p.value for p in onnx.load("net.onnx").metadata_props}
    assert metadata["classes"].split(",") == ["ant_eater", "bat", "cat; $x$"]
    assert tuple(json.loads(metadata["allconv"])["classes"]) == names


def test_two_runs_are_compared(own_run):
    main([*FIT, "--seed_everything", "1"])
    main(["report", "lightning_logs/version_0", "lightning_logs/version_1", "--out", "ab.html"])
    assert "superclass" not in Path("ab.html").read_text()


def test_pretrained_weights_but_for_the_last_layer(own_folder, capfd):
    pets()
    main(
        "fit --config finetune --data.folder pets --trainer.max_epochs 1 --model.lr 1e-30 "
        "--model.weight_decay 0 --model.dirac true --model.whiten true "
        "--trainer.limit_train_batches 1 --trainer.limit_val_batches 0".split()
    )
    said = [line for line in capfd.readouterr().out.splitlines() if "last layer" in line]
    assert len(said) == 1
    assert "(100 classes there, 3 here)" in said[0]
    trained, packaged = checkpoints.load(LAST).weights, load_file(checkpoints.PRETRAINED)
    for name in ("conv1.0.weight", "conv5.0.weight", "conv8.1.weight"):
        assert torch.equal(trained[name], packaged[name])
    assert len(trained["conv9.0.weight"]) == 3


def test_finetune_needs_a_folder(own_folder, capfd):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "finetune"])
    assert capfd.readouterr().err == "allconv: data.folder is DIR: no such folder\n"


def test_two_classes(own_folder):
    pets(classes=("yes", "no"))
    main(FIT)
    main(["test"])
    assert result("test")["test/top5"] == 1
    main(["report"])
    page, wrong = (RUN / "report.html").read_text(), 1 - result("test")["test/acc"]
    told = [int(count) for count in re.findall(r"<h3>no and yes: (\d+) errors</h3>", page)]
    assert sum(told) == round(wrong * result("test")["test/n"])
    assert not re.search(r"<h3>(no and no|yes and yes)", page)
    assert ("there are no errors" in page) == (wrong == 0)
    assert "The other classes" not in page


@pytest.mark.slow
def test_a_thousand_classes(own_folder):
    for i in range(1000):  # of 2 x 3 pixels
        write(Path(f"many/train/{i:04}"), 2, size=(2, 3))
    main([*FIT, "--data.folder", "many"])
    last = checkpoints.load(LAST)
    assert (last.hparams["num_classes"], last.dataset.classes[999]) == (1000, "0999")
    main(["validate"])
    main(["report", "--split", "val"])


def test_resuming_takes_the_same_images_wherever_they_are(own_run, refused):
    shutil.move("pets", "moved")
    more = "fit --ckpt_path last --trainer.max_epochs 2 --data.folder moved".split()
    main(more)
    more[4] = "3"
    write(Path("moved/train/bat"), 13)
    assert "not those that the run was trained with" in refused(*more, code=1)
    main("validate --data.folder moved".split())  # "moved" is another data set by its name
    assert "trained on another data set" in result("validate_on_moved")["remark"]


def test_results_on_other_images_leave_those_of_the_run(own_run, capsys):
    main(["test"])
    before = Path("lightning_logs/version_0/test.json").read_bytes()
    shutil.copytree("pets", "other pets")
    main([*"test --data.folder".split(), "other pets"])
    assert Path("lightning_logs/version_0/test.json").read_bytes() == before
    assert "trained on another data set" in result("test_on_other_pets")["remark"]
    for name in ("test_on_other_pets.png", "test_on_other_pets_confusion.png"):
        assert Path("lightning_logs/version_0", name).is_file()


def test_changed_validation_images_are_remarked(own_run):
    write(Path("pets/train/bat"), 13, seed=1)
    main(["validate"])
    assert "may have seen some of these" in result("validate")["remark"]


def test_a_teacher_has_seen_the_same_folder(own_run, refused):
    teacher = ["--model.teacher", str(LAST)]
    main([*FIT, *teacher])
    assert "other images (pets) than these (the demo set" in refused(
        "fit", "--data.demo", "true", *teacher, code=1
    )
    write(Path("pets/train/bat"), 13, seed=1)
    assert "other images (pets)" in refused(*FIT, *teacher, code=1)
    main([*FIT, *teacher, "--data.val_size", "0"])


def test_without_validation_images(own_folder, refused, capfd):
    pets()
    main([*FIT, "--data.val_size", "0"])
    said = capfd.readouterr().out
    assert "36 training and 0 validation images" in said
    assert f"test --ckpt_path {LAST}" in said
    assert not LAST.with_name("best.ckpt").exists()
    assert f"name {LAST}" in refused("test", code=1)
    main(["test", "--ckpt_path", str(LAST)])
    assert "no validation images" in refused("validate", "--ckpt_path", LAST, code=1)
    main(["report", str(LAST)])
    assert "No temperature was fitted" in (RUN / "report.html").read_text()
    capfd.readouterr()
    assert "no validation images" in refused("report", LAST, "--split", "val", code=1)


BAD = {
    "missing": (lambda: shutil.rmtree("pets"), "data.folder is pets: no such folder"),
    "no train": (lambda: shutil.move("pets/train", "pets/other"), "; pets has other, test"),
    "val by another name": (lambda: write(Path("pets/Validation/bat"), 1),
                            "pets/Validation: rename it to pets/val"),
    "nothing": (lambda: shutil.rmtree("pets/train") or Path("pets/train").mkdir(), "found none"),
    "one class": (
        lambda: [shutil.rmtree(f"pets/train/{n}") for n in ("bat", "cat, $x$")],
        "found only ant_eater",
    ),
    "empty class": (lambda: Path("pets/train/dog").mkdir(), "train/dog: no images"),
    "one image": (lambda: write(Path("pets/train/dog"), 1), "only 1 image"),
    "other val": (lambda: write(Path("pets/val/dog"), 1) or write(Path("pets/val/bat"), 1),
                  "pets/val: its 2 classes are not the 3: without ant_eater, cat, $x$ and with"),
    "name": (lambda: Path("pets/train/a\nb").mkdir(), "not printable"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_one_line(name, own_folder, refused):
    pets()
    break_it, words = BAD[name]
    break_it()
    assert words in refused(*FIT, code=1)
    assert not RUN.exists()


def test_bad_test_folders_are_one_line(own_run, refused):
    write(Path("pets/test/dog"), 1)
    assert "pets/test: its 4 classes are not the 3: with dog" in refused("test", code=1)
    shutil.rmtree("pets/test")
    assert "no folder pets/test" in refused("test", code=1)
    shutil.move("pets/train/bat", "pets/train/dog")
    assert "has no class dog of pets" in refused("validate", code=2)


@pytest.mark.parametrize("n", [2, 12])
def test_bad_images_are_named_and_refused(n, own_folder, capfd):
    pets()
    for i in range(n):
        Path(f"pets/train/bat/{i}.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as end:
        main(FIT)
    lines = capfd.readouterr().err.splitlines()
    assert end.value.code == 1
    assert len(lines) == min(n, 10) + 1
    assert "pets/train/bat/0.png: not an image" in lines[0]
    assert f"{n} of 36 images cannot be read" in lines[-1]
    assert not RUN.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data.folder pets --model.num_classes 4", "num_classes is 4, but pets has 3"),
        ("--data.folder pets --data.demo true", "data.folder is pets: it must be null"),
        ("--data.folder pets --data.val_size -1", "data.val_size is -1: it must be from 0"),
        ("--data.demo true --model.num_classes 10", "num_classes is 10, but the demo set"),
    ],
)
def test_bad_usage_is_one_line(flags, words, own_folder, refused):
    pets()
    assert words in refused("fit", "--model.width", "2", *flags.split(), code=2)


@pytest.mark.parametrize("names", [None, 5, ["a", "b"], ["a", "b", 3], ["a", "b", "b"], {}])
def test_damaged_class_names_are_refused(names, own_run, refused):
    content = torch.load(LAST, weights_only=True)
    content["CIFAR100"]["classes"] = names
    torch.save(content, LAST)
    assert "does not name its 3 classes" in refused("test", "--ckpt_path", LAST, code=1)


def test_weights_without_names_are_tested_on_a_folder(own_run):
    state = torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    net = AllCNN(width=2, num_classes=3)
    net.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if "net." in k})
    torch.save(net.state_dict(), "bare.pt")
    main("test --ckpt_path bare.pt --data.folder pets".split())
    assert json.loads(Path("test.json").read_text())["data"] == "pets"
