"""`python -m allconv report [A] [B]`: one HTML file about a checkpoint, or comparing two.

Everything is counted from the logits of one pass over the images. `report.html.j2` is the page,
`report_figures.py` what is drawn on it.
"""

import math
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from rich.console import Console
from rich.progress import track

from allconv.commands.report_statistics import (
    calibration,
    fit_temperature,
    mcnemar,
    paired_interval,
    wilson,
)
from allconv.errors import Parser, UsageError, UserError, printable
from allconv.rundir import read_metrics, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from allconv.checkpoints import Checkpoint
    from allconv.model import AllCNN

BATCH = 500  # images; least CPU time of 50 to 500


@dataclass
class Evaluation:
    """What a checkpoint's net answers to the N images of a split."""

    key: str  # A or B
    checkpoint: "Checkpoint"
    net: "AllCNN"
    images: "Tensor"  # (N, 3, 32, 32) uint8
    labels: "Tensor"  # (N,)
    logits: "Tensor"  # (N, classes)
    temperature: float  # fitted to the validation images

    def __post_init__(self):
        self.confidence, self.predicted = self.logits.softmax(1).max(1)  # (N,)
        self.right = self.predicted == self.labels  # (N,)
        n = self.logits.shape[1]
        cells = self.labels * n + self.predicted
        self.matrix = cells.bincount(minlength=n * n).view(n, n)  # true class, predicted class
        self.by_class = self.matrix.diag() / self.matrix.sum(1)  # NaN of a class without images


def read_images(checkpoints: list["Checkpoint"], split: str, data_dir: str | None) -> list[dict]:
    """For each checkpoint, (images, labels) of its validation split and of `split`, by split.

    Raises:
        UserError: those of `split` are not the same for both.
    """
    import torch

    from allconv import cifar100

    known = [c.data["data_dir"] for c in checkpoints if "data_dir" in c.data]
    data_dir = data_dir or [*known, "data"][0]
    cifar100.prepare(data_dir, checkpoints[0].data.get("demo", False))
    load = cache(partial(cifar100.load, data_dir=data_dir))  # what both need is read once
    sets = [{} for _ in checkpoints]
    for part in dict.fromkeys(("val", split)):
        keys = {"demo"} if part == "test" else {"demo", "val_size", "split_seed"}
        for found, c in zip(sets, checkpoints, strict=True):
            found[part] = load(part, **{k: v for k, v in c.data.items() if k in keys})
    if not torch.equal(sets[0][split][0], sets[-1][split][0]):
        raise UserError("A and B hold out different validation images (val_size, split_seed)")
    return sets


def evaluate(key: str, checkpoint: "Checkpoint", sets: dict) -> "Evaluation":
    """Run the net once over each set of images; the last is the one that is reported."""
    import torch

    from allconv import runtime
    from allconv.commands.report_figures import evidence

    runtime.keep_memory()
    net = checkpoint.net().to("cuda" if torch.cuda.is_available() else "cpu")
    for split, (images, labels) in sets.items():
        title = f"{key}: {len(images):,} {split} images"
        batches = track(images.split(BATCH), title, console=Console(stderr=True))
        logits = torch.cat([evidence(net, batch).mean((2, 3)) for batch in batches])
        if not logits.isfinite().all():
            raise UserError(f"{checkpoint.path}: its logits are not all finite")
        if split == "val":
            temperature = fit_temperature(logits, labels)
    return Evaluation(key, checkpoint, net, images, labels, logits, temperature)


def numbers(e: "Evaluation") -> dict[str, object]:
    """What the page's tables say of one net."""
    n, right = len(e.labels), e.right.sum().item()
    return {
        "e": e,
        "right": right,
        "acc": right / n,
        "interval": wilson(right, n),
        "top5": (e.logits.topk(5).indices == e.labels[:, None]).sum().item() / n,
        "uncalibrated": calibration(e.logits, e.labels),
        "calibrated": calibration(e.logits / e.temperature, e.labels),
        "parameters": sum(p.numel() for p in e.net.parameters()),
    }


def comparison(a: "Evaluation", b: "Evaluation", set_a: dict, set_b: dict) -> dict[str, object]:
    """What the page's tables say of two nets on the same images."""
    counts = Counter(zip(a.right.tolist(), b.right.tolist(), strict=True))
    only_a, only_b, n = counts[True, False], counts[False, True], len(a.labels)
    columns = a.checkpoint.dataset.CLASSES, a.by_class.tolist(), b.by_class.tolist()
    classes = [row for row in zip(*columns, strict=True) if not math.isnan(row[1])]
    settings = [(key, set_a.get(key, ""), set_b.get(key, "")) for key in {**set_a, **set_b}]
    return {
        "counts": [counts[True, True], only_a, only_b, counts[False, False]],
        "difference": (only_a - only_b) / n,
        "interval": paired_interval(only_a, only_b, n),
        "p": mcnemar(only_a, only_b),
        "classes": sorted(classes, key=lambda row: -abs(row[1] - row[2]))[:12],
        "settings": [row for row in settings if row[1] != row[2]],
    }


def flat(value: object, key: str = "") -> dict[str, object]:
    """A configuration with one dotted key a setting."""
    if not isinstance(value, dict):
        return {key[1:]: value}
    return {k: v for name in value for k, v in flat(value[name], f"{key}.{name}").items()}


def render(**context: object) -> str:
    """The page, which needs no other file."""
    from jinja2 import Environment, StrictUndefined

    from allconv.plots import readable

    page = Environment(autoescape=True, undefined=StrictUndefined)
    page.filters |= {
        "percent": lambda x, digits=1: "n/a" if x != x else f"{100 * x:.{digits}f}\u00a0%",
        "range": lambda x: f"{100 * x[0]:.2f} to {100 * x[1]:.2f}\u00a0%",
        "fixed": "{:.4f}".format,
        "number": "{:,}".format,
        "readable": readable,
        "yaml": partial(yaml.safe_dump, sort_keys=False),
    }
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
    if data is not last.dataset:
        raise UserError(f"A and B know different classes: {data.TITLE} and {last.dataset.TITLE}")
    for c in checkpoints:
        found, expected = c.hparams["num_classes"], len(data.CLASSES)
        if found != expected:
            raise UserError(f"{c.path}: has {found} classes, but {data.TITLE} has {expected}")
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
    from allconv.commands.report_figures import draw

    given = {"A": a} if b is None else {"A": a, "B": b}
    checkpoints = [load(find(name, key=key)) for key, name in given.items()]
    path = check(checkpoints, out)
    configs = [c.config for c in checkpoints]
    metrics = [read_metrics(c.run) if c.run else [] for c in checkpoints]
    sets = read_images(checkpoints, split, data_dir)
    evaluations = [evaluate(*each) for each in zip(given, checkpoints, sets, strict=True)]
    n, title = len(evaluations[0].labels), checkpoints[0].dataset.TITLE
    page = draw(evaluations, metrics, f"{title}, {split}: {n:,} images")
    if b is not None:
        page |= comparison(*evaluations, *map(flat, configs))
    nets = [numbers(e) for e in evaluations]
    page |= {"nets": nets, "n": n, "split": split, "config": configs[0]}
    write_text(path, render(**page))
    for key, x in zip(given, nets, strict=True):
        low, high = x["interval"]
        print(
            f"{key}: {printable(x['e'].checkpoint.path)} on {title}: {split}/acc {x['acc']:.4f} "
            f"({low:.4f} to {high:.4f}), {x['right']:,} of {n:,}"
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
