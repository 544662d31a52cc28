"""From Python, as a user of Lightning expects it: plain Trainer, loaders, checkpoints."""

import pickle
from pathlib import Path
from typing import ClassVar

import lightning
import pytest
import torch
from conftest import REPO
from lightning.pytorch.callbacks import ModelPruning
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import allconv
from allconv import CIFAR100, AllCNN, Classifier, checkpoints, load
from allconv.__main__ import main
from allconv.augment import normalize
from allconv.datasets.cifar100 import MEAN, STD

# the command line turns these off for itself; under a plain Trainer they are Lightning's to say
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

SCRIPT = """
import lightning
from allconv import CIFAR100, Classifier, load

lightning.seed_everything(43)
data = CIFAR100(demo=True, batch_size=50, crop=2, flip=True)
task = Classifier(width=4, dropout=0.0, warmup=0.25, muon_lr=0.05, whiten=True)
trainer = lightning.Trainer(max_epochs=2, limit_train_batches=20, log_every_n_steps=5)
trainer.fit(task, data)
loss = trainer.callback_metrics["train/loss"]
results = trainer.test(task, data)[0]
net = load(trainer.checkpoint_callback.best_model_path)
"""


def small(**settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **settings)


def test_ten_lines_with_a_plain_trainer(own_folder):
    found = {}
    exec(SCRIPT, found)
    assert found["results"]["test/n"] == 1000
    assert found["loss"] < 4.7
    # the checkpoint that Lightning itself kept is one of ours
    images = normalize(found["data"].sets["test"].images[:10], MEAN, STD)
    task, net = found["task"].eval(), found["net"]
    with torch.no_grad():
        torch.testing.assert_close(net(images), task(images), atol=1e-5, rtol=1e-5)
    assert net.classes[0] == "red_disc"


def test_weights_are_pruned(own_folder):
    task = Classifier(width=4)
    pruning = ModelPruning("l1_unstructured", amount=0.5)
    trainer = small(max_epochs=1, limit_train_batches=1, callbacks=[pruning])
    trainer.fit(task, CIFAR100(demo=True))
    assert (task.net.conv2[0].weight == 0).double().mean() > 0.3


class Double(Classifier):
    """Keeps the losses of all validation images in double precision."""

    losses: ClassVar[list] = []

    def validation_step(self, batch, batch_idx):
        logits = super().validation_step(batch, batch_idx)
        self.losses.append(cross_entropy(logits.double(), batch[1], reduction="none"))
        return logits


def test_losses_of_bfloat16_weights_are_summed_in_float32(own_folder):
    """Also after the first batch, when Lightning has moved the metrics."""
    data = CIFAR100(demo=True)
    data.eval_batch_size = 99
    trainer = small(
        max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0, precision="bf16-true"
    )
    trainer.fit(Double(width=2), data)
    found, losses = trainer.callback_metrics, torch.cat(Double.losses)
    assert found["val/n"] == len(losses) == 800
    assert found["val/loss"].item() == pytest.approx(losses.mean().item(), rel=1e-6)


def test_names_of_the_package():
    assert {"AllCNN", "CIFAR100", "Classifier", "load"} <= set(allconv.__all__)
    assert AllCNN.__module__ == "allconv.model"
    with pytest.raises(AttributeError, match=r"allconv.* has no attribute 'AlCNN'"):
        _ = allconv.AlCNN


def test_version_is_the_packages():
    project = (REPO / "pyproject.toml").read_text()  # Python 3.10 has no reader for TOML
    assert f'\nversion = "{allconv.__version__}"\n' in project


def test_checkpoint_is_loaded_as_lightning_does(run):
    best = run / "checkpoints/best.ckpt"
    task = Classifier.load_from_checkpoint(best).eval()
    data = CIFAR100.load_from_checkpoint(best)
    assert (task.hparams.width, data.hparams.demo, data.hparams.batch_size) == (4, True, 16)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(task(images), load(str(best))(images))
    wider = CIFAR100.load_from_checkpoint(best, batch_size=7)
    assert wider.hparams.batch_size == 7


