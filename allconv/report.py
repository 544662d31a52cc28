"""`python -m allconv report [A] [B]`: one HTML file about a checkpoint, or comparing two.

Everything is counted from the logits of one pass over the pictures; `report.html.j2` is the page.
"""

import io
import math
import platform
import sys
from base64 import b64encode
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Literal

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jsonargparse import dict_to_namespace
from matplotlib.figure import Figure
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error

from allconv import cli, figures, runs
from allconv.data import CIFAR100, normalize
from allconv.model import AllCNN

Z = 1.959964  # standard errors on each side of a 95 % interval


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    centre, half = right + Z**2 / 2, Z * math.sqrt(right * (n - right) / n + Z**2 / 4)
    return (centre - half) / (n + Z**2), (centre + half) / (n + Z**2)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's test, exact: how often a fair coin falls at least as unevenly."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def paired_interval(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """95 % interval of A's share minus B's on the same n pictures (Agresti and Min, 2005)."""
    a, b, n = only_a + 0.5, only_b + 0.5, n + 2
    half = Z * math.sqrt(a + b - (a - b) ** 2 / n)
    return (a - b - half) / n, (a - b + half) / n


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """What the logits are divided by for the lowest cross-entropy (Guo et al., 2017)."""
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(logits.double() / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_t.exp().item()


class Evaluation:
    """A checkpoint, its data, its answers to a split's pictures, and what is counted from them.

    Args:
        key: A or B.
        given: what `--ckpt_path` understands, or a run folder.
        data_dir: folder with the data; None takes the run's own.
        split: test or val.

    Raises:
        CheckpointError: the checkpoint or its run's configuration cannot be used.
    """

    def __init__(self, key: str, given: str, data_dir: str | None, split: str):
        path = Path(given, "checkpoints", "best.ckpt") if Path(given).is_dir() else given
        self.key, self.split = key, split
        self.checkpoint = runs.load(runs.find_checkpoint(str(path), Path(runs.LOGS), key))
        run = self.checkpoint.run
        self.config = runs.read_config(run) if run else self.checkpoint.facts.get("recipe", {})
        self.data = self._data(data_dir)
        self.net = self._net()

    def answer(self) -> None:
        """Read the pictures, let the net answer, and count.

        Raises:
            DataError: the data cannot be read.
        """
        self.data.prepare_data()
        for stage in ("validate", self.split):
            self.data.setup(stage)
        if self.checkpoint.facts:
            self.data.compare(self.checkpoint.facts)
        pictures = self.data.sets[self.split]
        self.images, self.labels, self.n = pictures.images, pictures.labels, len(pictures)
        self.logits = self._logits(self.split)
        self.predicted = self.logits.argmax(1)
        self.right = self.predicted == self.labels
        self.confidence = self.logits.softmax(1).amax(1)
        self.correct = self.right.sum().item()
        self.acc, self.interval = self.correct / self.n, wilson(self.correct, self.n)
        self.top5 = (self.logits.topk(5).indices == self.labels[:, None]).sum().item() / self.n
        classes = len(self.data.class_names)
        cells = self.labels * classes + self.predicted
        self.matrix = cells.bincount(minlength=classes**2).view(classes, classes)  # true, predicted
        self.by_class = self.matrix.diag() / self.matrix.sum(1)
        val = self.logits if self.split == "val" else self._logits("val")
        self.temperature = fit_temperature(val, self.data.sets["val"].labels)
        self.scaled_confidence = (self.logits / self.temperature).softmax(1).amax(1)
        self.loss, self.ece = self._calibration(1.0)
        self.scaled_loss, self.scaled_ece = self._calibration(self.temperature)

    @property
    def name(self) -> str:
        """Where the weights are from, in few words."""
        path, run = self.checkpoint.path, self.checkpoint.run
        if path == runs.PRETRAINED:
            return "pretrained"
        return f"{run.resolve().name}_{path.stem}" if run else path.stem

    @property
    def title(self) -> str:
        """What a figure is of."""
        return f"{self.data.title}, {self.split}: {self.n:,} pictures"

    @property
    def rows(self) -> list[dict[str, float]]:
        """The run's metrics, one row an epoch, if there is a run."""
        return runs.read_metrics(self.checkpoint.run) if self.checkpoint.run else []

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.net.parameters())

    def _data(self, data_dir: str | None) -> CIFAR100:
        run, facts = self.checkpoint.run, self.checkpoint.facts
        keys = ("data_dir", "val_size", "split_seed", "demo")
        try:
            config = self.config
            if run:  # with the folders, which the page does not show
                cli.check_yaml(run / "config.yaml")
                config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
            known = {**facts, **(config.get("data") or {})}
            known |= {"data_dir": data_dir} if data_dir else {}
            return CIFAR100(**{key: known[key] for key in keys if key in known})
        except (TypeError, ValueError) as error:
            raise runs.CheckpointError(f"{run or self.checkpoint.path}: {error}") from None

    def _net(self) -> AllCNN:
        net = runs.net_of(self.checkpoint)
        found, wanted = net.conv9[0].out_channels, len(self.data.class_names)
        if found != wanted:
            raise runs.CheckpointError(
                f"{self.checkpoint.path}: has {found} classes, but {self.data.title} has {wanted}"
            )
        self.device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        return net.to(self.device)

    @torch.no_grad()
    def _logits(self, split: str) -> Tensor:
        images, size = self.data.sets[split].images, self.data.eval_batch_size
        what = f"{self.key}: {len(images):,} {split} pictures"
        quiet = not sys.stdout.isatty()
        if quiet:
            print(what, flush=True)
        batches = track(images.split(size), what, disable=quiet)
        logits = torch.cat([self.net(normalize(b.to(self.device))).cpu() for b in batches])
        if not logits.isfinite().all():
            raise runs.CheckpointError(f"{self.checkpoint.path}: its logits are not all finite")
        return logits

    @torch.no_grad()
    def maps(self, index: list[int]) -> Tensor:
        """The class maps (len(index), classes, 8, 8) of some pictures."""
        return self.net.maps(normalize(self.images[index].to(self.device))).cpu()

    def _calibration(self, temperature: float) -> tuple[float, float]:
        """Cross-entropy, and expected calibration error in 15 bins of equal width."""
        logits = self.logits.double() / temperature
        loss = cross_entropy(logits, self.labels).item()
        ece = multiclass_calibration_error(logits.softmax(1), self.labels, logits.shape[1], 15)
        return loss, ece.item()


