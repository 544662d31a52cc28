"""The task under a plain Trainer: against a plain loop, its schedules, its initialization."""

import shutil

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from allconv import task as task_module
from allconv.augment import normalize
from allconv.data import CIFAR100
from allconv.datasets.cifar100 import MEAN, STD, Images
from allconv.model import AllCNN, biases_before_norm, whiten_
from allconv.task import Classifier

# the command line turns these off for itself; under a plain Trainer they are Lightning's to say
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
]


class Seen(pl.Callback):
    """Keeps the loss, the rate and the image size of every step, and the last batches."""

    def __init__(self):
        self.losses, self.rates, self.sizes = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train = batch
        self.sizes.append(batch[0].shape[-1])

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.losses.append(outputs["loss"].item())
        self.rates.append(pl_module.rate)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val = batch


RECIPES = {
    "notebook": {"dropout": 0.0},
    "muon": {"dropout": 0.0, "rectify_logits": False, "muon_lr": 0.05, "decay_norms": False},
}


def trainer(*callbacks, **settings):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    return pl.Trainer(**{**defaults, **settings}, callbacks=list(callbacks))


def normalized(images):
    return normalize(images, MEAN, STD)


def test_lightning_gives_the_losses_of_a_plain_loop(own_folder):
    pl.seed_everything(1, verbose=False)
    data = CIFAR100(demo=True, batch_size=50)
    task = Classifier(width=4, dropout=0.0)
    plain = AllCNN(4, dropout=0.0).to(memory_format=torch.channels_last)
    plain.load_state_dict(task.net.state_dict())
    found = Seen()
    trainer(found, max_epochs=1, limit_train_batches=8).fit(task, data)

    expected = []
    sgd = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=2e-5, fused=True)
    for step, (images, labels) in enumerate(data.train_dataloader()):
        if step == 8:
            break
        loss = cross_entropy(plain(normalized(images)), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        expected.append(loss.item())
    assert found.losses == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_overfits_one_batch(recipe, own_folder):
    data, seen = CIFAR100(demo=True, batch_size=20), Seen()
    data.prepare_data()
    data.setup("fit")
    data.sets["train"] = Images(*data.sets["train"].batch(range(0, 3200, 160)))
    task = Classifier(width=8, **RECIPES[recipe])
    trainer(seen, max_epochs=50, log_every_n_steps=1).fit(task, data)
    # the rectified network of the notebook cannot push a wrong class below zero
    assert seen.losses[-1] < seen.losses[0] / 4


# --- the learning rate


def rates(task, **settings):
    """The rate of each epoch's last step, 2 of 22 batches an epoch."""
    seen, images = Seen(), torch.randn(8, 3, 8, 8)
    loader = DataLoader(TensorDataset(images, torch.arange(8)), 2)
    trainer(seen, log_every_n_steps=1, **settings).fit(task, loader)
    batches = len(seen.rates) // settings["max_epochs"]
    return seen.rates[batches - 1 :: batches]


def test_rate_halves_after_20_epochs(own_folder):
    found = rates(Classifier(width=2), max_epochs=42, limit_train_batches=1)
    assert found == pytest.approx([0.1] * 20 + [0.05] * 20 + [0.025] * 2)


TRIANGLE = [0.05, 0.11, 0.17, *(0.2 * k / 14 for k in range(13, 0, -2))]


@pytest.mark.parametrize(
    "settings",
    [{"limit_train_batches": 2}, {"limit_train_batches": 4, "accumulate_grad_batches": 3}],
)
def test_warmup_rises_to_lr_and_falls_to_zero(settings, own_folder):
    found = rates(Classifier(width=2, warmup=0.3, lr=0.2), max_epochs=10, **settings)
    assert found == pytest.approx(TRIANGLE)


def test_max_steps_ends_a_run_without_changing_its_schedule(own_folder):
    settings = {"max_epochs": 10, "limit_train_batches": 2}
    found = Seen()
    task = Classifier(width=2, warmup=0.3, lr=0.2)
    data = CIFAR100(demo=True, batch_size=4)
    trainer(found, max_steps=7, log_every_n_steps=1, **settings).fit(task, data)
    assert len(found.rates) == 7
    assert found.rates[1::2] == pytest.approx(TRIANGLE[:3])


@pytest.mark.parametrize(("task", "data"), [({"warmup": 0.3}, {}), ({}, {"sizes": ((0.5, 16),)})])
def test_shares_of_a_run_without_an_end_are_refused(task, data, own_folder):
    run = trainer(max_epochs=-1, max_steps=2, log_every_n_steps=1)
    with pytest.raises(ValueError, match="max_epochs"):
        run.fit(Classifier(width=2, **task), CIFAR100(demo=True, batch_size=4, **data))


# --- what a batch becomes


def test_cutmix_is_of_training_alone(own_folder):
    seen, data = Seen(), CIFAR100(demo=True, cutmix=1.0)
    short = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1}
    trainer(seen, log_every_n_steps=1, **short).fit(Classifier(width=4), data)
    images, labels = seen.train
    assert labels.shape == (64, 100)
    assert torch.allclose(labels.sum(1), torch.ones(64))
    assert ((labels > 0).sum(1) == 2).any()
    # a label's share is its image's share of the area
    shares = labels.max(1).values.unique()
    assert torch.allclose(shares * 32 * 32, (shares * 32 * 32).round(), atol=1e-2)
    assert images.shape == (64, 3, 32, 32)
    assert seen.val[1].shape == (500,)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_image_sizes_follow_the_run(accumulate, own_folder):
    seen, data = Seen(), CIFAR100(demo=True, batch_size=8, sizes=((0.25, 16), (0.5, 20)))
    short = {"max_epochs": 2, "limit_train_batches": 8, "accumulate_grad_batches": accumulate}
    trainer(seen, log_every_n_steps=1, **short).fit(Classifier(width=2), data)
    assert seen.sizes == [16] * 4 + [20] * 4 + [32] * 8


