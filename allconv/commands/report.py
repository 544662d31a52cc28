"""`python -m allconv report [A] [B]`: one HTML file about a checkpoint, or comparing two.

Everything is counted from the logits of one pass over the images, in `report_statistics.py`;
`report.html.j2` is the page, `report_figures.py` what is drawn on it.
"""

from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from allconv.errors import Parser, UsageError, UserError, printable
from allconv.rundir import flat, read_metrics, write_text

if TYPE_CHECKING:
    from allconv.checkpoints import Checkpoint


def settings(configs: list[dict[str, object]]) -> list[tuple]:
    """A setting and its value for each net: all settings of one net, of two those that differ."""
    found = [flat(config) for config in configs]
    keys = dict.fromkeys(key for each in found for key in each)
    rows = [(key, *(each.get(key, "") for each in found)) for key in keys]
    return [row for row in rows if len(row) == 2 or row[1] != row[2]]


def render(**context: object) -> str:
    """The page, which needs no other file."""
    from jinja2 import Environment, StrictUndefined

    from allconv.commands.report_statistics import percent
    from allconv.plots import readable

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page.filters |= {"percent": percent, "number": "{:,}".format, "readable": readable}
    template = page.from_string(Path(__file__).with_name("report.html.j2").read_text("utf-8"))
    date = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return template.render(**context, torch=version("torch"), date=date)


def check(checkpoints: list["Checkpoint"], out: str | None) -> Path:
    """Refuse what can be refused before the nets run, which takes a minute on a CPU.

    Returns:
        The file to write, in a directory that is there.
    """
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
    if path.is_dir() or (path.exists() and any(path.samefile(c.path) for c in checkpoints)):
        raise UsageError(f"--out is {path}: expected an HTML file")
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
    sets = report_statistics.read_images(checkpoints, split, data_dir)
    runs = zip(given, checkpoints, sets, strict=True)
    evaluations = [report_statistics.evaluate(*each) for each in runs]
    n, title = len(evaluations[0].labels), checkpoints[0].dataset.title
    page = report_figures.draw(evaluations, metrics, f"{title}, {split}: {n:,} images")
    if b is not None:
        page |= report_statistics.compare(*evaluations)
    page |= {
        "results": list(map(report_statistics.results, evaluations)),
        "classes": report_statistics.classes(evaluations),
        "settings": settings(configs),
    }
    write_text(path, render(**page, nets=evaluations, n=n, split=split))
    for e in evaluations:
        print(
            f"{e.key}: {printable(e.checkpoint.path)} on {title}: {split}/acc {e.acc:.4f} "
            f"({e.interval[0]:.4f} to {e.interval[1]:.4f}), {e.right.sum():,} of {n:,}"
        )
    print(f"written: {printable(path)}; open it with a browser")


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="allconv report", description=report.__doc__.splitlines()[0])
    text = "best, last, pretrained, a checkpoint file, or a run directory (its best.ckpt)."
    parser.add_argument("a", nargs="?", default="best", help=text)
    parser.add_argument("b", nargs="?", type=str | None, help="Another one, to compare a with.")
    parser.add_function_arguments(report, skip={"a", "b"})
    report(**parser.parse_args(args).as_dict())
