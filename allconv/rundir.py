"""Run directories, `lightning_logs/version_N/`: found, made, read; and how a file is written.

Imports neither torch nor Lightning. What is missing or damaged is a RunError.
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
# keys of a config.yaml that name places on one machine
PLACES = {"data_dir", "default_root_dir", "dirpath", "save_dir", "ckpt_path"}


class RunError(UserError):
    """A file of a run directory, or a configuration, is missing or damaged."""


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place, flush it to the disk and rename it: whole or not at all.

    Args:
        path: where; missing folders are made.
        write: writes the content into an open binary file.
    """
    # short, so that any name that fits fits beside itself; random, since two machines or
    # containers that share a folder may have the same process numbers
    beside = path.with_name(f".{os.urandom(4).hex()}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer makes a disk error a RuntimeError
        while error.__context__:
            error = error.__context__  # and hides what the disk said
        raise RunError(f"{path}: cannot be written ({error}); the file before is kept") from None
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    write_whole(path, lambda file: file.write(text.encode()))


def number(run: Path) -> int:
    """N of a run directory version_N; -1 of anything else."""
    match = re.fullmatch(r"version_(\d+)", run.name)
    return int(match[1]) if match and run.is_dir() else -1


def runs(logs: Path) -> list[Path]:
    """The run directories in `logs`, oldest first."""
    found = [run for run in logs.iterdir() if number(run) >= 0] if logs.is_dir() else []
    return sorted(found, key=number)


def create(logs: Path) -> Path:
    """Make the next free run directory; two processes never get the same."""
    logs.mkdir(parents=True, exist_ok=True)
    for n in itertools.count(1 + max(map(number, runs(logs)), default=-1)):
        with contextlib.suppress(FileExistsError):
            (logs / f"version_{n}").mkdir()
            return logs / f"version_{n}"


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold a run directory, unless another process does; one that was killed holds nothing."""
    with (run / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{run}: another process is training in it") from None
        except OSError as error:  # some network file systems have no locks
            say(f"{run}: no lock ({error.strerror}); train in it with one process at a time")
        for left in run.rglob(".*.writing"):  # by a process that was killed
            left.unlink()
        _date_before_now(event_files(run))
        yield


def _date_before_now(files: list[Path]) -> None:
    """Rename event files of the future: TensorBoard reads them in the order of their names.

    Their clock was ahead: it was set back since, or was another machine's.
    """
    latest = int(time.time()) - len(files)
    for i, path in enumerate(files):
        second = path.name.split(".")[3]
        if int(second) > latest + i:
            path.rename(path.with_name(path.name.replace(second, f"{latest + i:010d}", 1)))


def event_files(run: Path) -> list[Path]:
    """A run's TensorBoard files, oldest first; each is named by the second it was begun."""
    return sorted(run.glob(f"events.out.tfevents.{10 * '[0-9]'}.*"))


def read_rows(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv as they are; [] if there is none."""
    path, rows = run / "metrics.csv", []
    try:
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        for row in csv.DictReader(lines):
            if None in row or None in row.values():
                raise ValueError
            int(row["step"]), int(row.get("epoch") or 0)
            rows.append({key: value for key, value in row.items() if value != ""})
    except (csv.Error, KeyError, ValueError, OSError):
        raise RunError(f"{path}: row {len(rows) + 1} is damaged; mend or delete it") from None
    return rows


def read_metrics(run: Path) -> list[dict[str, float]]:
    """A run's metrics, one dict an epoch; cells that are not numbers are left out."""
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
        # other callbacks may log rows of their own, without an epoch or within one
        if "epoch" in numbers and not numbers.keys().isdisjoint({"train/loss", "val/acc"}):
            yield numbers


def best_row(run: Path) -> dict[str, float] | None:
    """The row of the validation with the highest val/acc; best.ckpt is of that moment."""
    rows = [row for row in _measured(run) if "val/acc" in row]
    return max(rows, key=lambda row: row["val/acc"], default=None)


def read_yaml(path: Path) -> dict[str, object]:
    """A YAML file of keys and values, without aliases, at most 40 levels deep and 1 MB large."""
    try:
        if not path.is_file() or path.stat().st_size > 10**6:
            raise ValueError("expected a file of at most 1 MB")
        text, depth = path.read_text("utf-8"), 0
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > 40 or isinstance(event, yaml.AliasEvent):
                raise ValueError("nested too deeply, or with an alias")
        content = yaml.load(text, _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path}: not YAML that can be read ({error})") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise ValueError(f"a key is there twice among {', '.join(keys)[:100]}")
        return super().construct_mapping(node, deep)


def read_config(run: Path) -> dict[str, object]:
    """A run's config.yaml without nulls and without this machine's folders; {} if there is none."""
    path = run / "config.yaml"
    return _portable(read_yaml(path)) if path.exists() else {}


def flat(config: dict[str, object], prefix: str = "") -> dict[str, object]:
    """A configuration with one dotted key per setting."""
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
    kept = {k: _portable(v) for k, v in value.items() if v is not None and k not in PLACES}
    return {k: Path(str(v)).name if k in ("init", "folder") else v for k, v in kept.items()}
