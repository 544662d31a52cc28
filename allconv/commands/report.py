"""`python -m allconv report [A] [B]`: an HTML page about a checkpoint, or comparing two.

All numbers come from the logits of one pass over the images, in `report_statistics.py`;
`report.html.j2` is the page, and `report_figures.py` draws its figures.
"""

from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from allconv.errors import Parser, UsageError, UserError, printable
from allconv.rundir import flat, read_metrics, write_text

if TYPE_CHECKING:
    from allconv.checkpoints import Checkpoint


def beside(columns: list[dict[str, object]]) -> list[tuple]:
    """Rows of a key and its value in each column, empty where it has none."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, *(column.get(key, "") for column in columns)) for key in keys]


def render(**context: object) -> str:
    """Render the page, which needs no other file."""
    from jinja2 import Environment, StrictUndefined

    from allconv.commands.report_statistics import percent
    from allconv.plots import readable

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page.filters |= {"percent": percent, "number": "{:,}".format, "readable": readable}
    template = page.from_string(Path(__file__).with_name("report.html.j2").read_text("utf-8"))
    date = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return template.render(**context, torch=version("torch"), date=date)


def check(checkpoints: list["Checkpoint"], out: str | None) -> Path:
    """Return the file to write; refuse before the networks run, which takes a minute."""
    first, last = checkpoints[0], checkpoints[-1]
    data = first.dataset
    if data.classes != last.dataset.classes:
        raise UserError(f"A and B know different classes: {data.title} and {last.dataset.title}")
    for c in checkpoints:
        found, expected = c.hparams["num_classes"], len(data.classes)
        if found != expected:
            raise UserError(f"{c.path}: has {found} classes, but {data.title} has {expected}")
    run = f"{last.run.resolve().name}_" if last.run else ""
    name = f"report_against_{run}{last.path.stem}.html" if checkpoints[1:] else "report.html"
    path = Path(out) if out else first.folder / name
    if path.is_dir() or path.suffix.lower() != ".html":
        raise UsageError(f"--out is {path}: its ending must be .html")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def report(
    a: str = "best",
    b: str | None = None,
    data_dir: str | None = None,
    split: Literal["test", "val"] = "test",
    out: str | None = None,
) -> None:
    """Write a page about a checkpoint, or comparing two on the same images.

    Args:
        a: best, last, pretrained, a checkpoint file, or a run directory (its best.ckpt).
        b: another one, to compare it with.
        data_dir: folder with the data set; by default the run's own.
        split: test, or val for the validation images.
        out: the HTML file; by default report.html in the run directory, or, of two checkpoints,
            report_against_B.html in A's.
    """
    from allconv.checkpoints import find, load
    from allconv.commands import report_figures, report_statistics

    given = {"A": a} if b is None else {"A": a, "B": b}
    checkpoints = [load(find(name, key=key)) for key, name in given.items()]
    path = check(checkpoints, out)
    configs = [c.config or {"model": c.hparams} for c in checkpoints]
    metrics = [read_metrics(c.run) if c.run else [] for c in checkpoints]
    sets = report_statistics.read_sets(checkpoints, split, data_dir)
    each = zip(given, checkpoints, sets, strict=True)
    nets = [report_statistics.evaluate(*arguments) for arguments in each]
    data, n = checkpoints[0].dataset, len(nets[0].labels)
    settings = beside([flat(config) for config in configs])
    page = report_figures.draw(nets, metrics, f"{data.title}, {split}: {n:,} images") | {
        "results": beside([report_statistics.results(e) for e in nets]),
        "groups": report_statistics.by_class(nets, data.superclasses),
        "classes": report_statistics.by_class(nets, {name: (name,) for name in data.classes}),
        "settings": [row for row in settings if b is None or row[1] != row[2]],
    }
    if b is not None:
        page |= report_statistics.compare(*nets)
    write_text(path, render(**page, nets=nets, n=n, split=split))
    for e in nets:
        print(f"{e.key}: " if b else "", end="")
        print(
            f"{printable(e.checkpoint.path)} on {data.title}: {split}/acc {e.acc:.4f} "
            f"({e.interval[0]:.4f} to {e.interval[1]:.4f}), {e.right.sum():,} of {n:,}"
        )
    print(f"written: {printable(path)}; open it with a browser")


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="allconv report")
    text = "best, last, pretrained, a checkpoint file, or a run directory (its best.ckpt)."
    parser.add_argument("a", nargs="?", default="best", help=text)
    parser.add_argument("b", nargs="?", type=str | None, help="Another one, to compare a with.")
    parser.add_function_arguments(report, skip={"a", "b"})
    report(**parser.parse_args(args).as_dict())
