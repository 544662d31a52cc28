"""Run folders and their checkpoints.

A run is `lightning_logs/version_N/`: config.yaml, metrics.csv, TensorBoard events, curves.png,
`checkpoints/best.ckpt` (highest val/acc) and `checkpoints/last.ckpt`.
"""

import csv
import inspect
import json
import os
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from torch import Tensor

from allconv.model import AllCNN, width_of

LOGS = "lightning_logs"
PRETRAINED = Path(__file__).with_name("pretrained.safetensors")  # written by `allconv export`
# keys of a config.yaml that name places on one machine
PLACES = {"data_dir", "default_root_dir", "dirpath", "save_dir", "ckpt_path"}
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
        facts: what it says of its data (demo, split, split_seed); packaged, also classes, recipe,
            figures.
    """

    path: Path
    hparams: dict[str, object]
    weights: dict[str, Tensor]
    bare: bool = False
    epoch: int | None = None
    step: int = 0
    facts: dict[str, object] = field(default_factory=dict)

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
        if self.path == PRETRAINED:  # nothing is written into an installed package
            return Path(LOGS, "pretrained")
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
        name: "best" or "last" (of the newest run that has it), "pretrained", or a file.
        logs: folder of the runs.
        key: the argument, for the message.

    Raises:
        CheckpointError: there is none.
    """
    if name not in ("best", "last"):
        path = PRETRAINED if name == "pretrained" else Path(name)
        if not path.is_file():
            raise CheckpointError(f"{key} is {name}: no such file; or give best, last, pretrained")
        return path
    folders = logs.iterdir() if logs.is_dir() else ()
    for run in sorted(folders, key=number, reverse=True):
        path = run / "checkpoints" / f"{name}.ckpt"
        if number(run) >= 0 and path.is_file():
            return path
    raise CheckpointError(
        f"{key} is {name}: no run with a {name}.ckpt in {logs.absolute()}; "
        "train one (python -m allconv fit) or name a file instead"
    )


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of ours, packaged weights or a bare state dict; nothing is executed.

    Raises:
        CheckpointError: it cannot be read, or is of another net.
    """
    if path.suffix == ".safetensors":
        return _load_packaged(path)
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
        step, facts = content["global_step"], content.get("CIFAR100", {})
        settings = content.get("datamodule_hyper_parameters", {})
        facts |= {key: settings[key] for key in ("split_seed",) if key in settings}
        return Checkpoint(path, hparams, weights, epoch=epochs, step=step, facts=facts)
    raise CheckpointError(f"{path}: not a checkpoint of AllCNN")


def _load_packaged(path: Path) -> Checkpoint:
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("allconv", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not weights that can be read ({error})") from None
    if not (isinstance(facts, dict) and "hparams" in facts and "conv1.0.weight" in weights):
        raise CheckpointError(f"{path}: no weights packaged by python -m allconv export")
    return Checkpoint(
        path, facts["hparams"], weights, bare=True, epoch=facts.get("epoch"), facts=facts
    )


def net_of(checkpoint: Checkpoint) -> AllCNN:
    """The net of a checkpoint, on the CPU in eval mode, channels last.

    Raises:
        CheckpointError: the weights are of another net.
    """
    known = inspect.signature(AllCNN).parameters
    net = AllCNN(**{key: value for key, value in checkpoint.hparams.items() if key in known})
    put_weights(checkpoint, net)
    return net.to(memory_format=torch.channels_last).eval()


def put_weights(checkpoint: Checkpoint, net: AllCNN) -> None:
    """Put a checkpoint's weights into a net.

    Raises:
        CheckpointError: they are of another net.
    """
    found, width = width_of(checkpoint.weights), width_of(net.state_dict())
    if found != width:
        raise CheckpointError(
            f"{checkpoint.path}: made with model.width {found}, but it is {width} here"
        )
    try:
        net.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None


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


def evaluation(folder: Path, command: str, name: str, epoch: int | None) -> dict[str, object]:
    """What `test` or `validate` last wrote into a folder, if it was of this checkpoint; or {}.

    Args:
        folder: a run's, or the checkpoint's own.
        command: "test" or "validate".
        name: the checkpoint's file name.
        epoch: epochs that it was trained.
    """
    try:
        found = json.loads((folder / f"{command}.json").read_text("utf-8"))
        of = Path(found["checkpoint"]).name, found["epoch"], found["remark"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or not what we write
        return {}
    return found if of == (name, epoch, None) else {}


def read_config(run: Path) -> dict[str, object]:
    """A run's config.yaml without nulls and without this machine's folders; {} if damaged."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return _portable(config) if isinstance(config, dict) else {}


def _portable(value: object) -> object:
    if isinstance(value, list):
        return [_portable(v) for v in value]
    if not isinstance(value, dict):
        return value
    kept = {k: _portable(v) for k, v in value.items() if v is not None and k not in PLACES}
    return {k: Path(v).name if k == "init" else v for k, v in kept.items()}


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