def _uri(kind: str, write: Callable[[BinaryIO], None]) -> str:
    """What is written, as an address that holds it."""
    file = io.BytesIO()
    write(file)
    return f"data:image/{kind};base64," + b64encode(file.getvalue()).decode()


def _png(image: Tensor) -> str:
    """A picture (3, H, W) uint8."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return _uri("png", lambda file: Image.fromarray(pixels).save(file, "PNG"))


def _svg(figure: Figure) -> str:
    return _uri("svg+xml", lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))


def _cards(index: Tensor, *nets: Evaluation, maps: bool = False) -> list[dict[str, object]]:
    """Pictures with their true class and what the nets say; with `maps`, where the first looked."""
    a, cards = nets[0], []
    names = [figures.readable(name) for name in a.data.class_names]
    evidence = a.maps(index.tolist()) if maps else None
    for k, i in enumerate(index.tolist()):
        truth = a.labels[i].item()
        shown = dict.fromkeys((a.predicted[i].item(), truth)) if maps else ()
        top = max((evidence[k, c].max().item() for c in shown), default=0)
        cards.append(
            {
                "picture": _png(a.images[i]),
                "truth": names[truth],
                "answers": [
                    (e.key, e.right[i].item(), names[e.predicted[i]], e.confidence[i].item())
                    for e in nets
                ],
                "maps": [
                    (names[c], _png(figures.overlay(a.images[i], evidence[k, c], max(top, 1e-6))))
                    for c in shown
                ],
            }
        )
    return cards


def _surest(e: Evaluation, chosen: Tensor, k: int) -> Tensor:
    """Numbers of the k chosen pictures (N,) of which the net is the most confident."""
    index = chosen.nonzero()[:, 0]
    return index[e.confidence[index].argsort(descending=True, stable=True)][:k]


def _superclasses(e: Evaluation) -> tuple[list[dict[str, object]], float]:
    """A row for each superclass, and the share of all errors that stay inside it."""
    names, rows, inside_all = e.data.class_names, [], 0
    for group, classes in e.data.groups.items():
        members = [names.index(name) for name in classes]
        own = e.matrix[members]
        n, right = own.sum().item(), own[:, members].trace().item()
        inside = own[:, members].sum().item() - right
        inside_all += inside
        rows.append(
            {
                "name": figures.readable(group),
                "n": n,
                "acc": right / n,
                "group": (right + inside) / n,
                "inside": inside / (n - right) if n > right else None,
                "classes": [(figures.readable(names[c]), e.by_class[c].item()) for c in members],
            }
        )
    return rows, inside_all / max(1, e.n - e.correct)


def _pairs(e: Evaluation, k: int = 10) -> list[dict[str, object]]:
    """The k pairs of classes that are most often taken for each other, with examples."""
    both = (e.matrix + e.matrix.T).triu(1)
    pairs = []
    for cell in both.flatten().argsort(descending=True, stable=True)[:k].tolist():
        a, b = divmod(cell, len(both))
        if both[a, b]:
            wrong = {(x, y): (e.labels == x) & (e.predicted == y) for x, y in ((a, b), (b, a))}
            pairs.append(
                {
                    "names": [figures.readable(e.data.class_names[c]) for c in (a, b)],
                    "counts": [chosen.sum().item() for chosen in wrong.values()],
                    "n": [e.matrix[c].sum().item() for c in (a, b)],
                    "cards": [c for w in wrong.values() for c in _cards(_surest(e, w, 3), e)],
                }
            )
    return pairs


def _one(e: Evaluation) -> dict[str, object]:
    """What the page says of one checkpoint."""
    superclasses, inside = _superclasses(e)
    confidences = {
        "as the net gives it": (e.confidence, e.right),
        f"temperature {e.temperature:.2f}": (e.scaled_confidence, e.right),
    }
    names, groups = e.data.class_names, e.data.groups
    return {
        "superclasses": superclasses,
        "inside": inside,
        "group_acc": sum(row["group"] * row["n"] for row in superclasses) / e.n,
        "pairs": _pairs(e),
        "mistakes": _cards(_surest(e, ~e.right, 12), e, maps=True),
        "random": _cards(figures.some(e.n), e, maps=True),
        "by_class": _svg(figures.by_class({e.name: e.by_class}, names, groups, e.title)),
        "reliability": _svg(figures.reliability(confidences, e.title)),
        "confusion": _svg(figures.confusion(e.matrix, names, groups, e.title)),
    }


def _two(a: Evaluation, b: Evaluation) -> dict[str, object]:
    """What the page says of two checkpoints on the same pictures."""
    only_a, only_b = (a.right & ~b.right), (b.right & ~a.right)
    counts = [x.sum().item() for x in (a.right & b.right, only_a, only_b, ~a.right & ~b.right)]
    difference = a.by_class - b.by_class
    order = difference.abs().argsort(descending=True, stable=True)[:12].tolist()
    shares, names = {"A": a.by_class, "B": b.by_class}, a.data.class_names
    sure = {e.key: (e.confidence, e.right) for e in (a, b)}
    flat = [vars(dict_to_namespace(e.config).as_flat()) for e in (a, b)]
    return {
        "counts": counts,
        "difference": (a.correct - b.correct) / a.n,
        "interval": paired_interval(*counts[1:3], a.n),
        "p": mcnemar(*counts[1:3]),
        "classes": [
            (figures.readable(names[c]), *(x[c].item() for x in (a.by_class, b.by_class)))
            for c in order
        ],
        "each": a.n // len(names),
        "only": {
            "A": _cards(_surest(a, only_a, 10), a, b),
            "B": _cards(_surest(b, only_b, 10), a, b),
        },
        "by_class": _svg(figures.by_class(shares, names, a.data.groups, a.title)),
        "reliability": _svg(figures.reliability(sure, a.title)),
        "settings": [
            (key, *(x.get(key, "") for x in flat))
            for key in dict.fromkeys([*flat[0], *flat[1]])
            if flat[0].get(key) != flat[1].get(key)
        ],
    }


def report(
    a: str = "best",
    b: str | None = None,
    data_dir: str | None = None,
    split: Literal["test", "val"] = "test",
    out: str | None = None,
) -> Path:
    """Write a page about a checkpoint, or comparing two on the same pictures.

    Args:
        a: best, last, pretrained, a checkpoint file, or a run folder (its best.ckpt).
        b: another one, to compare it with.
        data_dir: folder with the data set; without it the run's own.
        split: test, or val for the validation pictures.
        out: the HTML file; without it, report.html in the run's folder, or of two checkpoints
            report_against_B.html in A's.

    Returns:
        The file.

    Raises:
        CheckpointError: a checkpoint cannot be used, or the two not compared.
        DataError: the data cannot be read.
    """
    evaluations = [Evaluation(*pair, data_dir, split) for pair in (("A", a), ("B", b)) if pair[1]]
    first, *rest = evaluations
    keys = ("demo",) if split == "test" else ("demo", "val_size", "split_seed")
    for other in rest:
        ours, theirs = ({k: x.data.hparams[k] for k in keys} for x in (first, other))
        if ours != theirs:
            raise runs.CheckpointError(f"A has other pictures than B (data: {ours} and {theirs})")
    for x in evaluations:
        x.answer()
    page = _two(*evaluations) if rest else _one(first)
    place = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    place.filters |= {
        "percent": lambda x, digits=1: f"{100 * x:.{digits}f}\u00a0%",
        "points": lambda x: f"{100 * x:+.2f}",
        "number": "{:,}".format,
        "yaml": lambda x: yaml.safe_dump(x, sort_keys=False),
    }
    text = place.get_template("report.html.j2").render(
        **page,
        evaluations=evaluations,
        e=first,
        curves={
            x.key: _svg(
                figures.curves(x.rows, f"{x.key}: {x.name}" if rest else x.name, upright=True)
            )
            for x in evaluations
            if x.rows
        },
        colours={"right": figures.BLUE, "wrong": figures.VERMILION},
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        versions={
            "allconv": version("allconv"),
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
    )
    name = f"report_against_{rest[0].name}.html" if rest else "report.html"
    path = Path(out or first.checkpoint.folder / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    for x in evaluations:
        low, high = x.interval
        print(
            f"{x.key}: {x.checkpoint.path} on {x.data.title}: {split}/acc {x.acc:.4f} "
            f"({low:.4f} to {high:.4f}), {x.correct:,} of {x.n:,}"
        )
    return path


def main(args: list[str]) -> None:
    """Run the command."""
    parser = cli.Parser(prog="allconv report", description=report.__doc__.splitlines()[0])
    text = "Best, last, pretrained, a checkpoint file, or a run folder (its best.ckpt)."
    parser.add_argument("a", nargs="?", default="best", help=text)
    parser.add_argument("b", nargs="?", type=str | None, help="Another one, to compare a with.")
    parser.add_function_arguments(report, skip={"a", "b"})
    with cli.command(usage=()):
        path = report(**parser.parse_args(args).as_dict())
        print(f"written: {path}; open it with a browser")
