"""The task: against a plain loop, and its figures against a hand-written evaluation."""

import csv
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset

from allconv.__main__ import main
from allconv.data import CIFAR100, normalize
from allconv.model import AllCNN
from allconv.task import Classifier


def rows(run):
    with Path(run, "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


class Losses(pl.Callback):
    """Collects the loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.values.append(outputs["loss"].item())


RECIPES = {
    "notebook": {"dropout": 0.0},
    "muon": {"dropout": 0.0, "rectify_logits": False, "muon_lr": 0.05, "decay_norms": False},
}


def trainer(*callbacks, **settings):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


def test_lightning_gives_the_losses_of_a_plain_loop(own_folder):
    pl.seed_everything(1, verbose=False)
    data = CIFAR100(demo=True, batch_size=50)
    task = Classifier(width=4, dropout=0.0)
    plain = AllCNN(4, dropout=0.0).to(memory_format=torch.channels_last)
    plain.load_state_dict(task.net.state_dict())
    found = Losses()
    trainer(found, max_epochs=1, limit_train_batches=8, limit_val_batches=0).fit(task, data)

    expected = []
    sgd = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=2e-5, fused=True)
    for step, (images, labels) in enumerate(data.train_dataloader()):
        if step == 8:
            break
        loss = cross_entropy(plain(normalize(images)), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        expected.append(loss.item())
    assert found.values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_overfits_one_batch(recipe, own_folder):
    data, losses = CIFAR100(demo=True, batch_size=32), Losses()
    data.prepare_data()
    data.setup("fit")
    data.sets["train"] = Subset(data.sets["train"], range(0, 3200, 100))
    task = Classifier(width=16, **RECIPES[recipe])
    trainer(losses, max_epochs=60, limit_val_batches=0, log_every_n_steps=1).fit(task, data)
    # the rectified net of the notebook cannot push a wrong class below zero
    assert losses.values[-1] < losses.values[0] / 4


def test_rate_halves_after_20_epochs(own_folder):
    main(
        "fit --data.demo true --model.width 2 --trainer.max_epochs 22 "
        "--trainer.limit_train_batches 1 --trainer.limit_val_batches 1".split()
    )
    rates = {row["epoch"] + 1: row["lr"] for row in rows("lightning_logs/version_0")}
    assert [rates[epoch] for epoch in (1, 19, 20, 21, 22)] == pytest.approx(
        [0.1, 0.1, 0.1, 0.05, 0.05]
    )


def test_warmup_rises_to_lr_and_falls_to_zero(own_folder):
    main(
        "fit --data.demo true --model.width 2 --trainer.max_epochs 10 --model.warmup 0.3 "
        "--trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --model.lr 0.2".split()
    )
    rates = [row["lr"] for row in rows("lightning_logs/version_0")]
    assert rates == pytest.approx([0.05, 0.11, 0.17, *(0.2 * k / 14 for k in range(13, 0, -2))])


def evaluate(checkpoint, split):
    """Top-1, top-5 and loss by hand, with nothing of the project's but the net and the files."""
    content = torch.load(checkpoint, weights_only=True)
    net = AllCNN(content["hyper_parameters"]["width"])
    net.load_state_dict({k[4:]: v for k, v in content["state_dict"].items() if k[:4] == "net."})
    data = CIFAR100(demo=True)
    data.setup("test" if split == "test" else "fit")
    images, labels = data.sets[split].images, data.sets[split].labels
    with torch.no_grad():
        logits = torch.cat([net.eval()(normalize(x)) for x in images.split(77)]).double()
    right = logits.topk(5).indices == labels[:, None]
    return {
        "acc": right[:, 0].double().mean().item(),
        "top5": right.any(1).double().mean().item(),
        "loss": cross_entropy(logits, labels).item(),
        "n": len(labels),
    }


@pytest.mark.parametrize(("command", "split"), [("test", "test"), ("validate", "val")])
@pytest.mark.parametrize("eval_batch_size", [500, 333, 7])
def test_figures_are_those_of_the_whole_split(command, split, eval_batch_size, run, monkeypatch):
    monkeypatch.setattr(CIFAR100, "eval_batch_size", eval_batch_size)  # uneven last batches
    main([command])
    found = json.loads((run / f"{command}.json").read_text())
    expected = evaluate(run / "checkpoints/best.ckpt", split)
    for name, value in expected.items():
        assert found[f"{split}/{name}"] == pytest.approx(value, abs=1e-6)


def test_training_logs_the_figures_that_validate_finds(run):
    main(["validate"])
    found = json.loads((run / "validate.json").read_text())
    best = max(rows(run), key=lambda row: row["val/acc"])
    for name in ("val/acc", "val/top5", "val/loss", "val/n"):
        assert found[name] == pytest.approx(best[name], abs=1e-6)


def test_flip_averaging_is_reported_apart(run):
    main(["test"])
    plain = json.loads((run / "test.json").read_text())
    assert "test/acc_flip" not in plain
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("flip_test: false", "flip_test: true"))
    content = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    content["hyper_parameters"]["flip_test"] = True
    torch.save(content, run / "checkpoints/best.ckpt")
    main(["test"])
    both = json.loads((run / "test.json").read_text())
    assert both["test/acc"] == plain["test/acc"]
    assert 0 <= both["test/acc_flip"] <= 1


def test_the_notebooks_own_checkpoint_is_tested(run):
    torch.save(AllCNN(width=4).state_dict(), "epoch9.pt")
    main("test --ckpt_path epoch9.pt --data.demo true".split())
    assert json.loads(Path("test.json").read_text())["test/n"] == 1000


class Seen(pl.Callback):
    """Keeps the last batches."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train = batch

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val = batch


def test_cutmix_is_of_training_alone(own_folder):
    seen, data = Seen(), CIFAR100(demo=True, cutmix=1.0)
    short = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1}
    trainer(seen, **short).fit(Classifier(width=4), data)
    pictures, labels = seen.train
    assert labels.shape == (64, 100)
    assert torch.allclose(labels.sum(1), torch.ones(64))
    assert ((labels > 0).sum(1) == 2).any()
    # a label's share is its picture's share of the area
    shares = labels.max(1).values.unique()
    assert torch.allclose(shares * 32 * 32, (shares * 32 * 32).round(), atol=1e-2)
    assert pictures.shape == (64, 3, 32, 32)
    assert seen.val[1].shape == (500,)
