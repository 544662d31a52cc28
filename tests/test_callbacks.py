"""Lightning's callbacks and loggers by name: each does what it says, or one line says why not.

EMAWeightAveraging is in test_metrics.py, LearningRateMonitor in test_edges.py.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import LAST, RUN, assert_same_checkpoint, scalars
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import BaseFinetuning, BasePredictionWriter
from matplotlib.figure import Figure

from allconv.__main__ import main
from allconv.rundir import read_metrics, read_rows
from allconv.training import figures

# what Lightning has to say about its own callbacks
pytestmark = [
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`, you need to define"),
    pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist"),
]

FIT = (
    "fit --data.demo true --model.width 4 --data.sizes [[1,8]] --trainer.max_epochs 2 "
    "--trainer.limit_train_batches 5 --trainer.limit_val_batches 1 "
    "--trainer.enable_model_summary false"
).split()
ADD = "--trainer.callbacks+="
KEY = "--trainer.callbacks."


def flags(name, **settings):
    """The flags that add a callback."""
    return [ADD + name, *(f"{KEY}{key}={value}" for key, value in settings.items())]


class Thaw(BaseFinetuning):
    """Trains the first convolution from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net.conv1)

    def finetune_function(self, pl_module, epoch, optimizer):
        Path(f"conv1_{epoch}").write_text(str(pl_module.net.conv1[0].weight.tolist()))
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.conv1, optimizer)


class Writer(BasePredictionWriter):
    """Called by `trainer.predict` alone."""


def count(batch):
    return len(batch[1])


def hello(trainer, pl_module):
    print("hello from", type(pl_module).__name__)


# several in one run, with what is printed
TOGETHER = {
    "looking on": [
        (flags("LambdaCallback", on_fit_start="test_callbacks.hello"), "hello from Classifier"),
        (flags("SpikeDetection", warmup=2), ""),
        (flags("test_callbacks.Writer", write_interval="epoch"), ""),
        (flags("ModelCheckpoint", filename="mine{epoch}", save_top_k=-1), ""),
        (flags("ThroughputMonitor", batch_size_fn="test_callbacks.count"), ""),
        (flags("Timer", interval="epoch", duration="00:01:00:00"), ""),
        (flags("RichModelSummary"), "Modules in eval mode"),
        (flags("RichProgressBar"), "Epoch 1/1"),
    ],
    "changing the run": [
        (flags("WeightAveraging"), ""),
        (flags("EarlyStopping", monitor="val/acc", stopping_threshold=-1, mode="max"),
         "stopped early: Stopping threshold reached: val/acc"),
        (flags("ModelSummary", max_depth=1), "Modules in eval mode"),
        (flags("TQDMProgressBar"), "Epoch 0:"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", TOGETHER)
def test_callbacks_do_what_they_say(name, own_folder, capfd, caplog):
    if name == "changing the run" and not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("Lightning 2.6 has it, and says why EarlyStopping stops")
    every = [flag for added, _ in TOGETHER[name] for flag in added]
    main([*FIT, *every, "--trainer.log_every_n_steps", "2"])
    said = "".join(capfd.readouterr()) + caplog.text
    for _, words in TOGETHER[name]:
        assert words in said
    if name == "looking on":
        assert (LAST.parent / "mineepoch=1.ckpt").is_file()
        assert "128" in [row.get("train/samples") for row in read_rows(RUN)]
    assert len(read_metrics(RUN)) == (2 if name == "looking on" else 1)


def test_pruned_weights_are_tested_and_resumed(own_folder, capfd):
    main([*FIT, *flags("ModelPruning", pruning_fn="l1_unstructured", amount=0.5)])
    main(["test"])
    # half of what was left in each of two epochs
    weights = torch.load(LAST, weights_only=True)["state_dict"]
    weights = torch.cat([v.flatten() for k, v in weights.items() if k.endswith("0.weight")])
    assert (weights == 0).double().mean() > 0.5
    assert "ModelPruning" not in capfd.readouterr().err
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "3"])
    assert len(read_metrics(RUN)) == 3
    assert "will not match an unbroken one" in capfd.readouterr().err


def test_a_layer_is_thawed(own_folder):
    main([*FIT, "--trainer.limit_val_batches", "0", *flags("test_callbacks.Thaw")])
    first, second = (Path(f"conv1_{epoch}").read_text() for epoch in (0, 1))
    assert first == second
    trained = torch.load(LAST, weights_only=True)["state_dict"]["net.conv1.0.weight"]
    assert str(trained.tolist()) != second


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches(own_folder):
    main([*FIT, "--trainer.max_epochs", "1", "--trainer.overfit_batches", "2"])
    assert (RUN / "checkpoints/best.ckpt").is_file()


def test_loggers_of_ones_own_get_what_ours_get(own_folder):
    """Weights and Biases, and MLflow were tried by hand."""
    loggers = "--trainer.logger CSVLogger --trainer.logger.save_dir csv --trainer.max_epochs 1"
    main([*FIT, *loggers.split()])
    (table,) = Path("csv").rglob("metrics.csv")
    assert {"train/loss", "val/acc", "lr"} <= {*table.read_text().splitlines()[0].split(",")}
    assert yaml.safe_load(table.with_name("hparams.yaml").read_text())["model"]["width"] == 4
    main(["test"])  # its own flags say where it logs, not the run's
    assert list(Path("csv").rglob("metrics.csv")) == [table]
    main("test --trainer.logger CSVLogger --trainer.logger.save_dir tested".split())
    (table,) = Path("tested").rglob("metrics.csv")
    assert "test/acc" in table.read_text()


REFUSED = [
    ("BackboneFinetuning", [], "no attribute 'backbone'"),
    ("BaseFinetuning", [], "raised by freeze_before_training"),
    ("ThroughputMonitor", [], "batch_size_fn"),
    ("nomodule.Mine", [], "'nomodule.Mine': No module named 'nomodule'"),
    ("os.path", [], "not correspond to a subclass of Callback"),
    ("LearningRateFinder", ["--config", "demo"], "needs --model.muon_lr 0"),
    ("GradientAccumulationScheduler", [KEY + "scheduling={1: 2}"], "accumulate_grad_batches"),
    ("EarlyStopping", [KEY + "monitor=valid_accuracy"], "did you mean val/acc?"),
    ("ModelCheckpoint", [KEY + "monitor=val_loss"], "did you mean val/loss?"),
    ("EarlyStopping", [KEY + "monitor=val/acc"], "mode min, which looks for the worst"),
    ("ModelCheckpoint", [KEY + "filename=best"], "choose another filename"),
    (
        "EarlyStopping",
        [KEY + "monitor=val/acc", "--data.val_size=0"],
        "monitors val/acc, but nothing is validated",
    ),
    ("OnExceptionCheckpoint", [KEY + "dirpath=."], "last.ckpt"),
]


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint"])
def test_an_unknown_metric_is_told_before_the_first_step(name, own_folder, capfd):
    """A warning: a callback of the user's may log it."""
    with pytest.raises(SystemExit) as end:
        main([*FIT, *flags(name, monitor="f1")])
    assert end.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-2].startswith(f"allconv: {name} monitors f1, which allconv does not log")
    assert "f1" in lines[-1]


