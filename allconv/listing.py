"""`python -m allconv runs`: what was trained with what result, and how far seeds differ."""

import json
import sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table
from rich.text import Text

from allconv import cli, runs

Row = dict[str, object]

COLUMNS = (
    *("number", "recipe", "data", "width", "epochs", "val/acc", "best_epoch", "test/acc", "seed"),
    "when",
)


def describe(run: Path) -> Row:
    """What a run folder tells; None is what it does not, being new, old or damaged.

    The test accuracy is known if the last test was of the best checkpoint.
    """
    config = runs.read_config(run)
    model, data, trainer = (
        group if isinstance(group := config.get(name), dict) else {}
        for name in ("model", "data", "trainer")
    )
    try:
        rows, best = runs.read_metrics(run), runs.best_row(run) or {}
    except runs.CheckpointError:
        rows, best = [], {}
    epochs = [int(row["epoch"]) + 1 for row in rows if "epoch" in row]
    epoch = int(best["epoch"]) + 1 if "epoch" in best else None
    # TensorBoard puts the second it began into the name, which a copy keeps
    starts = [path.name.split(".")[3] for path in run.glob("events.out.tfevents.*")]
    start = min((int(second) for second in starts if second.isdigit()), default=None)
    return {
        "number": runs.number(run),
        "recipe": config.get("recipe"),
        "data": ("drawn" if data.get("demo") else "CIFAR-100") if data else None,
        "width": model.get("width"),
        "epochs": max(epochs, default=None),
        "max_epochs": trainer.get("max_epochs"),
        "val/acc": best.get("val/acc"),
        "best_epoch": epoch,
        "test/acc": runs.evaluation(run, "test", "best.ckpt", epoch).get("test/acc"),
        "seed": config.get("seed_everything"),
        "when": start and datetime.fromtimestamp(start).astimezone().isoformat(),
    }


def sum_up(rows: list[Row], logs: Path) -> list[Row]:
    """Mean and sample standard deviation over runs that differ in their seed alone.

    They have the same configuration and the same number of epochs done; of several runs with one
    seed the newest counts.
    """
    groups: dict[str, dict[object, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row["number"]):
        config = runs.read_config(logs / f"version_{row['number']}")
        config = {k: v for k, v in config.items() if k not in ("seed_everything", "recipe")}
        if row["val/acc"] is not None and row["seed"] is not None:
            key = json.dumps([config, row["epochs"]], sort_keys=True, default=str)
            groups[key][row["seed"]] = row
    found = []
    for group in (list(seeds.values()) for seeds in groups.values() if len(seeds) > 1):
        same = {key: group[-1][key] for key in ("recipe", "data", "width", "epochs", "max_epochs")}
        values = {key: [row[key] for row in group] for key in ("number", "seed")}
        found.append({**same, **values, **{k: _spread(group, k) for k in ("val/acc", "test/acc")}})
    return found


def _spread(group: list[Row], key: str) -> dict[str, float | None]:
    values = [row[key] for row in group if row[key] is not None]
    return {
        "mean": mean(values) if values else None,
        "sd": stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def _rank(value: object) -> tuple[bool, float, str]:
    """Sorts what is unknown first, then text, then numbers."""
    known = isinstance(value, int | float)
    return known, value if known else 0, "" if value is None else str(value)


def _cell(row: Row, key: str) -> str:
    value = row[key]
    if value is None:
        return "-"
    match key:
        case "epochs":
            return f"{value}/{row['max_epochs']}"
        case "when":
            return value[:16].replace("T", " ")
        case "number" | "seed" if isinstance(value, list):
            return " ".join(map(str, value))
        case "val/acc" | "test/acc" if isinstance(value, dict):
            spread = f" ± {value['sd']:.4f}" if value["sd"] is not None else ""
            return f"{value['mean']:.4f}{spread} (n = {value['n']})" if value["n"] else "-"
        case "val/acc" | "test/acc":
            return f"{value:.4f}"
    return str(value)


def _print(rows: list[Row]) -> None:
    columns = [key for key in COLUMNS if key in rows[0]]
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(_cell(row, key)) for key in columns))
    # a pipe has no width: nothing is cut or folded
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def main(args: list[str]) -> None:
    """Run the command: prints a table, or with `--json` the same for programs."""
    parser = cli.Parser(prog="allconv runs", description="List the runs and their figures.")
    parser.add_argument(
        "--sort", choices=COLUMNS, default="number", help="Column, ascending, unknown first."
    )
    parser.add_argument("--logs", default=runs.LOGS, help="Folder of the runs.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    given = parser.parse_args(args)
    with cli.command(usage=()):
        logs = Path(given.logs)
        folders = [run for run in logs.iterdir() if runs.number(run) >= 0] if logs.is_dir() else []
        if not folders:
            cli.fail(1, f"no runs in {logs.absolute()}; make one: python -m allconv fit")
        rows = sorted(map(describe, folders), key=lambda row: row["number"])
        rows.sort(key=lambda row: _rank(row[given.sort]))
        groups = sum_up(rows, logs)
        if given.json:
            print(json.dumps({"runs": rows, "seeds": groups}, indent=2))
            return
        _print(rows)
        if groups:
            print("\nover seeds, mean ± standard deviation:")
            _print(groups)
        print(f"\ncurves: tensorboard --logdir {logs}")