def test_loaders_before_setup(own_folder):
    data = CIFAR100(demo=True, batch_size=50)
    data.prepare_data()
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, labels.shape) == ((50, 3, 32, 32), torch.uint8, (50,))
    loaders = (data.val_dataloader, data.test_dataloader, data.predict_dataloader)
    sizes = [sum(len(labels) for _, labels in loader()) for loader in loaders]
    assert sizes == [800, 1000, 1000]


class Seen(lightning.Callback):
    """Keeps what callback_metrics holds in two hooks of a validation."""

    def __init__(self):
        self.within, self.after, self.tested = [], [], []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.within.append(trainer.callback_metrics["val/loss"].item())

    def on_validation_end(self, trainer, pl_module):
        self.after.append(trainer.callback_metrics["val/loss"].item())

    def on_test_epoch_end(self, trainer, pl_module):
        self.tested.append(trainer.callback_metrics["test/n"].item())


def test_evaluating_and_training_in_turn_with_a_callback_that_reads_the_results(own_folder):
    """As in a notebook; inference mode leaves tensors that a training cannot add to."""
    data = CIFAR100(demo=True, sizes=((0.5, 16),))
    task, seen, limits = Classifier(width=2), Seen(), {"max_epochs": 2, "limit_train_batches": 2}
    small(callbacks=[seen]).validate(task, data)
    small(callbacks=[seen], **limits).fit(task, data)
    small(callbacks=[seen]).test(task, data)
    small(callbacks=[seen], **limits).fit(task, data)
    assert len(seen.within) >= 5
    assert seen.within == seen.after
    assert seen.tested == [1000]


def test_the_images_are_a_data_set_for_any_loader(own_folder):
    data = CIFAR100(demo=True)
    data.setup("fit")
    ((images, labels),) = DataLoader(Subset(data.sets["train"], range(8)), batch_size=8)
    assert torch.equal(images, data.sets["train"].images[:8])
    assert torch.equal(labels, data.sets["train"].labels[:8])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_predict_gives_the_logits_of_the_test_images(run):
    best = str(run / "checkpoints/best.ckpt")
    data = CIFAR100(demo=True)
    found = torch.cat(small().predict(Classifier(width=4), data, ckpt_path=best))
    with torch.no_grad():
        expected = load(best)(normalize(data.sets["test"].images, MEAN, STD))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_loader_of_the_data_module_gives_its_numbers(run):
    task = Classifier.load_from_checkpoint(run / "checkpoints/best.ckpt")
    data = CIFAR100(demo=True)
    (whole,) = small().test(task, data)
    (loaded,) = small().test(task, data.test_dataloader())
    assert loaded == whole


def test_a_network_of_unknown_classes_has_numbers_for_names(loader, own_folder, capsys):
    trainer = small(max_epochs=1)
    trainer.fit(Classifier(width=2, num_classes=10), loader, loader)
    trainer.save_checkpoint("own.ckpt")
    assert load("own.ckpt").classes == tuple(f"class {i}" for i in range(10))
    Image.new("RGB", (32, 32)).save("a.png")
    main(["predict", "a.png", "--ckpt_path", "own.ckpt"])
    said = capsys.readouterr()
    assert "class " in said.out
    assert "10 classes of an unknown data set" in said.err


def test_weights_alone_are_said_to_be(run, capsys):
    net = load(str(run))
    assert "weights alone" not in capsys.readouterr().err
    torch.save(net.state_dict(), "bare.pt")
    load("bare.pt")
    assert "bare.pt holds weights alone" in capsys.readouterr().err


def test_a_checkpoint_without_optimizer_states_tells_its_settings(run, capfd, refused):
    task = Classifier(width=4, rectify_logits=False)
    trainer = small(max_epochs=1)
    data = CIFAR100(demo=True)
    trainer.fit(task, data)
    trainer.save_checkpoint("small.ckpt", weights_only=True)
    assert checkpoints.load(Path("small.ckpt")).hparams["rectify_logits"] is False
    assert "weights alone" not in capfd.readouterr().err
    line = refused("fit", "--ckpt_path", "small.ckpt", code=1)
    assert "cannot be resumed; use --init" in line


