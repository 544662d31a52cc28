"""Two processes on a CPU, through the real command, against one."""

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, process

from allconv import data

TWO = "--trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp".split()


def finish(*args):
    running = process(*args)
    said, _ = running.communicate(timeout=180)
    assert running.returncode == 0, said
    return said


def test_two_processes_count_each_picture_once(own_folder):
    fit = "fit --data.demo true --model.width 4 --trainer.max_epochs 2 --data.val_size 300".split()
    finish(*fit, "--trainer.limit_train_batches", "5", *TWO)
    assert [p.name for p in Path("lightning_logs").iterdir()] == ["version_0"]
    # an odd number of pictures, so that the processes hold unequal counts
    path = Path("data/cifar-100-demo/test.bin")
    path.write_bytes(path.read_bytes()[: 3074 * 501])
    found = {}
    one = "--trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto".split()
    for name, how in (("two", TWO), ("one", one)):
        finish("test", *how)
        found[name] = json.loads(Path("lightning_logs/version_0/test.json").read_text())
    for key in ("test/acc", "test/top5", "test/n"):
        assert found["one"][key] == found["two"][key]
    assert found["two"]["test/n"] == 501
    assert found["one"]["test/loss"] == pytest.approx(found["two"]["test/loss"], abs=1e-6)


@pytest.mark.parametrize("recipe", ["notebook", "strong"])
def test_resume_of_two_processes_is_exact(recipe, own_folder):
    fit = "fit --data.demo true --model.width 4 --trainer.limit_train_batches 6".split()
    # without what is a share of max_epochs, since that changes when the run goes on
    options = {
        "notebook": "--model.milestones [1] --model.dropout 0.2",
        "strong": f"--config {REPO}/configs/strong.yaml --model.warmup null",
    }
    settings = [*fit, *options[recipe].split(), "--data.sizes", "[]", *TWO]
    finish(*settings, "--trainer.max_epochs", "3")
    finish(*settings, "--trainer.max_epochs", "2")
    finish("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3")
    whole, resumed = (
        torch.load(f"lightning_logs/version_{n}/checkpoints/last.ckpt", weights_only=True)
        for n in (0, 1)
    )
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key


def test_a_process_that_fails_ends_the_run_with_its_own_error(own_folder):
    """The second process finds the data cut off, while the first waits for it."""
    data.CIFAR100(demo=True).prepare_data()
    running = process(*"fit --data.demo true --model.width 4".split(), *TWO)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    while not children.read_text():
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.05)
    Path("data/cifar-100-demo/train.bin").write_bytes(b"cut")
    said, _ = running.communicate(timeout=600)
    assert running.returncode != 0
    assert "data/cifar-100-demo/train.bin: expected a multiple of 3,074 bytes, found 3" in said
