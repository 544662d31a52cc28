"""Callbacks: when to seed, save, draw, report and stop."""

import json
import math
import os
import platform
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import lightning
import numpy as np
import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.model_summary.model_summary import _format_summary_table
from torch import Tensor

from allconv import figures
from allconv.runs import best_row, read_metrics


def run_folder(trainer: Trainer) -> Path | None:
    """The run's folder; unlike trainer.log_dir no collective, so one process may ask alone."""
    folder = trainer.loggers[0].log_dir if trainer.loggers else None
    return Path(folder) if folder else None


class NetSummary(ModelSummary):
    """Output shape, parameters and FLOPs of each layer, without the rows of the metrics."""

    @staticmethod
    def summarize(summary_data, *totals, total_flops: int, **_) -> None:
        """Print the table of the net's own rows, on the output like everything else."""
        names = dict(summary_data)["Name"]
        net = [i for i, name in enumerate(names) if name.split(".")[0] == "net"]
        rows = [(column, [cells[i] for i in net]) for column, cells in summary_data]
        print(_format_summary_table(*totals, total_flops, *rows), flush=True)


class EpochSeed(Callback):
    """Seeds every epoch from (seed, epoch, rank): an epoch is the same whatever came before it.

    That makes a resumed run exact without random states in the checkpoint.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed torch's generators, which dropout and augmentation draw from."""
        key = (int(os.environ["PL_GLOBAL_SEED"]), trainer.current_epoch, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class WholeEpochs(Callback):
    """Hides from all callbacks after it the epoch that LastCheckpoint broke off."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run here instead."""
        if not trainer.is_last_batch:
            raise StopIteration


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: from before the first step on, then after every whole epoch.

    Being a `Checkpoint`, it comes after the module and the other callbacks, when the epoch has
    been validated and logged.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state that a new run begins with."""
        if trainer.global_step == 0:
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        """Break off an epoch in which max_steps or max_time ends the run: no validation, no files.

        Resumed from within an epoch, a run would not be the one that never stopped.
        """
        if trainer.fit_loop.epoch_loop.done and not trainer.is_last_batch:
            raise StopIteration  # what Lightning's loops end by

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state after an epoch."""
        path = run_folder(trainer) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path, weights_only=False)


class DivergedError(ValueError):
    """The training loss is not a finite number."""


