"""`python -m allconv runs`: list runs and results, with mean and deviation over seeds."""

import itertools
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from statistics import mean, stdev

import yaml

from allconv import evaluation, rundir
from allconv.errors import Parser, UserError, printable

Row = dict[str, object]

COLUMNS = "number recipe data width epochs val/acc best_epoch test/acc seed when changes problem"
# columns of the table over seeds: one value for all, and one per seed
SAME = ("recipe", "data", "width", "epochs", "max_epochs", "changes")
LISTED = ("number", "seed", "val/acc", "test/acc")
BELOW = ("best_epoch", "when", "changes", "problem")  # below the row, in a narrow terminal


def describe(run: Path) -> tuple[Row, dict[str, object]]:
    """A run's row, with None for what is unknown, and its configuration."""
    if not os.access(run, os.R_OK | os.X_OK):
        unknown = dict.fromkeys([*COLUMNS.split(), "max_epochs"])
        return unknown | {"number": _name(run), "problem": "permission denied"}, {}
    config, metrics, best, problems = {}, [], {}, []
    try:
        config = rundir.read_config(run)
    except rundir.RunError as error:
        problems.append(str(error).removeprefix(f"{run}/"))
    try:
        metrics, best = rundir.read_metrics(run), rundir.best_row(run) or {}
    except rundir.RunError as error:
        problems.append(str(error).removeprefix(f"{run}/"))
    if (run / "hparams.yaml").is_file() and not (config or problems):
        problems.append("no config.yaml: trained from Python")
    groups = {name: config.get(name, {}) for name in ("model", "data", "trainer")}
    problems += [f"{k} is {v}, not a group" for k, v in groups.items() if not isinstance(v, dict)]
    model, data, trainer = (v if isinstance(v, dict) else {} for v in groups.values())
    epoch = best["epoch"] + 1 if best else None
    # the name holds the time, which a copy of the file would lose
    start = min((int(path.name.split(".")[3]) for path in rundir.event_files(run)), default=None)
    test = evaluation.tested(run) if metrics else {}
    known = "demo" if data.get("demo") else "CIFAR-100"
    row = {
        "number": _name(run),
        "recipe": config.get("recipe"),
        "data": (data.get("folder") or known) if data else None,
        "width": model.get("width"),
        "epochs": max((row["epoch"] + 1 for row in metrics), default=None),
        "max_epochs": trainer.get("max_epochs"),
        "val/acc": _fraction(best.get("val/acc")),
        "best_epoch": epoch,
        "test/acc": _fraction(test.get("test/acc")),
        "seed": config.get("seed_everything"),
        "when": start and datetime.fromtimestamp(start).isoformat(" ", "minutes"),
        "changes": ", ".join(_changes(run, config)) or None,
        "problem": "; ".join(problems) or None,
    }
    # a damaged configuration may hold anything
    return {k: v if isinstance(v, int | float | None) else str(v) for k, v in row.items()}, config


def _name(run: Path) -> str | int:
    return run.name if rundir.number(run) < 0 else rundir.number(run)


def _changes(run: Path, config: dict[str, object]) -> list[str]:
    """The settings that differ from the run's recipe, or else from their defaults."""
    files, recipe, found = {path.stem: path for path in rundir.CONFIGS.glob("*.yaml")}, {}, []
    for name in str(config.get("recipe")).split("+"):
        recipe |= _flat(rundir.read_yaml(files[name])) if name in files else {}
    try:  # it holds the settings that are not defaults
        chosen = _flat(rundir.read_yaml(run / "hparams.yaml"))
    except rundir.RunError:  # none, or damaged
        chosen = {}
    nulls = {k: "null" for k, v in recipe.items() if v is not None and k not in rundir.LOCAL}
    for key, value in ((nulls if config else {}) | _flat(config)).items():
        if value != recipe[key] if key in recipe else key in chosen:
            found.append(f"{key} {value}".replace("'", ""))
    return found


def _flat(config: dict[str, object]) -> dict[str, object]:
    groups = [config.get(name) for name in ("model", "data", "trainer")]
    found = [pair for group in groups if isinstance(group, dict) for pair in group.items()]
    found += [("init", config["init"])] if config.get("init") else []
    name = re.compile(r"'class_path': '(?:\w+\.)*(\w+)'")  # of a callback or a logger
    return {str(k).rstrip("+"): name.findall(str(v)) or v for k, v in found}


