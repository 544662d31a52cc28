"""The packaged weights: what their metadata says of them, and that they keep it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allconv import checkpoints
from allconv.__main__ import main
from allconv.datasets.cifar100 import CLASSES, MEAN, STD

METADATA = checkpoints.load(checkpoints.PRETRAINED).metadata


def test_metadata_says_what_it_is():
    assert tuple(METADATA["classes"]) == CLASSES
    assert tuple(METADATA["mean"]) == MEAN
    assert tuple(METADATA["std"]) == STD
    assert METADATA["recipe"]["model"]["width"] == METADATA["hparams"]["width"] == 64
    assert METADATA["test"]["acc"] == pytest.approx(0.7632)
    assert checkpoints.PRETRAINED.stat().st_size < 6e6


def result(command):
    return json.loads(Path(f"lightning_logs/pretrained/{command}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_published_numbers_are_given_again_to_the_last_image(command, split, real_data, own_folder):
    main([command, "--ckpt_path", "pretrained", "--data.data_dir", str(real_data)])
    found = result(command)
    for name in ("acc", "top5", "n"):
        assert found[f"{split}/{name}"] == pytest.approx(METADATA[split][name], abs=1e-7)
    assert found["remark"] is None


def test_a_part_of_the_test_images(real_data, own_folder, capsys):
    """The short form of the test above: 500 images."""
    main(
        "test --ckpt_path pretrained --trainer.limit_test_batches 1 --model.flip_test false "
        f"--data.data_dir {real_data}".split()
    )
    said = capsys.readouterr().out
    assert float(said.split("test/acc")[1].split()[0]) > 0.65
    assert "nothing is written: these are 500 of 10,000 images" in said


def test_another_split_is_remarked(real_data, own_folder, capfd, monkeypatch):
    monkeypatch.setattr("allconv.data.CIFAR100.eval_batch_size", 50)
    main(
        "validate --ckpt_path pretrained --data.split_seed 1 --trainer.limit_val_batches 1 "
        f"--data.data_dir {real_data}".split()
    )
    assert "may have seen some of these" in capfd.readouterr().out


def test_training_starts_from_them(own_folder):
    main(
        "fit --init pretrained --data.demo true --trainer.max_epochs 1 --model.lr 1e-30 "
        "--model.weight_decay 0 --trainer.limit_train_batches 1 --trainer.limit_val_batches 0 "
        "--data.batch_size 2".split()
    )
    trained = checkpoints.load(checkpoints.find("last")).weights
    packaged = load_file(checkpoints.PRETRAINED)
    for name in ("conv1.0.weight", "conv5.0.weight", "conv9.0.bias"):
        assert torch.equal(trained[name], packaged[name])


def test_they_cannot_be_resumed(refused):
    assert "use --init" in refused("fit", "--ckpt_path", "pretrained", code=1)


def damaged(how: str) -> None:
    raw = checkpoints.PRETRAINED.read_bytes()
    if how == "cut":
        Path("net.safetensors").write_bytes(raw[:-1000])
    elif how == "text":
        Path("net.safetensors").write_text("no weights")
    elif how == "empty":
        Path("net.safetensors").touch()
    else:
        save_file({"conv1.0.weight": torch.zeros(4, 3, 3, 3)}, "net.safetensors")


@pytest.mark.parametrize("how", ["cut", "text", "empty", "of another program"])
def test_damaged_weights_are_refused(how, own_folder, refused):
    damaged(how)
    assert "net.safetensors" in refused("test", "--ckpt_path", "net.safetensors", code=1)
