"""Figures of `report`: plots as SVG, images and evidence maps as PNG, all as data URIs."""

import io
from base64 import b64encode
from collections.abc import Callable

from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from allconv.calibration import evidence
from allconv.commands.report_statistics import Evaluation
from allconv.plots import BLUE, GREY, VERMILION, curves, legend, sample, style


def _uri(kind: str, save: Callable) -> str:
    file = io.BytesIO()
    save(file)
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"


def _png(image: Tensor) -> str:
    """An image (H, W, 3) of RGB bytes, or a map (H, W) from 0 (dark purple) to 1 (yellow)."""
    options = {"format": "png", "cmap": "viridis", "vmin": 0, "vmax": 1}
    return _uri("png", lambda file: imsave(file, image.numpy(), **options))


def _svg(figure: Figure) -> str:
    options = {"format": "svg", "metadata": {"Date": None}}
    return _uri("svg+xml", lambda file: figure.savefig(file, **options))


def reliability(answers: dict[str, tuple[Tensor, Tensor]], title: str) -> Figure:
    """Accuracy by confidence in 15 bins of equal width.

    Args:
        answers: by name, confidences (N,) and whether the predictions are right (N,).
        title: what was evaluated.
    """
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], "--", color=GREY, label="ideal")
    series = zip(answers.items(), (BLUE, VERMILION), ("o-", "s-"), strict=False)
    for (label, (confidence, right)), color, line in series:
        cells = (confidence * 15).long().clamp(max=14)
        counts = cells.bincount(minlength=15)
        x, y = (100 * cells.bincount(v.double(), 15) / counts for v in (confidence, right))
        enough = counts >= 10  # fewer are noise
        axes.plot(x[enough], y[enough], line, ms=5, color=color, label=label, clip_on=False)
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", ylim=(0, 100), xlim=(0, 100))
    style(axes)
    legend(axes)
    return figure


def cards(index: Tensor, *nets: Evaluation, maps: bool = False) -> list[dict]:
    """Images with the networks' predictions, and with `maps` the evidence maps of the first."""
    a, found = nets[0], []
    names = a.checkpoint.dataset.classes
    for i in index.tolist():
        truth = a.labels[i].item()
        answers = [(e, e.right[i].item(), names[e.predicted[i]], e.confidence[i]) for e in nets]
        card = {"image": _png(a.images[i].permute(1, 2, 0)), "truth": names[truth], "maps": []}
        if maps:
            shown = list(dict.fromkeys((a.predicted[i].item(), truth)))
            scores = evidence(a.net, a.images[i : i + 1])[0, shown]  # (1 or 2, 8, 8), on one scale
            shares = scores / scores.max().clamp(min=1e-6)
            card["maps"] = [(names[c], _png(s)) for c, s in zip(shown, shares, strict=True)]
        found.append(card | {"answers": answers})
    return found


def surest(e: Evaluation, chosen: Tensor, k: int) -> Tensor:
    """Indices of the k chosen images with the highest confidence."""
    order = e.confidence.where(chosen, -1).argsort(descending=True, stable=True)
    return order[: min(k, int(chosen.sum()))]


def pairs(e: Evaluation, k: int = 10) -> list[dict[str, object]]:
    """At most k pairs of classes, the most confused first, with the most confident errors."""
    names, found = e.checkpoint.dataset.classes, []
    both = (e.matrix + e.matrix.T).triu(1)
    for cell in both.flatten().argsort(descending=True, stable=True)[:k].tolist():
        a, b = divmod(cell, len(both))
        if not both[a, b]:
            break
        ways, shown = [], []
        for x, y in ((a, b), (b, a)):
            ways.append((names[x], names[y], e.matrix[x, y].item(), e.matrix[x].sum().item()))
            shown += cards(surest(e, (e.labels == x) & (e.predicted == y), 3), e)
        found.append({"ways": ways, "cards": shown})
    return found


def share_axes(figures: list[Figure]) -> None:
    """Give the n-th axes of all figures the same limits, to compare runs by eye."""
    for axes in zip(*(figure.axes for figure in figures), strict=True):
        x = [limit for each in axes for limit in each.get_xlim()]
        y = [limit for each in axes for limit in each.get_ylim()]
        for each in axes:
            each.set(xlim=(min(x), max(x)), ylim=(min(y), max(y)))


def draw(nets: list[Evaluation], metrics: list[list[dict]], title: str) -> dict[str, object]:
    """Plots and images of one or two networks.

    Args:
        nets: one or two.
        metrics: the metrics of each run by epoch; [] if unknown.
        title: what was evaluated.
    """
    a, *others = nets
    names = [e.key if others else a.checkpoint.dataset.title for e in nets]
    runs = zip(metrics, names, strict=True)
    training = [curves(rows, name, upright=True) for rows, name in runs if rows]
    share_axes(training)
    shown, lines = {"pairs": []}, {e.key: (e.confidence, e.right) for e in nets}
    if others:
        only = {"A": a.right & ~others[0].right, "B": others[0].right & ~a.right}
        shown["galleries"] = {
            f"Only {e.key} is right": cards(surest(e, only[e.key], 10), *nets) for e in nets
        }
    else:
        if a.temperature:
            scaled = (a.logits / a.temperature).softmax(1).amax(1)
            lines = {"as is": lines["A"], f"temperature {a.temperature:.2f}": (scaled, a.right)}
        shown["pairs"] = pairs(a)
        shown["galleries"] = {
            "Most confident mistakes": cards(surest(a, ~a.right, 12), a, maps=True),
            "Ten random images": cards(sample(len(a.labels)), a, maps=True),
        }
    plots = {"curves": list(map(_svg, training)), "reliability": _svg(reliability(lines, title))}
    return shown | plots
