"""Results of `test` and `validate`: printed, written as JSON beside the run, and read back."""

import json
import platform
import re
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from allconv.errors import UserError
from allconv.rundir import best_row, read_metrics, write_text


def place(checkpoint, command: str, dataset) -> Path:
    """The files of an evaluation, without their suffixes, such as `RUN/test`.

    `RUN/test` is of best.ckpt, and `RUN/test_last` of last.ckpt; `_on_pets` is appended if the data
    set, pets, is not that of the training.
    """
    name = command
    if checkpoint.run and checkpoint.path.stem != "best":
        name += f"_{checkpoint.path.stem}"
    if _other_data(checkpoint, dataset):
        name += "_on_" + re.sub(r"\W+", "_", dataset.title).strip("_")
    return checkpoint.folder / name


def _other_data(checkpoint, dataset) -> bool:
    return bool(checkpoint.data) and checkpoint.dataset != dataset


def write(checkpoint, data, command: str, metrics, save_figures: Callable[[], None]) -> None:
    """Print the results of an evaluation, and write them unless it was only of a part of a split.

    Args:
        checkpoint: the `allconv.checkpoints.Checkpoint` that was evaluated.
        data: the `allconv.CIFAR100` that it was evaluated on.
        command: "test" or "validate".
        metrics: the split's metrics by name, as tensors of one element.
        save_figures: writes the figures, after the results.
    """
    metrics = {name: value.item() for name, value in metrics.items()}
    split = "test" if command == "test" else "val"
    if f"{split}/n" not in metrics:
        limit = f"trainer.limit_{split}_batches is 0"
        raise UserError(f"nothing was measured: {limit}, or trainer.barebones is true")
    title, n = data.dataset.title, int(metrics[f"{split}/n"])
    result = {
        **{name: round(value, 7) for name, value in metrics.items()},
        f"{split}/n": n,
        "data": title,
        "checkpoint": str(checkpoint.path),
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "val_size": data.hparams.val_size,
        "split_seed": data.hparams.split_seed,
        "precision": data.trainer.precision,
        "remark": _remark(checkpoint, data, split),
        **provenance(),
    }
    step = f" (step {checkpoint.step:,})" if checkpoint.step else ""
    epoch = "" if checkpoint.epoch is None else f", epoch {checkpoint.epoch}{step},"
    print(f"{checkpoint.path}{epoch} on {title}, {n:,} images:")
    shown = [f"{split}/{name}" for name in ("acc", "top5", "loss", "acc_flip")]
    shown = [name for name in shown if name in metrics]
    for name in shown:
        print(f"  {name:{max(map(len, shown))}}  {metrics[name]:.4f}")
    if result["remark"]:
        print(f"  note: {result['remark']}")
    base, whole = place(checkpoint, command, data.dataset), len(data.sets[split])
    if n < whole:
        print(f"nothing is written: these are {n:,} of {whole:,} images")
        return
    write_text(base.with_name(f"{base.name}.json"), json.dumps(result, indent=2) + "\n")
    save_figures()
    print(f"written: {base}.json, {base.name}.png, {base.name}_confusion.png")


def provenance() -> dict[str, object]:
    """Date and versions, for a file of results."""
    names = ("allconv", "torch", "torchvision", "lightning")
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
    }


def _remark(checkpoint, data, split: str) -> str | None:
    """What qualifies the result, if anything."""
    now, trained = data.hparams, checkpoint.data
    if _other_data(checkpoint, data.dataset):
        return "trained on another data set than it is evaluated on"
    now = {**now, "digest": data.digest or trained.get("digest")}
    keys = ("val_size", "split_seed", "digest")
    if split == "val" and any(trained.get(key, now[key]) != now[key] for key in keys):
        return "other images or another split than in training: it may have seen some of these"


def read(base: Path, checkpoint: str, epoch: int | None, step: int) -> dict[str, object]:
    """The results of an evaluation, if they are this checkpoint's.

    Args:
        base: the files without their suffixes, see `place`.
        checkpoint: the checkpoint's file name.
        epoch: the number of epochs it was trained for.
        step: the number of optimizer steps; an epoch may have been validated more than once.

    Returns:
        The file's content; {} if it is another checkpoint's, or has a remark.
    """
    try:
        path = base.with_name(f"{base.name}.json")
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        of = Path(found["checkpoint"]).name, found["epoch"], found["remark"]
        same_step = found.get("step", step) == step  # not in the reference run's
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or not ours
        return {}
    return found if same_step and of == (checkpoint, epoch, None) else {}


def tested(run: Path) -> dict[str, object]:
    """The results of `test` of a run: of best.ckpt, or of last.ckpt if there was no validation."""
    if best := best_row(run):
        # a validation within an epoch saves best.ckpt before the epoch counts
        epoch = best["epoch"] + ("train/loss" in best)
        return read(run / "test", "best.ckpt", epoch, best["step"] + 1)
    if not (epochs := read_metrics(run)):
        return {}
    last = epochs[-1]
    return read(run / "test_last", "last.ckpt", last["epoch"] + 1, last["step"] + 1)
