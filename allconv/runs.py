"""Run folders and their checkpoints.

A run is `lightning_logs/version_N/`: config.yaml, metrics.csv, TensorBoard events, curves.png,
`checkpoints/best.ckpt` (highest val/acc) and `checkpoints/last.ckpt`.
"""

import csv
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from allconv.model import width_of

LOGS = "lightning_logs"
# what Lightning needs to go on, beside the weights
RESUMABLE = {
    *("hyper_parameters", "epoch", "global_step", "loops", "callbacks"),
    *("optimizer_states", "lr_schedulers", "pytorch-lightning_version"),
}


class CheckpointError(ValueError):
    """A checkpoint, or a file beside it, is missing, damaged or of another net."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one, flushes it to the disk and renames it over the old.

    Whatever happens meanwhile, a whole checkpoint is there. Lightning's own writing does not
    flush, and renames only where the temporary folder is on the same file system.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            CheckpointError: it cannot be written; the old file is as it was.
        """
        path = Path(path)
        beside = path.with_name(path.name + ".writing")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except (OSError, RuntimeError) as error:  # torch's writer makes disk errors RuntimeErrors
            beside.unlink(missing_ok=True)
            while error.__context__:
                error = error.__context__  # and hide what the disk said
            raise CheckpointError(
                f"{path}: cannot be written ({error}); the one before is kept"
            ) from None


@dataclass
class Checkpoint:
    """A checkpoint file that was read and found whole.

    Attributes:
        path: the file.
        hparams: arguments of the task it was made with; of a bare state dict, the width only.
        weights: the net's state dict.
        bare: whether it cannot be resumed: weights alone, as the notebook saved them.
        epoch: epochs trained, if the file tells.
        step: optimizer steps taken.
    """

    path: Path
    hparams: dict[str, object]
    weights: dict[str, Tensor]
    bare: bool = False
    epoch: int | None = None
    step: int = 0

    @property
    def run(self) -> Path | None:
        """The run folder it lies in, if it lies in one."""
        # of a short relative path the folders above have no names
        path = self.path if len(self.path.parts) > 2 else self.path.absolute()
        folder = path.parent.parent
        return folder if (folder / "config.yaml").is_file() else None

    @property
    def folder(self) -> Path:
        """Where what is found out about it is written: its run's folder, or its own."""
        return self.run or self.path.parent


def number(run: Path) -> int:
    """N of a run folder version_N; -1 of anything else."""
    match = re.fullmatch(r"version_(\d+)", run.name)
    return int(match[1]) if match and run.is_dir() else -1


def claim(logs: Path) -> Path:
    """Make the next free run folder; two processes never get the same."""
    logs.mkdir(parents=True, exist_ok=True)
    n = max(map(number, logs.iterdir()), default=-1) + 1
    while True:
        run = logs / f"version_{n}"
        try:
            run.mkdir()
            return run
        except FileExistsError:
            n += 1


def find_checkpoint(name: str, logs: Path, key: str = "ckpt_path") -> Path:
    """The file that `--ckpt_path` means.

    Args:
        name: "best" or "last" (of the newest run that has it), or a file.
        logs: folder of the runs.
        key: the argument, for the message.

    Raises:
        CheckpointError: there is none.
    """
    if name not in ("best", "last"):
        path = Path(name)
        if not path.is_file():
            raise CheckpointError(f"{key} is {name}: no such file; or give best or last")
        return path
    folders = logs.iterdir() if logs.is_dir() else ()
    for run in sorted(folders, key=number, reverse=True):
        path = run / "checkpoints" / f"{name}.ckpt"
        if number(run) >= 0 and path.is_file():
            return path
    raise CheckpointError(
        f"{key} is {name}: no run with a {name}.ckpt in {logs.absolute()}; "
        "train one (python -m allconv fit) or give a file (--ckpt_path FILE)"
    )


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of ours or a bare state dict; nothing in it is executed.

    Raises:
        CheckpointError: it cannot be read, or is of another net.
    """
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"{damaged} is damaged")  # torch.load looks at no checksum
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a checkpoint that can be read ({reason})") from None
    content = content if isinstance(content, dict) else {}
    state = content.get("state_dict", content)
    prefix = "net." if "state_dict" in content else ""
    weights = {
        key.removeprefix(prefix): value
        for key, value in (state if isinstance(state, dict) else {}).items()
        if isinstance(value, Tensor) and key.startswith(prefix)
    }
    if "conv1.0.weight" in weights and weights["conv1.0.weight"].ndim == 4:
        hparams = {"width": width_of(weights)}
        if not content.keys() >= RESUMABLE:
            return Checkpoint(path, hparams, weights, bare=True)
        saved = content["hyper_parameters"].items()
        hparams |= {key: value for key, value in saved if not key.startswith("_")}
        # saved within its last epoch, except before the first step
        epochs = content["epoch"] + (content["global_step"] > 0)
        return Checkpoint(path, hparams, weights, epoch=epochs, step=content["global_step"])
    raise CheckpointError(f"{path}: not a checkpoint of AllCNN")


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv; what a row does not have is left out of it.

    Raises:
        CheckpointError: the file is damaged.
    """
    path, rows = run / "metrics.csv", []
    if not path.is_file():
        return rows
    try:
        text = path.read_text("utf-8")
        for row in csv.DictReader(text.splitlines()):
            if None in row.values() and not text.endswith("\n"):
                break  # a full disk cut the last row off
            numbers = {key: float(value) for key, value in row.items() if value != ""}
            rows.append(numbers | {key: int(numbers[key]) for key in ("epoch", "step")})
    except (csv.Error, KeyError, OverflowError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: row {len(rows) + 1} is not one of numbers; mend it, or move the file away"
        ) from None
    return rows


def best_row(run: Path) -> dict[str, float] | None:
    """The row of the epoch with the highest val/acc, if any epoch was validated."""
    rows = [row for row in read_metrics(run) if "val/acc" in row]
    return max(rows, key=lambda row: row["val/acc"], default=None)


def loggers(run: Path, resume_step: int | None) -> list[Logger]:
    """TensorBoard and CSV loggers that write into one run folder.

    Args:
        run: the folder.
        resume_step: steps taken when a resumed run goes on; what was logged later is dropped, what
            was logged before is kept.
    """
    metrics, copy = run / "metrics.csv", run / "metrics.before-resume.csv"
    if resume_step is not None and copy.is_file():  # killed below: the copy is the whole table
        copy.replace(metrics)
    place = {"save_dir": run.parent.parent, "name": run.parent.name, "version": run.name}
    kept = read_metrics(run) if resume_step is not None else []
    table = CSVLogger(**place)
    if kept:
        # CSVLogger begins by deleting the file, so a copy has to outlive a kill
        metrics.replace(copy)
        for row in kept:
            if row["step"] < resume_step:
                table.experiment.log_metrics(row, row["step"])
        table.save()
        copy.unlink()
    purge = {} if resume_step is None else {"purge_step": resume_step}
    return [TensorBoardLogger(**place, default_hp_metric=False, **purge), table]
