"""Progress of a training: what is trained, an estimate, a line per epoch, a bar at a terminal."""

import logging
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from shlex import quote

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.progress import Progress as Bar

from allconv.rundir import best_row

HEAD = "epoch  train loss  val loss  val acc (%)  best (%)        lr  time left"


def run_directory(trainer: Trainer) -> Path | None:
    """The run directory; unlike trainer.log_dir, this is no collective operation."""
    logger = trainer.loggers[0] if trainer.loggers else None
    folder = getattr(logger, "log_dir", None)
    return Path(folder) if folder else None


def resume_with(last: Path) -> str:
    """The command that resumes a run from its last.ckpt."""
    return f"resume with: python -m allconv fit --ckpt_path {quote(str(last))}"


class Progress(Callback):
    """Shows what is trained, the progress, the time left, and where the results are.

    Args:
        bar: whether there is a terminal for a bar.
    """

    def __init__(self, bar: bool):
        self.bar = None
        if bar:
            columns = ["{task.description}", MofNCompleteColumn(), "{task.fields[text]}"]
            self.unit = "/s "
            if Console().width >= 120:
                columns.insert(1, BarColumn(20))
                self.unit = " images/s, left "
            self.bar = Bar(*columns, transient=True)
        self.best, self.validated, self.validated_in = 0.0, "", -1
        self.headed = False  # whether the estimate and HEAD were printed

    def _print(self, text: str) -> None:
        if self.bar:
            # a command must stay one line to be copied
            whole = "python -m" in text
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=whole)
        else:
            print(text, flush=True)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what is trained, and on what."""
        self.start, self.first = time.monotonic(), trainer.current_epoch
        # batches and images since `start`, and batches of the whole session
        self.timed = self.images = self.done = 0
        self.end = trainer.max_epochs if trainer.max_epochs >= 0 else "?"  # -1: no end
        run, data = run_directory(trainer), trainer.datamodule
        if run and (best := best_row(run)):
            self.best = 100 * best["val/acc"]
            self.validated = f" best {self.best:.1f}%"
        parameters = sum(p.numel() for p in pl_module.net.parameters())
        count, sizes = {}, (data.hparams.batch_size, data.eval_batch_size)
        limit = trainer.limit_val_batches  # a number, or a share, which may be 0 or 1
        limit = math.inf if isinstance(limit, float) and limit else int(limit)
        # the number is not known yet where the first epoch is not validated
        batches = (trainer.num_training_batches, sum(trainer.num_val_batches) or limit)
        for split, n, size in zip(("train", "val"), batches, sizes, strict=True):
            whole, used = len(data.sets[split]), n * size * trainer.world_size
            count[split] = f"{used:,} of {whole:,}" if used < whole else f"{whole:,}"
        teacher = pl_module.hparams.get("teacher")
        teacher = f"teacher: {teacher}\n" if teacher else ""
        self._print(
            f"AllCNN, {parameters:,} parameters, on {data.dataset.title}: "
            f"{count['train']} training and {count['val']} validation images\n"
            f"epochs {self.first + 1} to {self.end}, batches of "
            f"{data.hparams.batch_size}, {trainer.world_size} x "
            f"{trainer.strategy.root_device.type} ({trainer.precision}), "
            f"seed {os.environ.get('PL_GLOBAL_SEED')}\n{teacher}run directory: {run or 'none'}"
        )
        if self.bar:
            self._print(HEAD)
            self.bar.start()
            for handler in logging.getLogger("lightning.pytorch").handlers:
                handler.setStream(sys.stderr)  # the bar's by now: messages appear above it
            self.task = self.bar.add_task("", total=trainer.num_training_batches, text="")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the running mean of the loss."""
        self.losses = []

    @rank_zero_only
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Move the bar; after the first 20 steps, estimate how long the run will take."""
        self.done, self.timed = self.done + 1, self.timed + 1
        batches, done = trainer.num_training_batches, batch_idx + 1
        self.images += len(batch[1]) * trainer.world_size
        rate = self.images / (time.monotonic() - self.start)
        if not self.bar and not self.headed and (self.done == 20 or trainer.is_last_batch):
            self.headed = True
            self._print(f"about {self._left(trainer)} left, {rate:,.0f} images/s\n{HEAD}")
        if self.bar and (done % 10 == 0 or trainer.is_last_batch):  # waits for the device
            self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
            epoch, run = (batches - done) * self._seconds(), self._left(trainer)
            self.bar.update(
                self.task,
                description=f"epoch {trainer.current_epoch + 1}/{self.end}",
                completed=done,
                total=batches,
                text=f"loss {sum(self.losses) / len(self.losses):.2f}{self.validated} "
                f"{rate:,.0f}{self.unit}{_short(_duration(epoch))}/{_short(run)}",
                refresh=True,
            )
        if self.done == 5:  # the first steps are slower
            self.start, self.timed, self.images = time.monotonic(), 0, 0

    def _seconds(self) -> float:
        """Mean time per batch, validations included."""
        return (time.monotonic() - self.start) / max(1, self.timed)

    def _left(self, trainer: Trainer) -> str:
        """Time left of the run."""
        epochs = math.inf if self.end == "?" else self.end - self.first
        left = epochs * trainer.num_training_batches - self.done
        if trainer.max_steps >= 0:
            steps = trainer.max_steps - trainer.global_step
            left = min(left, steps * trainer.accumulate_grad_batches)
        timers = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]
        return _duration(min([left * self._seconds(), *(t for t in timers if t is not None)]))

    @rank_zero_only
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show that a validation is running."""
        if self.bar and not trainer.sanity_checking:
            self.bar.update(self.task, text=f"validating{self.validated}", refresh=True)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the result for the bar, and the best; an epoch may be validated more than once."""
        if not trainer.sanity_checking:
            loss, acc = (trainer.callback_metrics[f"val/{name}"].item() for name in ("loss", "acc"))
            self.best, self.validated_in = max(self.best, 100 * acc), trainer.current_epoch
            self.validated = f" val {loss:.2f} {100 * acc:.1f}% best {self.best:.1f}%"
            if self.bar:
                self.bar.update(self.task, text=self.validated.strip(), refresh=True)

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a line for the epoch."""
        metrics, done = trainer.callback_metrics, trainer.current_epoch + 1
        # resumed from a validation in the last step, an epoch has no steps left
        if not trainer.is_last_batch or "train/loss" not in metrics:
            return
        columns = f"{'-':>8}  {'-':>11}  {'-':>8}"
        if self.validated_in == trainer.current_epoch:
            loss, acc = metrics["val/loss"].item(), 100 * metrics["val/acc"].item()
            columns = f"{loss:8.4f}  {acc:11.2f}  {self.best:8.2f}"
        self._print(
            f"{done:5d}  {metrics['train/loss']:10.4f}  {columns}  {metrics['lr']:8.4g}  "
            f"{self._left(trainer):>9}"
        )

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the best result, where the files are, and the next command."""
        if self.bar:
            self.bar.stop()
        run = run_directory(trainer)
        if not run:
            return
        epochs, last = trainer.current_epoch, run / "checkpoints" / "last.ckpt"
        for callback in trainer.early_stopping_callbacks:
            reason = getattr(callback, "stopping_reason_message", None)  # not in Lightning 2.5
            # a resumed run still has the reason of the stop before it
            if reason and trainer.should_stop and not callback.verbose:
                self._print(f"stopped early: {reason}")
        whole = epochs if trainer.is_last_batch else epochs - 1
        stopped = [callback.stopped_epoch + 1 for callback in trainer.early_stopping_callbacks]
        # in this session, and perhaps before min_epochs allowed it
        early = trainer.should_stop and any(self.first < epoch <= epochs for epoch in stopped)
        flag = ""
        if 0 <= (limit := trainer.max_steps) <= trainer.global_step:
            flag = f" --trainer.max_steps {-1 if trainer.max_epochs >= 0 else 2 * limit}"
        if whole < epochs or (not 0 <= trainer.max_epochs <= whole and not early):
            self._print(
                f"stopped {'in' if whole < epochs else 'after'} epoch {epochs} at step "
                f"{trainer.global_step}: last.ckpt holds {whole} whole "
                f"epoch{'' if whole == 1 else 's'}; {resume_with(last)}{flag}"
            )
        if best := best_row(run):
            title = trainer.datamodule.dataset.title
            self._print(
                f"best epoch {best['epoch'] + 1} of {max(whole, best['epoch'] + 1)} on {title}: "
                f"val/acc {best['val/acc']:.4f}, top 5 {best['val/top5']:.4f}, "
                f"loss {best['val/loss']:.4f}"
            )
        self._print(f"run directory: {run}")
        # without validation there is no best
        found = [p for p in (last.with_name("best.ckpt"), last) if p.is_file()]
        paths = [quote(str(path)) for path in found[:1] if whole]
        commands = [f"python -m allconv test --ckpt_path {path}" for path in paths]
        commands.append(f"tensorboard --logdir {quote(str(run.parent))}")
        self._print("next: " + "\n      ".join(commands))

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module, exception: BaseException) -> None:
        """Restore the terminal."""
        if self.bar:
            self.bar.stop()


def _duration(seconds: float) -> str:
    if seconds >= 86400:
        return "?" if seconds == math.inf else f"{seconds / 86400:.1f} days"
    return str(timedelta(seconds=max(0, round(seconds))))


def _short(duration: str) -> str:
    return duration.removeprefix("0:")  # 80 columns are few
