"""Run directories, `lightning_logs/version_N/`: find, create, lock and read; atomic file writes.

Imports neither torch nor Lightning. Missing or damaged files are a RunError.
"""

import contextlib
import csv
import fcntl
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import yaml

from allconv.errors import UserError, say

LOGS = "lightning_logs"
CONFIGS = Path(__file__).parent / "configs"  # the recipes
CONFIGS = CONFIGS if CONFIGS.is_dir() else CONFIGS.parent.parent / "configs"  # in a clone
# keys of config.yaml that do not tell how a network was trained: a machine's paths, and displays
LOCAL = {"data_dir", "default_root_dir", "dirpath", "save_dir", "ckpt_path"}
LOCAL |= {"enable_progress_bar", "enable_model_summary"}


class RunError(UserError):
    """A file of a run directory, or a configuration, is missing or damaged."""


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: to a temporary file beside it, flushed to disk, then renamed.

    Args:
        path: the file; missing folders are created.
        write: called with the open binary file.
    """
    # short, to fit wherever the file's name does; random, since machines or containers that share
    # a folder may have equal process ids
    beside = path.with_name(f".{os.urandom(4).hex()}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a disk error
        while error.__context__:
            error = error.__context__  # and hides its cause
        kept = "; the earlier one is kept" if os.path.exists(path) else ""
        raise RunError(f"{path}: cannot be written ({error}){kept}") from None
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def number(run: Path) -> int:
    """The N of a run directory version_N; -1 for anything else."""
    match = re.fullmatch(r"version_(\d+)", run.name)
    return int(match[1]) if match and run.is_dir() else -1


def runs(logs: Path) -> list[Path]:
    """The run directories in `logs`, oldest first."""
    found = [run for run in logs.iterdir() if number(run) >= 0] if logs.is_dir() else []
    return sorted(found, key=number)


def create(logs: Path, begin: Path | None = None) -> Path:
    """Create the next free run directory; two processes never get the same one.

    `begin` is the checkpoint that the run goes on from, if any: its last.ckpt for now.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for n in itertools.count(1 + max(map(number, runs(logs)), default=-1)):
        with contextlib.suppress(FileExistsError):
            run = logs / f"version_{n}"
            run.mkdir()
            if begin:
                last = run / "checkpoints/last.ckpt"
                write_atomic(last, lambda file: file.write(begin.read_bytes()))
            return run


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Lock a run directory against other processes; a process that dies releases its lock."""
    with (run / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{run}: another process is training in it") from None
        except OSError as error:  # some network file systems have no locks
            say(f"{run}: no lock ({error.strerror}); train in it with one process at a time")
        for left in run.rglob(".*.writing"):  # by a killed process
            left.unlink()
        _date_before_now(event_files(run))
        yield


def _date_before_now(files: list[Path]) -> None:
    """Rename event files dated in the future, since TensorBoard reads files in name order.

    The clock was set back in the meantime, or was that of another machine.
    """
    latest = int(time.time()) - len(files)
    for i, path in enumerate(files):
        second = path.name.split(".")[3]
        if int(second) > latest + i:
            path.rename(path.with_name(path.name.replace(second, f"{latest + i:010d}", 1)))


def event_files(run: Path) -> list[Path]:
    """A run's TensorBoard files, oldest first; a name holds the second the file was created."""
    return sorted(run.glob(f"events.out.tfevents.{10 * '[0-9]'}.*"))


def read_rows(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv as text; [] if there is no file."""
    path, rows = run / "metrics.csv", []
    try:
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        for row in csv.DictReader(lines):
            if None in row or None in row.values():
                raise ValueError
            int(row["step"]), int(row.get("epoch") or 0)
            rows.append({key: value for key, value in row.items() if value != ""})
    except (csv.Error, KeyError, ValueError, OSError):
        raise RunError(f"{path}: row {len(rows) + 1} is damaged; fix or delete it") from None
    return rows


def read_metrics(run: Path) -> list[dict[str, float]]:
    """A run's metrics, one dict per epoch, without cells that are not numbers."""
    epochs: dict[float, dict[str, float]] = {}
    for row in _measured(run):
        epochs.setdefault(row["epoch"], {}).update(row)
    return list(epochs.values())


def _measured(run: Path) -> Iterator[dict[str, float]]:
    for row in read_rows(run):
        numbers = {}
        for key, value in row.items():
            with contextlib.suppress(ValueError):
                numbers[key] = int(value) if key in ("epoch", "step") else float(value)
        # callbacks of the user may log rows of their own, without an epoch or within one
        if "epoch" in numbers and not numbers.keys().isdisjoint({"train/loss", "val/acc"}):
            yield numbers


def best_row(run: Path) -> dict[str, float] | None:
    """The row of the validation with the highest val/acc, as best.ckpt; None without validation."""
    rows = [row for row in _measured(run) if "val/acc" in row]
    return max(rows, key=lambda row: row["val/acc"], default=None)


def why_new_run(run: Path | None, path: Path, step: int) -> str | None:
    """Why a checkpoint begins a new run, and is not resumed in its own; None if it is."""
    if not run:
        return "in no run directory"
    best = best_row(run)
    # best.ckpt would be that of an epoch which the run no longer has; if it is of the epoch in
    # which the run was broken off, last.ckpt leads to it again
    if path.name != "last.ckpt" and best and best["step"] >= step:
        return "older than the best.ckpt of its run"
    return None


def read_yaml(path: Path) -> dict[str, object]:
    """Read a YAML mapping without aliases, at most 40 levels deep and 1 MB large."""
    try:
        if not path.is_file() or path.stat().st_size > 10**6:
            raise ValueError("expected a file of at most 1 MB")
        text, depth = path.read_text("utf-8"), 0
        for event in yaml.parse(text, _Loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > 40 or isinstance(event, yaml.AliasEvent):
                raise ValueError("nested too deeply, or with an alias")
        content = yaml.load(text, _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: not YAML that can be read ({error})") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise RunError(f"{path}: expected keys and values, found {found}")
    return content


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Rejects duplicate keys; in C, ten times as fast, where PyYAML has it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise ValueError(f"a key is there twice among {', '.join(keys)[:100]}")
        return super().construct_mapping(node, deep)


def read_config(run: Path) -> dict[str, object]:
    """A run's config.yaml without nulls and without a machine's paths; {} if there is none."""
    path = run / "config.yaml"
    return _portable(read_yaml(path)) if path.exists() else {}


def flat(config: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten a configuration to one dotted key per setting."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _portable(value: object) -> object:
    if isinstance(value, list):
        return [_portable(v) for v in value]
    if not isinstance(value, dict):
        return value
    kept = {k: _portable(v) for k, v in value.items() if v is not None and k not in LOCAL}
    for key, n in (("init", 3), ("teacher", 3), ("folder", 1)):  # version_N/checkpoints/best.ckpt
        if key in kept:
            kept[key] = "/".join(Path(str(kept[key])).parts[-n:])
    return kept
