"""Callbacks of a training: when to seed, save and stop."""

import math
import os
import signal
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO

from allconv.data import CIFAR100
from allconv.errors import UsageError, UserError, say
from allconv.rundir import write_atomic
from allconv.training.loggers import Table


class NetSummary(ModelSummary):
    """Output shape, parameters and FLOPs of each layer of the network."""

    @staticmethod
    def summarize(summary_data, *totals, **kwargs) -> None:
        """Leave out the rows of the metrics."""
        names = dict(summary_data)["Name"]
        rows = [i for i, name in enumerate(names) if name.split(".")[0] == "net"]
        table = [(column, [cells[i] for i in rows]) for column, cells in summary_data]
        ModelSummary.summarize(table, *totals, **kwargs)


class EpochSeed(Callback):
    """Seeds every epoch from (seed, epoch, rank), so that it does not depend on what came before.

    This makes a resumed run exact without random states in the checkpoint.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let SIGTERM end each of several processes immediately.

        Lightning's handler would broadcast, and hang if another process does not take part.
        """
        if trainer.world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed torch's generators, which dropout and augmentation use."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        key = (seed, trainer.current_epoch, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class Limits(Callback):
    """Lets max_steps and a Timer limit a resumed training as they do a new one."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hide max_steps until training starts: Lightning would resume with an empty epoch."""
        self.max_steps, trainer.fit_loop.epoch_loop.max_steps = trainer.max_steps, -1

    def on_load_checkpoint(self, trainer: Trainer, pl_module, checkpoint: dict) -> None:
        """Let a Timer count anew: used up, it would end the resumed training at once."""
        checkpoint["callbacks"].pop("Timer", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set max_steps again."""
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically.

    Lightning does not flush, and renames only if the temporary folder is on the same file system.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Write `checkpoint` to `path`."""
        write_atomic(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path, map_location="cpu", weights_only=True) -> dict[str, object]:
        """Read a checkpoint without executing code, which Lightning 2.5 would allow."""
        return torch.load(path, map_location, weights_only=True)


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, that of the highest val/acc.

    A class of its own, since Lightning refuses two ModelCheckpoints of the same metric, and the
    second may be the user's.
    """

    def __init__(self):
        super().__init__(
            filename="best", monitor="val/acc", mode="max", enable_version_counter=False
        )


class LastCheckpoint(ModelCheckpoint):
    """Saves `last.ckpt` before the first step, then after every whole epoch.

    Before the first step, so that `--ckpt_path last` never means an older run. Only after whole
    epochs, since a run resumed within an epoch would differ from an uninterrupted one.
    """

    def __init__(self):
        super().__init__(
            filename="last", save_on_train_epoch_end=True, enable_version_counter=False
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the initial state of a new run."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            trainer.save_checkpoint(Path(self.dirpath, "last.ckpt"))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state after an epoch, unless max_steps cut it short.

        First the rows that callbacks have logged: a run killed after it resumes behind them.
        """
        if trainer.is_last_batch:
            for logger in trainer.loggers:
                if isinstance(logger, Table):
                    logger.write()
            super().on_train_epoch_end(trainer, pl_module)


class StepLoss(Callback):
    """Logs the loss of single steps, and ends the run if it is NaN or infinite.

    Reads it every `log_every_n_steps` and in an epoch's last step, since that waits for the device.
    """

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Read the loss of this step, if it is due.

        Raises:
            UserError: the loss is not finite.
        """
        every = trainer.log_every_n_steps
        if not trainer.is_last_batch and (not every or (batch_idx + 1) % every):
            return
        loss = outputs["loss"].item() * trainer.accumulate_grad_batches  # Lightning has divided
        for logger in trainer.loggers:
            if not isinstance(logger, Table):  # metrics.csv has a row per epoch
                logger.log_metrics({"train/loss_step": loss}, trainer.global_step - 1)
        if not math.isfinite(loss):
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            kept = "; last.ckpt is of the epoch before" if trainer.current_epoch else ""
            raise UserError(
                f"the training loss is {loss} at step {trainer.global_step} (epoch "
                f"{trainer.current_epoch + 1}, rate {rate:g}): start again with a lower "
                f"model.lr{kept}"
            )


LOGGED = {"loss", "train/loss", "val/loss", "val/acc", "val/top5", "val/n", "lr"}
WORST = {("val/acc", "min"), ("val/top5", "min"), ("val/loss", "max"), ("train/loss", "max")}
REFUSED = {
    "GradientAccumulationScheduler": "it changes the number of steps, which the learning rate "
    "depends on; use --trainer.accumulate_grad_batches",
    "OnExceptionCheckpoint": "Lightning would start a new run from the file of an older one; "
    "last.ckpt, of the last whole epoch, is always kept",
}


def check(trainer: Trainer, task: LightningModule, data: CIFAR100, resumed: bool) -> None:
    """Refuse callbacks of Lightning that do not work with the settings.

    Raises:
        UsageError: the callback, and why.
    """
    validated = trainer.limit_val_batches and (data.hparams.val_size or data.hparams.folder)
    for callback in trainer.callbacks:
        name, monitor = type(callback).__name__, getattr(callback, "monitor", None)
        why = REFUSED.get(name)
        if monitor and monitor not in LOGGED:
            near, names = _our_name(monitor), ", ".join(sorted(LOGGED))
            if near in LOGGED:
                why = f"it monitors {monitor}: did you mean {near}?"
            elif trainer.is_global_zero:  # whether something else logs it is known after an epoch
                say(f"{name} monitors {monitor}, which allconv does not log; it logs {names}")
        elif name == "ModelCheckpoint" and callback.filename == "best" and not callback.dirpath:
            why = "best.ckpt is kept for val/acc: choose another filename"
        elif str(monitor).startswith("val/") and not validated and name != "BestCheckpoint":
            why = f"it monitors {monitor}, but nothing is validated"
        elif (monitor, getattr(callback, "mode", None)) in WORST:
            why = f"it monitors {monitor} with mode {callback.mode}, which looks for the worst"
        if resumed and name.endswith("Finder"):
            why = "it starts from the first epoch: leave it out of a resumed run"
        elif name == "LearningRateFinder" and (
            task.hparams.muon_lr or task.hparams.warmup is not None
        ):
            why = "it finds one constant rate: it needs --model.muon_lr 0 and --model.warmup null"
        if why:
            raise UsageError(f"{name}: {why}")
        if name == "ModelPruning" and resumed and trainer.is_global_zero:
            say("ModelPruning: resumed from pruned weights, the run will not match an unbroken one")


def _our_name(metric: str) -> str:
    """What a metric of another project, such as val_loss or valid_accuracy, is called here."""
    name = metric.lower().replace("_", "/").replace("valid/", "val/")
    return name.replace("accuracy", "acc")


def plugins(given: list) -> list:
    """The given plugins, and AtomicCheckpointIO unless they write checkpoints themselves."""
    own = any(isinstance(plugin, CheckpointIO) for plugin in given)
    return given if own else [*given, AtomicCheckpointIO()]