class StopWhenDiverged(Callback):
    """Ends the run when the loss is NaN or infinite.

    Looks every `log_every_n_steps`, since each look waits for the device, and before a validation.
    """

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Look at the loss of this step, if it is its turn.

        Raises:
            DivergedError: the loss is not finite.
        """
        every = trainer.log_every_n_steps
        if not trainer.is_last_batch and (not every or (batch_idx + 1) % every):
            return
        loss = outputs["loss"].item()
        if not math.isfinite(loss):
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            raise DivergedError(
                f"the training loss is {loss} at step {trainer.global_step} (epoch "
                f"{trainer.current_epoch + 1}, rate {rate:g}): lower model.lr; the epoch before is "
                f"kept in checkpoints/last.ckpt of {run_folder(trainer)}"
            )


class Progress(Callback):
    """Says what will run, about how long it takes, a line an epoch, and where the results are.

    Args:
        bar: whether a progress bar is shown as well; then the lines of the epochs are left out.
    """

    head = "epoch  train loss  val loss  val acc (%)        lr  time left"

    def __init__(self, bar: bool):
        self.bar = bar

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what will run, and on what."""
        self.start, self.first = time.monotonic(), trainer.current_epoch
        if not trainer.is_global_zero:
            return
        data, net = trainer.datamodule, pl_module.net
        parameters = sum(p.numel() for p in net.parameters())
        pictures, held_out = len(data.sets["train"]), len(data.sets["val"])
        device = trainer.strategy.root_device.type
        print(
            f"AllCNN, {parameters:,} parameters, on {data.title}: "
            f"{pictures:,} training and {held_out:,} validation pictures\n"
            f"epochs {self.first + 1} to {trainer.max_epochs}, batches of "
            f"{data.hparams.batch_size}, {trainer.world_size} x {device} ({trainer.precision}), "
            f"seed {os.environ['PL_GLOBAL_SEED']}\n"
            f"run folder: {run_folder(trainer)}",
            flush=True,
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """After the first 20 steps, say about how long it will take."""
        done = batch_idx + 1
        if done == 5:
            self.warm = time.monotonic()
        if done != 20 or trainer.current_epoch != self.first or not trainer.is_global_zero:
            return
        step = (time.monotonic() - self.warm) / 15
        epochs = trainer.max_epochs - self.first
        left = _duration(epochs * trainer.num_training_batches * step)
        rate = len(batch[1]) * trainer.world_size / step
        print(f"about {left} for {epochs} epochs at {rate:,.0f} pictures/s", flush=True)
        if not self.bar:
            print(self.head, flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A line for the epoch."""
        metrics, done = trainer.callback_metrics, trainer.current_epoch + 1
        validated = "val/acc" in metrics and done % (trainer.check_val_every_n_epoch or 1) == 0
        if self.bar or not trainer.is_global_zero or not validated:
            return
        spent = time.monotonic() - self.start
        left = spent / (done - self.first) * (trainer.max_epochs - done)
        print(
            f"{done:5d}  {metrics['train/loss']:10.4f}  {metrics['val/loss']:8.4f}  "
            f"{100 * metrics['val/acc']:11.2f}  {metrics['lr']:8.4g}  {_duration(left):>9}",
            flush=True,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how it went, where everything is, and what to type next."""
        run = run_folder(trainer)
        if not trainer.is_global_zero or not run:
            return
        whole, last = trainer.current_epoch, run / "checkpoints" / "last.ckpt"
        if not trainer.is_last_batch:
            print(
                f"stopped in epoch {whole + 1} at step {trainer.global_step}: last.ckpt is of "
                f"{whole} whole epochs; go on with: python -m allconv fit --ckpt_path {last} "
                "--trainer.max_steps -1 --trainer.max_time null"
            )
        best = best_row(run)
        if best:
            print(
                f"best epoch {best['epoch'] + 1:.0f} of {whole} on "
                f"{trainer.datamodule.title}: val/acc {best['val/acc']:.4f}, "
                f"top 5 {best['val/top5']:.4f}, loss {best['val/loss']:.4f}"
            )
        # without validation there is no best
        checkpoint = next(p for p in (last.with_name("best.ckpt"), last) if p.is_file())
        print(
            f"run folder: {run}\n"
            f"next: python -m allconv test --ckpt_path {checkpoint}\n"
            f"      tensorboard --logdir {run.parent}",
            flush=True,
        )

    def on_exception(self, trainer: Trainer, pl_module, exception: BaseException) -> None:
        """Say how a stopped run goes on."""
        last = (run_folder(trainer) or Path()) / "checkpoints" / "last.ckpt"
        stopped = isinstance(exception, (KeyboardInterrupt, SystemExit))
        if stopped and trainer.is_global_zero and trainer.state.fn == "fit" and last.is_file():
            print(
                f"stopped in epoch {trainer.current_epoch + 1}; go on with: "
                f"python -m allconv fit --ckpt_path {last}",
                file=sys.stderr,
            )


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Curves(Callback):
    """Draws `curves.png` into the run folder after every epoch, so that a stopped run has it."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what metrics.csv holds, which is the whole run, also when it was resumed."""
        if not trainer.is_global_zero:
            return
        run = run_folder(trainer)
        title = (
            f"AllCNN, width {pl_module.net.conv1[0].out_channels}, on {trainer.datamodule.title}"
        )
        figures.curves(read_metrics(run), title).savefig(run / "curves.png", dpi=100)


class Predictions(Callback):
    """Pictures with predictions, and the confusion matrix.

    In TensorBoard while training, as files when a checkpoint is evaluated.

    Args:
        checkpoint: what is evaluated, with its path and folder; None while training.
        every_n_epochs: how often they are drawn while training; the last epoch is always drawn.
    """

    def __init__(self, checkpoint=None, every_n_epochs: int = 10):
        self.checkpoint, self.every_n_epochs = checkpoint, every_n_epochs
        self.logits: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect."""
        self.logits = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_) -> None:
        """Collect a batch's logits (B, classes), where they are."""
        self.logits.append(outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw into TensorBoard, if it is this epoch's turn, or write the evaluation's files."""
        if trainer.state.fn != "fit":
            self._write(trainer, "validate", "val")
            return
        epoch = trainer.current_epoch + 1
        if trainer.sanity_checking or (epoch % self.every_n_epochs and epoch < trainer.max_epochs):
            return
        matrix = self._matrix(trainer, "val")
        if not trainer.is_global_zero or not trainer.loggers:
            return
        board = trainer.loggers[0].experiment
        pictures, confusion = self._draw(trainer, "val", matrix, f"validation, epoch {epoch}")
        step = trainer.global_step - 1
        board.add_figure("predictions", pictures, step)
        board.add_figure("confusion", confusion, step)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the evaluation's files."""
        self._write(trainer, "test", "test")

    def _mine(self, trainer: Trainer, split: str) -> tuple[Tensor, Tensor]:
        """Indices and labels of the pictures that this process saw, in the order of the logits."""
        labels = trainer.datamodule.sets[split].labels
        index = torch.arange(trainer.global_rank, len(labels), trainer.world_size)
        index = index[: sum(map(len, self.logits))]
        return index, labels[index]

    def _matrix(self, trainer: Trainer, split: str) -> Tensor:
        """Confusion counts (classes, classes) over all processes, true by predicted."""
        logits = torch.cat(self.logits)
        n = logits.shape[1]
        _, labels = self._mine(trainer, split)
        cells = labels.to(logits.device) * n + logits.argmax(1)
        return trainer.strategy.reduce(cells.bincount(minlength=n * n).view(n, n), reduce_op="sum")

    def _draw(self, trainer: Trainer, split: str, matrix: Tensor, title: str):
        data, logits = trainer.datamodule, torch.cat(self.logits).cpu()
        index, labels = self._mine(trainer, split)
        some = figures.some(len(index))
        images = data.sets[split].images[index[some]]
        right, n = matrix.trace().item(), matrix.sum().item()
        title = f"{data.title}, {title}: {100 * right / n:.1f} % of {n:,} pictures right"
        return (
            figures.predictions(images, labels[some], logits[some], data.class_names, title),
            figures.confusion(matrix.cpu(), data.class_names, data.groups, title),
        )

    def _write(self, trainer: Trainer, command: str, split: str) -> None:
        matrix = self._matrix(trainer, split)
        if not trainer.is_global_zero:
            return
        data, checkpoint = trainer.datamodule, self.checkpoint
        result = {
            **{name: round(value.item(), 7) for name, value in trainer.callback_metrics.items()},
            "data": data.title,
            "checkpoint": str(checkpoint.path),
            "epoch": checkpoint.epoch,
            "split_seed": data.hparams.split_seed,
            "split": data.split_fingerprint,
            "remark": data.remark,
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "lightning": lightning.__version__,
            },
        }
        result[f"{split}/n"] = int(result[f"{split}/n"])
        checkpoint.folder.mkdir(parents=True, exist_ok=True)
        path = checkpoint.folder / f"{command}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        stage = "validation" if split == "val" else "test"
        pictures, confusion = self._draw(trainer, split, matrix, stage)
        pictures.savefig(path.with_suffix(".png"), dpi=120)
        confusion.savefig(path.with_name(f"{command}_confusion.png"), dpi=120)
        after = f", epoch {checkpoint.epoch}," if checkpoint.epoch is not None else ""
        print(f"{checkpoint.path}{after} on {data.title}, {result[f'{split}/n']:,} pictures:")
        for name in ("acc", "top5", "loss"):
            print(f"  {split}/{name:5} {result[f'{split}/{name}']:.4f}")
        if data.remark:
            print(f"  note: {data.remark}")
        print(f"written: {path}, {path.with_suffix('.png').name}, {command}_confusion.png")


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml into the run folder, and shows it and the final figures in TensorBoard."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The configuration as text, and both losses on one chart."""
        board = trainer.loggers[0].experiment
        text = self.parser.dump(self.config, skip_none=False)
        board.add_text("configuration", "\n".join("    " + line for line in text.splitlines()))
        chart = ["Multiline", ["train/loss", "val/loss"]]
        board.add_custom_scalars({"loss": {"training and validation": chart}})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The hyperparameters with the run's final figures."""
        if not trainer.is_global_zero or "val/acc" not in trainer.callback_metrics:
            return
        config = self.config.as_dict()
        settings = {"seed": config["seed_everything"], "max_epochs": trainer.max_epochs}
        for group in ("model", "data"):
            settings |= {f"{group}.{key}": value for key, value in config[group].items()}
        best = best_row(run_folder(trainer))
        final = {"hp/val_acc": best["val/acc"], "hp/val_loss": best["val/loss"]}
        trainer.loggers[0].log_hyperparams(settings, final)