@pytest.fixture
def loader():
    """Anyone's own images, normalized, in a plain loader."""
    torch.manual_seed(1)
    images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 10
    return DataLoader(TensorDataset(images, labels), 8)


def test_any_loader_of_normalized_images_will_do(loader, own_folder):
    task = Classifier(width=2, num_classes=10, dropout=0.0)
    trainer = small(max_epochs=2, log_every_n_steps=1)
    trainer.fit(task, loader, loader)
    assert trainer.callback_metrics["val/n"] == 40
    result = small().validate(task, loader, verbose=False)[0]
    assert result["val/loss"] == pytest.approx(trainer.callback_metrics["val/loss"].item())
    assert small().test(task, loader, verbose=False)[0]["test/n"] == 40
    assert torch.cat(small().predict(task, loader)).shape == (40, 10)


def test_predict_takes_images_without_labels(loader):
    task = Classifier(width=2, num_classes=10)
    images = loader.dataset.tensors[0]
    found = torch.cat(small().predict(task, DataLoader(images, 8)))
    labelled = torch.cat(small().predict(task, loader))
    torch.testing.assert_close(found, labelled)


def test_validation_is_off_only_for_the_data_without_it(own_folder):
    trainer = small(max_epochs=1, limit_train_batches=1)
    with pytest.warns(UserWarning, match="across ranks is zero"):
        trainer.fit(Classifier(width=2), CIFAR100(demo=True, val_size=0))
    (found,) = trainer.validate(Classifier(width=2), CIFAR100(demo=True), verbose=False)
    assert found["val/n"] == 800


def test_another_number_of_classes_is_refused(own_folder):
    with pytest.raises(ValueError, match=r"num_classes is 10, but the demo set .* has 100"):
        small(max_epochs=1).fit(Classifier(width=2, num_classes=10), CIFAR100(demo=True))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_loader_without_a_length_needs_a_limit(own_folder):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(3, 32, 32), 0)] * 4)

    loader = DataLoader(Stream(), batch_size=2)
    with pytest.raises(ValueError, match="set limit_train_batches"):
        small(max_epochs=1).fit(Classifier(width=2), loader)
    small(max_epochs=1, limit_train_batches=2).fit(Classifier(width=2), loader)


def test_a_plain_trainer_logs_the_hyperparameters(own_folder):
    logger = lightning.pytorch.loggers.CSVLogger(".")
    trainer = lightning.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1,
        accelerator="cpu", logger=logger, enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Classifier(width=2, lr=0.03), CIFAR100(demo=True, crop=1))
    text = Path(logger.log_dir, "hparams.yaml").read_text()
    assert "lr: 0.03" in text
    assert "crop: 1" in text


def test_the_bar_of_a_plain_trainer_has_figures(own_folder):
    class Bar(lightning.pytorch.callbacks.RichProgressBar):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            shown.update(self.get_metrics(trainer, pl_module))

    shown = {}
    limits = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[Bar()], **limits)  # fmt: skip
    trainer.fit(Classifier(width=2), CIFAR100(demo=True))
    assert {"loss", "val/loss", "val/acc"} <= shown.keys()


def test_a_loader_can_be_pickled(own_folder):
    loader = CIFAR100(demo=True).val_dataloader()
    images, _ = next(iter(pickle.loads(pickle.dumps(loader))))
    assert torch.equal(images, next(iter(loader))[0])


def test_loaded_network_can_be_trained(run):
    net = load("best")
    net.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_loaded_network_can_be_scripted(run):
    net, images = load("best"), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.script(net)(images), net(images))


def test_packaged_network_answers_for_a_file_an_array_and_a_tensor(own_folder):
    from PIL import Image

    net = load()
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save("image.png")
    expected = normalize(pixels.permute(2, 0, 1)[None], MEAN, STD)[0]
    given = ["image.png", Path("image.png"), pixels.numpy(), pixels.permute(2, 0, 1)]
    for image in given:
        torch.testing.assert_close(net.preprocess(image), expected)
    assert net(net.preprocess("image.png")[None]).shape == (1, len(net.classes))
    assert not net.training