# --- initialization


def whitened(data):
    """The first convolution of a network whitened by hand with the same images."""
    net = AllCNN(64)
    whiten_(net, normalized(data.sets["train"].images[::10]))
    return net.conv1[0].weight.detach()[:54]


def first(task):
    return task.net.conv1[0].weight.detach().clone()


STILL = {"lr": 1e-30, "weight_decay": 0.0}  # the weights stay what they are


def test_whitening_needs_no_command_line(own_folder):
    pl.seed_everything(1, verbose=False)
    task, data = Classifier(width=64, whiten=True, **STILL), CIFAR100(demo=True, batch_size=2)
    rest = first(task)[54:]
    trainer(max_epochs=1, limit_train_batches=1, log_every_n_steps=1).fit(task, data)
    torch.testing.assert_close(first(task)[:54], whitened(data), atol=1e-6, rtol=1e-6)
    assert torch.equal(first(task)[54:], rest)


def test_resuming_and_evaluating_do_not_whiten(own_folder, monkeypatch):
    data = CIFAR100(demo=True, batch_size=2)
    task = Classifier(width=4, whiten=True)
    short = {"limit_train_batches": 1, "log_every_n_steps": 1}
    began = trainer(max_epochs=1, **short)
    began.fit(task, data)
    trained = first(task)
    began.save_checkpoint("one.ckpt")

    resumed = Classifier(width=4, whiten=True)
    trainer(max_epochs=1, **short).fit(resumed, data, ckpt_path="one.ckpt")
    assert torch.equal(first(resumed), trained)

    def never(*args):
        raise AssertionError("whitened")

    monkeypatch.setattr(task_module, "whiten_", never)
    trainer(limit_test_batches=1).test(resumed, data, verbose=False)
    trainer(limit_test_batches=1).test(Classifier(width=4, whiten=True), data, verbose=False)


def test_weights_loaded_by_hand_are_not_whitened(own_folder):
    weights = AllCNN(64).state_dict()
    task = Classifier(width=64, whiten=True, **STILL)
    task.net.load_state_dict(weights)
    short = {"limit_train_batches": 1, "log_every_n_steps": 1}
    trainer(max_epochs=1, **short).fit(task, CIFAR100(demo=True, batch_size=2))
    assert torch.equal(first(task), weights["conv1.0.weight"])


class OwnStep(Classifier):
    """As any LightningModule may have."""

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])


def test_a_training_step_of_ones_own(own_folder):
    seen = Seen()
    short = {"limit_train_batches": 2, "log_every_n_steps": 1}
    trainer(seen, max_epochs=2, **short).fit(OwnStep(width=2), CIFAR100(demo=True))
    assert len(seen.losses) == 4


@pytest.mark.parametrize("again", ["loaded", "the same"])
def test_training_on_keeps_what_was_learnt(again, own_folder):
    data = CIFAR100(demo=True, batch_size=2)
    task = Classifier(width=4, whiten=True)
    short = {"max_epochs": 1, "limit_train_batches": 1, "log_every_n_steps": 1}
    began = trainer(**short)
    began.fit(task, data)
    torch.nn.init.ones_(task.net.conv1[0].weight)  # as if learnt
    began.save_checkpoint("one.ckpt")
    if again == "loaded":
        task = Classifier.load_from_checkpoint("one.ckpt", **STILL)
    else:
        task.hparams.update(STILL)
    trainer(**short).fit(task, data)
    assert torch.equal(first(task), torch.ones(4, 3, 3, 3))


def test_whitening_without_the_data_module_is_refused(own_folder):
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4)), 2)
    with pytest.raises(ValueError, match=r"whiten.* CIFAR100 data module"):
        trainer(max_epochs=1).fit(Classifier(width=2, whiten=True), loader)


def test_biases_before_a_norm_are_not_trained_when_norms_are_not_decayed(own_folder):
    task = Classifier(width=2, decay_norms=False)
    frozen = [name for name, p in task.named_parameters() if not p.requires_grad]
    assert frozen == [f"net.conv{i}.0.bias" for i in range(1, 9)]
    before = [bias.detach().clone() for bias in biases_before_norm(task.net)]
    data = CIFAR100(demo=True, batch_size=8)
    trainer(max_epochs=1, limit_train_batches=2, log_every_n_steps=1).fit(task, data)
    for bias, old in zip(biases_before_norm(task.net), before, strict=True):
        assert torch.equal(bias, old)
    assert all(p.requires_grad for p in Classifier(width=2).parameters())


@pytest.mark.slow  # the compiler takes a while
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own, from inside the compiler
def test_compiled_net_is_compiled_once_for_each_image_size(own_folder):
    from torch._dynamo.utils import counters

    counters.clear()
    data = CIFAR100(demo=True, batch_size=32, sizes=((0.3, 20), (0.6, 24)))
    limits = {"limit_train_batches": 6, "limit_val_batches": 0, "log_every_n_steps": 1}
    seen = Seen()
    trainer(seen, max_epochs=2, **limits).fit(Classifier(width=2, compile=True), data)
    assert sorted(set(seen.sizes)) == [20, 24, 32]
    assert counters["stats"]["unique_graphs"] == 3