def _fraction(value: object) -> float | None:
    return value if isinstance(value, float) and 0 <= value <= 1 else None


def sum_up(runs: list[tuple[Row, dict[str, object]]]) -> list[Row]:
    """Mean and standard deviation over runs that differ only in their seed; the newest of each."""
    groups: dict[str, dict[object, Row]] = defaultdict(dict)
    for row, config in runs:
        config = {k: v for k, v in config.items() if k not in ("seed_everything", "recipe")}
        if row["val/acc"] is not None and row["seed"] is not None:
            groups[yaml.safe_dump([row["epochs"], config])][row["seed"]] = row
    found = []
    for seeds in groups.values():
        if len(seeds) > 1:
            columns = {key: [row[key] for row in seeds.values()] for key in (*SAME, *LISTED)}
            same = {key: columns[key][-1] for key in SAME}
            spread = {key: _spread(columns[key]) for key in ("val/acc", "test/acc")}
            found.append(columns | same | spread)
    return found


def _spread(values: list[float | None]) -> dict[str, float | None] | None:
    known = [value for value in values if value is not None]
    sd = stdev(known) if len(known) > 1 else None
    return {"mean": mean(known), "sd": sd, "n": len(known)} if known else None


def _cell(row: Row, key: str) -> str:
    value = row[key]
    if value is None:
        return "-"
    if isinstance(value, dict):
        spread = "" if value["sd"] is None else f" ± {value['sd']:.4f}"
        n = f" (n = {value['n']})" if value["n"] < len(row["seed"]) else ""
        return f"{value['mean']:.4f}{spread}{n}"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    if key == "problem":
        value = value.splitlines()[0][:60]
    if key == "epochs":
        value = f"{value}/{row['max_epochs']}".removesuffix("/-1").removesuffix("/None")
    return f"{value:.4f}" if isinstance(value, float) else printable(value)


def _align(rows: list[Row], keys: list[str]) -> list[str]:
    """The rows as lines of a table, below its header."""
    table = [keys, *([_cell(row, key) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]


def _print(rows: list[Row]) -> None:
    ill = any(row.get("problem") for row in rows)
    keys = [key for key in COLUMNS.split() if key in rows[0] and (ill or key != "problem")]
    lines, width = _align(rows, keys), shutil.get_terminal_size().columns
    if sys.stdout.isatty() and max(map(len, lines)) > width:
        lines = _align(rows, [key for key in keys if key not in BELOW])
        for i, row in enumerate(rows, 1):
            text = "  ".join(f"{key}: {_cell(row, key)}" for key in BELOW if row.get(key))
            lines[i] += "".join(f"\n    {line}" for line in textwrap.wrap(text, width - 4))
    print("\n".join(lines))


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="allconv runs", description="List the runs and their results.")
    parser.add_argument("--sort", choices=COLUMNS.split(), default="number", help="A column.")
    parser.add_argument(
        "--logs", default=rundir.LOGS, help="Folder of the runs, or above it, or a run."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    given = parser.parse_args(args)
    logs = Path(given.logs)
    logs = inner if (inner := logs / rundir.LOGS).is_dir() and not rundir.runs(logs) else logs
    named = sorted(path.parent for path in logs.glob("*/config.yaml"))  # renamed, or reference
    found = [run for run in named if rundir.number(run) < 0] + rundir.runs(logs)
    if not found and (rundir.number(logs) >= 0 or (logs / "config.yaml").is_file()):
        found = [logs]
    if not found:
        deeper = (logs.glob(f"{above}/{rundir.LOGS}/*/config.yaml") for above in ("*", "*/*"))
        inner = next(itertools.chain(*deeper), None)  # of several default_root_dir, or `reproduce`
        hint = f"try --logs {printable(inner.parents[1])}" if inner else "make one: allconv fit"
        raise UserError(f"no runs in {logs.absolute()}; {hint}")
    runs = [describe(run) for run in found]
    groups, rows, key = sum_up(runs), [row for row, _ in runs], given.sort
    # unknown values first, then text, then numbers
    rows.sort(key=lambda row: (row[key] is not None, not isinstance(row[key], str), row[key]))
    if given.json:
        print(json.dumps({"runs": rows, "seeds": groups}, indent=2))
        return
    _print(rows)
    if groups:
        print("\nover seeds, mean ± standard deviation:")
        _print(groups)
    print(f"\ncurves: tensorboard --logdir {shlex.quote(printable(given.logs))}")
