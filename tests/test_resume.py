"""A stopped run goes on exactly: weights, metrics.csv and TensorBoard as if never stopped."""

import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from allconv.__main__ import main

# dropout, augmentation and both kinds of schedule
RECIPES = {
    "notebook": "--model.milestones [1,3] --model.dropout 0.2",
    "strong": "--model.warmup 0.3 --model.muon_lr 0.05 --model.decay_norms false --data.crop 4 "
    "--data.flip true --data.sizes [[0.3,20],[0.6,24]] --data.cutmix 0.5 "
    "--model.dropout 0.1",
}
FIT = "fit --data.demo true --model.width 4 --trainer.max_epochs 5".split()


def curves(run):
    """(tag, step, value) of every scalar, as TensorBoard shows them."""
    board = EventAccumulator(str(run)).Reload()
    return {
        (tag, event.step, event.value)
        for tag in board.Tags()["scalars"]
        if not tag.startswith("hp/")
        for event in board.Scalars(tag)
    }


def lines(run):
    table = run / "metrics.csv"
    return table.read_text().splitlines() if table.exists() else []


def final(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_and_resumed_equals_never_stopped(recipe, own_folder, monkeypatch):
    """Twice killed with SIGKILL, once in the first epoch, each time resumed in a new process."""
    settings = [*FIT, *RECIPES[recipe].split(), "--trainer.limit_train_batches", "30"]
    main(settings)
    whole = Path("lightning_logs/version_0").absolute()

    Path("stopped").mkdir()
    monkeypatch.chdir("stopped")
    run = Path("lightning_logs/version_0")
    last = run / "checkpoints/last.ckpt"
    for args, rows in ((settings, 0), (["fit", "--ckpt_path", "last"], 4)):
        running = process(*args)
        while not last.exists() or len(lines(run)) < rows:
            assert running.poll() is None, running.stdout.read()
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL, running.stdout.read()
        running.stdout.close()
    main(["fit", "--ckpt_path", "last"])

    expected, found = final(whole), final(run)
    for key, value in expected["state_dict"].items():
        assert torch.equal(value, found["state_dict"][key]), key
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert curves(run) == curves(whole)
    assert len(list(Path("lightning_logs").iterdir())) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_with_their_code_and_the_way_on(number, code, own_folder):
    running = process(*FIT, "--trainer.max_epochs", "500")
    while not lines(Path("lightning_logs/version_0")):
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.05)
    running.send_signal(number)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == code, said
    assert "go on with: python -m allconv fit --ckpt_path" in said
    assert "Traceback" not in said
    assert "state_dict" in final(Path("lightning_logs/version_0"))


def test_longer_is_the_same_run_with_one_flag(run):
    main("fit --ckpt_path last --trainer.max_epochs 4".split())
    assert len(lines(run)) == 5
    assert "max_epochs: 4" in (run / "config.yaml").read_text()
    assert "ckpt_path: null" in (run / "config.yaml").read_text()


def test_failing_write_keeps_the_checkpoint_before(run, refused, monkeypatch):
    before = (run / "checkpoints/last.ckpt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    line = refused("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4", code=1)
    assert "No space left on device" in line
    assert (run / "checkpoints/last.ckpt").read_bytes() == before
    assert not list(run.rglob("*.writing"))
