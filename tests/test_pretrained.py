"""The weights in the package: what they say of themselves, and that they keep it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from allconv import runs
from allconv.__main__ import main
from allconv.data import CLASSES, MEAN, STD

FACTS = runs.load(runs.PRETRAINED).facts


def test_metadata_says_what_it_is():
    assert tuple(FACTS["classes"]) == CLASSES
    assert tuple(FACTS["mean"]) == MEAN
    assert tuple(FACTS["std"]) == STD
    assert FACTS["recipe"]["model"]["width"] == FACTS["hparams"]["width"] == 64
    assert FACTS["test"]["acc"] > 0.73
    assert runs.PRETRAINED.stat().st_size < 6e6


@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_published_figures_are_given_again_to_the_last_picture(
    command, split, real_data, own_folder
):
    main([command, "--ckpt_path", "pretrained", "--data.data_dir", str(real_data)])
    result = json.loads(Path(f"lightning_logs/pretrained/{command}.json").read_text())
    for name in ("acc", "top5", "n"):
        assert result[f"{split}/{name}"] == pytest.approx(FACTS[split][name], abs=1e-7)
    assert result[f"{split}/loss"] == pytest.approx(FACTS[split]["loss"], abs=1e-5)
    assert result["remark"] is None


def test_another_split_is_remarked(real_data, own_folder, capfd):
    main(
        "validate --ckpt_path pretrained --data.split_seed 1 --trainer.limit_val_batches 1 "
        f"--data.data_dir {real_data}".split()
    )
    assert "has seen some of these pictures" in capfd.readouterr().out


def test_training_starts_from_them(own_folder):
    main(
        "fit --init pretrained --data.demo true --trainer.max_epochs 1 --model.lr 1e-30 "
        "--model.weight_decay 0 --trainer.limit_train_batches 1".split()
    )
    trained = runs.load(runs.find_checkpoint("last", Path("lightning_logs"))).weights
    packaged = load_file(runs.PRETRAINED)
    assert torch.equal(trained["conv5.0.weight"], packaged["conv5.0.weight"])


def test_they_cannot_be_resumed(refused):
    assert "use --init" in refused("fit", "--ckpt_path", "pretrained", code=1)


def damaged(how: str) -> None:
    raw = runs.PRETRAINED.read_bytes()
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
