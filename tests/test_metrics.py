"""Every number of a run against one made by hand: metrics.csv, evaluations, averaged weights."""

import csv
import json
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy

from allconv import load, rundir
from allconv.__main__ import main
from allconv.augment import normalize
from allconv.data import CIFAR100
from allconv.datasets.cifar100 import MEAN, STD
from allconv.model import AllCNN

RUN = Path("lightning_logs/version_0")


def rows(run=RUN):
    """The rows of metrics.csv, without empty cells."""
    with Path(run, "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


class Losses(pl.Callback):
    """Writes down epoch, number of images and loss of every training step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with Path("losses.txt").open("a") as file:
            loss = outputs["loss"].item() * trainer.accumulate_grad_batches
            print(trainer.current_epoch, len(batch[1]), loss, file=file)


# 11 batches an epoch, the last one of 200 images; images of 8 pixels take little time
FIT = (
    "fit --data.demo true --model.width 2 --data.batch_size 300 --data.sizes [[1,8]] "
    "--trainer.max_epochs 2 --trainer.limit_val_batches 1"
).split()
NOTED = [*FIT, "--trainer.callbacks+=test_metrics.Losses"]


def epoch_means():
    """Mean loss over the images of each epoch that was trained to its end."""
    epochs = {}
    for line in Path("losses.txt").read_text().splitlines():
        epoch, n, loss = line.split()
        epochs.setdefault(int(epoch), []).append((int(n), float(loss)))
    return {
        epoch: sum(n * loss for n, loss in steps) / sum(n for n, _ in steps)
        for epoch, steps in epochs.items()
        if len(steps) == 11
    }


RHYTHMS = {
    # flags and the epochs of each validation
    "every second, accumulated": (
        "--trainer.check_val_every_n_epoch 2 --trainer.accumulate_grad_batches 3",
        [1],
    ),
    "never": ("--trainer.limit_val_batches 0", []),
    "twice an epoch": ("--trainer.val_check_interval 0.5", [0, 0, 1, 1]),
    "by steps": ("--trainer.val_check_interval 15 --trainer.check_val_every_n_epoch null", [1]),
}


@pytest.mark.parametrize("rhythm", RHYTHMS)
def test_every_whole_epoch_has_its_mean_training_loss(rhythm, own_folder):
    flags, validated = RHYTHMS[rhythm]
    main([*NOTED, *flags.split()])
    found = rows()
    losses = {int(row["epoch"]): row["train/loss"] for row in found if "train/loss" in row}
    assert sum("train/loss" in row for row in found) == len(losses)
    assert list(losses) == [0, 1]
    assert losses == pytest.approx(epoch_means(), abs=1e-6)
    assert [int(row["epoch"]) for row in found if "val/acc" in row] == validated
    assert all("lr" in row for row in found if "train/loss" in row)


def test_an_epoch_that_was_broken_off_has_no_loss_until_it_is_whole(own_folder):
    main(NOTED)
    whole = rows()
    losses = {int(row["epoch"]): row["train/loss"] for row in whole}
    assert losses == pytest.approx(epoch_means(), abs=1e-6)
    main([*FIT, "--trainer.max_steps", "15"])
    assert rows("lightning_logs/version_1") == whole[:1]
    main("fit --ckpt_path last --trainer.max_steps -1".split())
    assert rows("lightning_logs/version_1") == whole


class Tables(pl.Callback):
    """Reads metrics.csv when the checkpoint of an epoch is about to be saved."""

    seen: ClassVar = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append([int(row["epoch"]) for row in rows() if "train/loss" in row])


def test_an_epochs_row_is_on_the_disk_before_its_checkpoint(own_folder):
    Tables.seen.clear()
    never = ["--trainer.limit_val_batches", "0", "--trainer.callbacks+=test_metrics.Tables"]
    main([*FIT, "--trainer.max_epochs", "3", *never])
    assert Tables.seen == [[0], [0, 1], [0, 1, 2]]


def test_a_stop_within_an_epoch_is_told_by_its_number(own_folder, capfd):
    main([*FIT, "--trainer.max_steps", "15", "--trainer.limit_val_batches", "0"])
    said = capfd.readouterr().out
    assert "stopped in epoch 2 at step 15: last.ckpt holds 1 whole epoch" in said


def test_an_epoch_that_is_not_validated_shows_no_validation(own_folder, capfd):
    main([*FIT, "--trainer.val_check_interval=15", "--trainer.check_val_every_n_epoch=null",
          "--trainer.max_epochs=3"])  # fmt: skip
    shown = [
        line.split()[2]
        for line in capfd.readouterr().out.splitlines()
        if line[:5].strip().isdigit()
    ]
    assert [value == "-" for value in shown] == [True, False, False]


@pytest.mark.parametrize(
    "precision", ["bf16-true", pytest.param("64-true", marks=pytest.mark.slow)]
)
def test_metrics_do_not_lose_precision_with_the_weights(precision, run):
    main(["test", "--trainer.precision", precision])
    found = written(run, "test")
    assert found["test/n"] == 1000
    exact = found["test/loss"] * 1000  # a bfloat16 mean has 8 bits
    assert exact != round(exact)
    main([*FIT, "--trainer.precision", precision, "--trainer.max_epochs", "1"])
    loss = rundir.read_metrics(run.with_name("version_1"))[0]["train/loss"]
    assert loss != torch.tensor(loss).bfloat16().item()
    # and other commands, and a student, use the network in float32
    best = str(run.with_name("version_1") / "checkpoints/best.ckpt")
    assert load(best)(torch.zeros(1, 3, 32, 32)).dtype == torch.float32
    main([*FIT, "--model.teacher", best, "--trainer.fast_dev_run", "1"])


def test_a_run_with_a_callback_of_ones_own_is_resumed_by_naming_it_again(own_folder):
    main([*NOTED, "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0"])
    own = "--trainer.callbacks+=test_metrics.Losses"
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2", own])
    assert [row["epoch"] for row in rows()] == [0, 1]


# --- evaluations


def evaluate(checkpoint, split):
    """Top-1, top-5 and loss by hand, with nothing of the project's but the net and the files."""
    content = torch.load(checkpoint, weights_only=True)
    net = AllCNN(content["hyper_parameters"]["width"])
    net.load_state_dict({k[4:]: v for k, v in content["state_dict"].items() if k[:4] == "net."})
    data = CIFAR100(demo=True)
    data.setup("test" if split == "test" else "fit")
    images, labels = data.sets[split].images, data.sets[split].labels
    with torch.no_grad():
        logits = [net.eval()(normalize(x, MEAN, STD)) for x in images.split(77)]
    logits = torch.cat(logits).double()
    right = logits.topk(5).indices == labels[:, None]
    return {
        "acc": right[:, 0].double().mean().item(),
        "top5": right.any(1).double().mean().item(),
        "loss": cross_entropy(logits, labels).item(),
        "n": len(labels),
    }


def written(run, command):
    return json.loads((run / f"{command}.json").read_text())


@pytest.mark.parametrize(
    ("command", "split", "eval_batch_size"),
    [("test", "test", 500), ("test", "test", 7), ("validate", "val", 333)],
)
def test_evaluations_are_of_the_whole_split(command, split, eval_batch_size, run, monkeypatch):
    monkeypatch.setattr(CIFAR100, "eval_batch_size", eval_batch_size)  # uneven last batches
    main([command])
    found = written(run, command)
    for name, value in evaluate(run / "checkpoints/best.ckpt", split).items():
        assert found[f"{split}/{name}"] == pytest.approx(value, abs=1e-5)


def test_training_logs_what_validate_finds(run):
    main(["validate"])
    best = max(rows(run), key=lambda row: row["val/acc"])
    for name in ("val/acc", "val/top5", "val/loss", "val/n"):
        assert written(run, "validate")[name] == pytest.approx(best[name], abs=1e-6)


def test_flip_averaging_is_reported_apart(run, capsys):
    plain = written(run, "test")  # of the fixture
    assert "test/acc_flip" not in plain
    main(["test", "--model.flip_test", "true"])
    both = written(run, "test")
    assert both["test/acc"] == plain["test/acc"]
    assert f"test/acc_flip  {both['test/acc_flip']:.4f}" in capsys.readouterr().out


def test_the_notebooks_own_checkpoint_is_tested(own_folder):
    torch.save(AllCNN(width=4).state_dict(), "epoch9.pt")
    main("test --ckpt_path epoch9.pt --data.demo true".split())
    assert json.loads(Path("test.json").read_text())["test/n"] == 1000


# --- averaged weights

EMA = (
    "fit --data.demo true --model.width 2 --trainer.limit_train_batches 4 --model.dropout 0.1 "
    "--data.crop 2 --trainer.callbacks+=EMAWeightAveraging --trainer.callbacks.decay 0.8"
).split()


def last(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def assert_equal(one, other, where=""):
    """Two nested structures are equal to the bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, list | tuple):
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}/{i}")
    else:
        assert one == other, where


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="Lightning 2.6 has it")
def test_averaged_weights_are_resumed_exactly_and_evaluated(own_folder, monkeypatch):
    main([*EMA, "--trainer.max_epochs", "2"])
    whole = RUN.absolute()
    Path("stopped").mkdir()
    monkeypatch.chdir("stopped")
    main([*EMA, "--trainer.max_epochs", "1"])
    main("fit --ckpt_path last --trainer.max_epochs 2".split())

    one, other = last(whole), last(RUN)
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert_equal(one[key], other[key], key)
    assert rows(whole) == rows()
    averaged, current = one["state_dict"], one["current_model_state"]
    assert not torch.equal(averaged["net.conv9.0.weight"], current["net.conv9.0.weight"])
    # what was validated are the averaged weights, and they are what is evaluated later
    main(["validate", "--ckpt_path", "last"])
    expected = evaluate(RUN / "checkpoints/last.ckpt", "val")
    assert rows()[-1]["val/loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert written(RUN, "validate_last")["val/loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_loss_of_a_step_is_not_that_which_lightning_divided(own_folder):
    main([*NOTED, "--trainer.accumulate_grad_batches", "3", "--trainer.log_every_n_steps", "2"])
    board = EventAccumulator(str(RUN)).Reload().Scalars("train/loss_step")
    losses = [float(line.split()[2]) for line in Path("losses.txt").read_text().splitlines()]
    # the second, fourth ... and the last of 11 batches, in each of two epochs
    expected = [loss for i, loss in enumerate(losses) if i % 11 % 2 or i % 11 == 10]
    assert [event.value for event in board] == pytest.approx(expected)


def test_best_within_the_first_epoch_is_tested(own_folder, capfd):
    """Validated after the eighth of 11 batches only."""
    main([*FIT, "--trainer.max_epochs", "1", "--trainer.val_check_interval", "8"])
    assert "next: python -m allconv test" in capfd.readouterr().out
    main(["test"])
    assert (RUN / "test.json").is_file()