@pytest.mark.parametrize(("name", "more", "words"), REFUSED, ids=str)
def test_one_line_says_why_a_callback_cannot_work(name, more, words, own_folder, capfd):
    with pytest.raises(SystemExit) as end:
        main([*FIT, ADD + name, *more])
    line = capfd.readouterr().err.splitlines()[-1]
    assert words in line
    assert len(line) < 250
    assert end.value.code == 2


@pytest.mark.parametrize("settings", [{}, {"cpu_stats": True}])  # refused at once, or in a step
def test_device_stats_need_psutil(settings, own_folder, capfd):
    arguments = [*FIT, *flags("DeviceStatsMonitor", **settings)]
    arguments += ["--trainer.log_every_n_steps", "2"]
    if importlib.util.find_spec("psutil"):
        main(arguments)
        assert any("cpu_percent" in key for row in read_rows(RUN) for key in row)
    else:
        with pytest.raises(SystemExit):
            main(arguments)
        last = capfd.readouterr().err.splitlines()[-1]
        assert last.startswith("allconv: ModuleNotFoundError: ")
        assert "psutil" in last


# with the epochs of the run that is stopped, and what is printed
STATEFUL = {
    "StochasticWeightAveraging": ({"swa_lrs": 0.05, "swa_epoch_start": 1}, 3, "for `SWALR`"),
    "LearningRateFinder": ({"num_training_steps": 40}, 3, "Learning rate set to"),
    "BatchSizeFinder": ({"max_trials": 2}, 1, "run using batch size 4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STATEFUL)
def test_a_run_with_a_callback_is_resumed_exactly(name, own_folder, monkeypatch, refused, caplog):
    settings, epochs, words = STATEFUL[name]
    fit = [*FIT, "--trainer.limit_val_batches", "0", *flags(name, **settings)]
    main([*fit, "--trainer.max_epochs", "3"])
    assert words in caplog.text
    whole = RUN.absolute()
    Path("stopped").mkdir()
    monkeypatch.chdir("stopped")
    # steps stop a run whose end is one of the callback's settings
    steps = "-1" if epochs == 1 else "8"
    main([*fit, "--trainer.max_epochs", str(epochs), "--trainer.max_steps", steps])
    main("fit --ckpt_path last --trainer.max_epochs 3 --trainer.max_steps -1".split())
    assert (RUN / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert_same_checkpoint(LAST, whole / "checkpoints/last.ckpt")
    if name.endswith("Finder"):  # it would start again from the first epoch
        again = ["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4", ADD + name]
        assert "leave it out" in refused(*again, code=2)


def test_checkpoints_may_be_written_by_a_plugin(own_folder):
    main([*FIT, "--trainer.plugins+=lightning.pytorch.plugins.io.TorchCheckpointIO"])
    main(["test"])
    assert LAST.is_file()


def test_a_checkpoint_callback_of_the_same_metric(own_folder):
    more = flags("ModelCheckpoint", monitor="val/acc", mode="max", save_top_k=3, filename="top")
    main([*FIT, *more])
    assert [len(list(LAST.parent.glob(f"{name}*.ckpt"))) for name in ("top", "best")] == [2, 1]


def test_the_same_flags_again_do_not_repeat_a_callback(own_folder):
    more = [*flags("ModelCheckpoint", filename="own"), "--trainer.logger+=CSVLogger",
            "--trainer.logger.save_dir=csv"]  # fmt: skip
    main([*FIT, *more])
    main([*FIT, *more, "--ckpt_path", "last", "--trainer.max_epochs", "3"])
    trainer = yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]
    assert (len(trainer["callbacks"]), len(trainer["logger"])) == (1, 1)


MILESTONES = pytest.param("--model.milestones [1]", marks=pytest.mark.slow)


@pytest.mark.parametrize("schedule", ["--model.warmup 0.2", MILESTONES])
def test_a_run_is_that_of_the_batch_size_that_a_finder_found(schedule, own_folder):
    fit = [*FIT, *schedule.split(), "--trainer.max_epochs", "2"]
    fit += ["--trainer.limit_train_batches", "0.02"]  # their number depends on the batch size
    main([*fit, *flags("BatchSizeFinder", max_trials=2)])
    found = yaml.safe_load((RUN / "config.yaml").read_text())["data"]["batch_size"]
    assert found in (4, 8)  # of Lightning 2.6, 2.5
    main([*fit, "--data.batch_size", str(found)])
    assert read_metrics(RUN) == read_metrics(RUN.with_name("version_1"))
    saved = torch.load(LAST, weights_only=True)["datamodule_hyper_parameters"]
    assert saved["batch_size"] == found
    main(f"fit --ckpt_path {LAST} --trainer.max_epochs 3".split())
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert (config["trainer"]["callbacks"], config["data"]["batch_size"]) == (None, found)


def test_an_enumeration_among_the_arguments_of_a_callback(own_folder):
    main([*FIT, *flags("Timer", duration="01:00:00:00")])
    assert "interval: step" in (RUN / "config.yaml").read_text()


def test_early_stopping_within_an_epoch(own_folder, capfd):
    stop = flags("EarlyStopping", monitor="val/acc", mode="max", patience=1, min_delta=0.9)
    main([*FIT, *stop, "--trainer.val_check_interval", "0.4", "--trainer.max_epochs", "5"])
    lines = capfd.readouterr().out.splitlines()
    told = "stopped in epoch 1 at step 4: last.ckpt holds 0 whole epochs"
    (where,) = (i for i, line in enumerate(lines) if line.startswith(told))
    assert lines[where + 1].startswith("best epoch 1 of 1 ")
    if hasattr(callbacks.EarlyStopping("val/acc"), "stopping_reason_message"):  # from 2.6 on
        assert lines[where - 1].startswith("stopped early: ")


def test_early_stopping_after_the_first_epoch(own_folder, capfd):
    """`stopped_epoch`, counted from 0, is 0 then, as before any stop."""
    main([*FIT, *flags("EarlyStopping", monitor="val/acc", mode="max", stopping_threshold=0.0)])
    assert len(read_metrics(RUN)) == 1
    assert "resume with" not in capfd.readouterr().out


class Broken(callbacks.Callback):
    """Has a mistake that its author must find."""

    def on_fit_start(self, trainer, pl_module):
        raise {}["mistake"]


def test_an_error_in_a_callback_of_ones_own_keeps_its_traceback(own_folder):
    with pytest.raises(KeyError, match="mistake"):
        main([*FIT, "--trainer.callbacks+=test_callbacks.Broken"])
    assert not RUN.exists()


def test_an_older_run_is_not_tested_for_one_without_checkpoints(run, refused):
    main([*FIT, "--trainer.enable_checkpointing", "false"])
    assert "version_1, the newest, has none; name another run" in refused("test", code=1)


def test_the_curves_take_no_more_than_a_twentieth_of_the_time(own_folder, monkeypatch):
    """A drawing takes a second here, and an epoch none: only the first and the last are drawn."""
    drawn = []
    monkeypatch.setattr(figures, "time", SimpleNamespace(monotonic=lambda: float(len(drawn))))
    monkeypatch.setattr(
        figures.plots, "curves", lambda rows, _: drawn.append(len(rows)) or Figure()
    )
    main([*FIT, "--trainer.max_epochs", "4"])
    assert drawn == [1, 4]


def test_the_reason_of_an_earlier_stop_is_not_told_again(own_folder, capfd):
    """The resumed epoch is not validated, so it cannot be stopped again."""
    stop = flags("EarlyStopping", monitor="val/acc", mode="max", patience=1, min_delta=0.9)
    main([*FIT, *stop, "--trainer.max_epochs", "5"])
    epochs = len(read_metrics(RUN))
    capfd.readouterr()
    end = ["--trainer.max_epochs", str(epochs + 1), "--trainer.check_val_every_n_epoch", "9"]
    main(["fit", "--ckpt_path", "last", *end])
    out = capfd.readouterr().out
    assert f"of {epochs + 1} on the demo set" in out
    assert "stopped early" not in out


class Unfit(callbacks.Callback):
    """Cannot begin."""

    def setup(self, trainer, pl_module, stage):
        raise ValueError("a package is missing")


def test_a_resumed_run_that_cannot_begin_is_left_as_it_was(own_folder):
    main(FIT)
    files = {path: path.read_bytes() for path in RUN.rglob("*.*") if "tfevents" not in path.name}
    more = ["fit", "--ckpt_path", "last", "--trainer.max_epochs", "3"]
    with pytest.raises(ValueError, match="is missing"):
        main([*more, *flags("test_callbacks.Unfit")])
    assert {path: path.read_bytes() for path in files} == files


def test_a_timer_does_not_end_the_resumed_run_at_once(own_folder, capfd):
    timer = flags("Timer", duration="00:00:00:01", interval="epoch")
    main([*FIT, *timer, "--trainer.max_epochs", "500"])
    done = len(read_metrics(RUN))
    assert f"; resume with: python -m allconv fit --ckpt_path {LAST}" in capfd.readouterr().out
    main(["fit", "--ckpt_path", str(LAST), "--trainer.max_epochs", str(done + 1)])
    assert len(read_metrics(RUN)) == done + 1


def test_a_stop_that_min_epochs_delays_is_an_early_stop(own_folder, capfd):
    stop = flags("EarlyStopping", monitor="val/acc", mode="max", patience=1, min_delta=0.9)
    main([*FIT, *stop, "--trainer.min_epochs", "4", "--trainer.max_epochs", "9"])
    out = capfd.readouterr().out
    assert len(read_metrics(RUN)) == 4
    assert "resume with" not in out


class AtTheEnd(callbacks.Callback):
    """Logs at the end of an epoch, with the number of steps so far."""

    def on_train_epoch_end(self, trainer, pl_module):
        for logger in trainer.loggers:
            logger.log_metrics({"own": trainer.current_epoch}, trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch:  # not in the first: the table would be written with it
            pl_module.log("mean", float(trainer.current_epoch), on_step=False, on_epoch=True)
        written = [row["own"] for row in read_rows(RUN) if "own" in row]  # what a kill would leave
        assert len(written) == trainer.current_epoch
        if trainer.current_epoch == 2 and not trainer.ckpt_path:
            raise KeyboardInterrupt


def test_what_a_callback_logs_at_the_end_of_an_epoch_survives_a_resume(own_folder):
    own = flags("test_callbacks.AtTheEnd")
    with pytest.raises(SystemExit):
        main([*FIT, "--trainer.max_epochs", "3", *own])
    assert [float(row["mean"]) for row in read_rows(RUN) if "mean" in row] == [1]
    main(["fit", "--ckpt_path", "last", *own])
    assert [float(row["mean"]) for row in read_rows(RUN) if "mean" in row] == [1, 2]
    for found in ([row["own"] for row in read_rows(RUN) if "own" in row],
                  [str(value) for tag, _, value in scalars(RUN) if tag == "own"]):  # fmt: skip
        assert [float(value) for value in found] == [0, 1, 2]
