"""What `report` shows: plots as SVG, images and their class evidence as PNG, all as data URIs."""

from __future__ import annotations

import io
from base64 import b64encode

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from allconv.commands.report_statistics import Evaluation, evidence, members
from allconv.plots import BLUE, GREY, VERMILION, confusion, curves, legend, readable, sample, style


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(file.getvalue()).decode()}"


def _axes(title: str) -> Axes:
    figure = Figure(figsize=(5, 6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    style(axes)
    return axes


def share_axes(figures: list[Figure]) -> None:
    """Give the n-th axes of all figures the same limits, so that runs can be compared by eye."""
    for axes in zip(*(figure.axes for figure in figures), strict=True):
        x = [limit for each in axes for limit in each.get_xlim()]
        y = [limit for each in axes for limit in each.get_ylim()]
        for each in axes:
            each.set(xlim=(min(x), max(x)), ylim=(min(y), max(y)))


def by_class(evaluations: list[Evaluation], title: str) -> Figure:
    """Accuracy of each class as a dot, mean of each superclass as a bar, the best one on top.

    At most 30 superclasses (of a folder: classes), the worst.
    """
    axes, data = _axes(title), evaluations[0].checkpoint.dataset
    order = evaluations[0].by_class[members(data)].nanmean(1).nan_to_num().argsort()[:30]
    y, names = torch.arange(len(order)), list(data.superclasses)
    shifts = (0.17, -0.17) if len(evaluations) > 1 else (0,)
    for e, shift, color, mark in zip(evaluations, shifts, (BLUE, VERMILION), "os", strict=False):
        found = 100 * e.by_class[members(data)[order]]
        axes.plot(found, y + shift, mark, ms=4, alpha=0.6, c=color)
        axes.plot(found.nanmean(1), y + shift, "|", ms=11, mew=2.5, c=color, label=e.key)
    axes.set_yticks(y, [readable(names[i]) for i in order], fontsize=9)
    axes.set(xlabel="accuracy (%)", xlim=(-2, 102), ylim=(-0.6, len(order) - 0.4))
    if len(evaluations) > 1:
        legend(axes)
    return axes.figure


def reliability(answers: dict[str, tuple[Tensor, Tensor]], title: str) -> Figure:
    """Accuracy by confidence in 15 bins of equal width.

    Args:
        answers: by name, (N,) confidences and (N,) whether the answers are right.
        title: what was evaluated.
    """
    axes = _axes(title)
    axes.plot([0, 100], [0, 100], "--", color=GREY, label="ideal")
    series = zip(answers.items(), (BLUE, VERMILION), ("o-", "s-"), strict=False)
    for (label, (confidence, right)), color, line in series:
        cells = (confidence * 15).long().clamp(max=14)
        counts = cells.bincount(minlength=15)
        x, y = (100 * cells.bincount(v.double(), 15) / counts for v in (confidence, right))
        enough = counts >= 10  # the accuracy of fewer is noise
        axes.plot(x[enough], y[enough], line, ms=5, color=color, label=label, clip_on=False)
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", ylim=(0, 100), xlim=(0, 100))
    legend(axes)
    return axes.figure


def overlay(image: Image.Image, share: Tensor) -> Image.Image:
    """An image in grey under a map (h, w) of 0, dark purple, to 1, yellow; both enlarged."""
    colours = Image.fromarray(colormaps["viridis"](share.numpy(), bytes=True)[..., :3].copy())
    layers = image.convert("L").convert("RGB"), colours
    return Image.blend(*(x.resize((128, 128), Image.Resampling.BILINEAR) for x in layers), 0.65)


def cards(index: Tensor, *nets: Evaluation, maps: bool = False) -> list[dict[str, object]]:
    """Images with the answers of the nets; with `maps`, where the first net saw its evidence."""
    a, found = nets[0], []
    names = a.checkpoint.dataset.classes
    for i in index.tolist():
        truth, image = a.labels[i].item(), Image.fromarray(a.images[i].permute(1, 2, 0).numpy())
        answers = [(e, e.right[i].item(), names[e.predicted[i]], e.confidence[i]) for e in nets]
        card = {"image": _png(image), "truth": names[truth], "answers": answers, "maps": []}
        if maps:
            shown = list(dict.fromkeys((a.predicted[i].item(), truth)))
            scores = evidence(a.net, a.images[i : i + 1])[0, shown]  # (1 or 2, 8, 8), on one scale
            shares = (scores / scores.max().clamp(min=1e-6)).clamp(min=0)
            card["maps"] = [
                (names[c], _png(overlay(image, share)))
                for c, share in zip(shown, shares, strict=True)
            ]
        found.append(card)
    return found


def surest(e: Evaluation, chosen: Tensor, k: int) -> Tensor:
    """Indices of the k chosen images of which the net is the most confident."""
    order = e.confidence.where(chosen, -1).argsort(descending=True, stable=True)
    return order[: min(k, int(chosen.sum()))]


def pairs(e: Evaluation, k: int = 10) -> list[dict[str, object]]:
    """The k pairs of classes that are confused most often, with the most confident errors."""
    names, found = e.checkpoint.dataset.classes, []
    both = (e.matrix + e.matrix.T).triu(1)
    for cell in both.flatten().argsort(descending=True, stable=True)[:k].tolist():
        a, b = divmod(cell, len(both))
        ways, shown = [], []
        for x, y in ((a, b), (b, a)):
            ways.append((names[x], names[y], e.matrix[x, y].item(), e.matrix[x].sum().item()))
            shown += cards(surest(e, (e.labels == x) & (e.predicted == y), 3), e)
        if shown:
            found.append({"ways": ways, "cards": shown})
    return found


def draw(evaluations: list[Evaluation], metrics: list[list[dict]], title: str) -> dict[str, object]:
    """Plots and images of one net, or of two.

    Args:
        evaluations: of one net or two.
        metrics: the rows of each net's training; [] where there are none.
        title: what was evaluated.
    """
    a, *b = evaluations
    data = a.checkpoint.dataset
    runs = [(e.key if b else data.title, m) for e, m in zip(evaluations, metrics, strict=True) if m]
    training = [curves(rows, name, upright=True) for name, rows in runs]
    share_axes(training)
    lines = {e.key: (e.confidence, e.right) for e in evaluations}
    shown = {
        "curves": [_svg(each) for each in training],
        "by_class": _svg(by_class(evaluations, title)),
    }
    if b:
        only = {"A": a.right & ~b[0].right, "B": b[0].right & ~a.right}
        shown["galleries"] = {
            f"Only {e.key} is right": cards(surest(e, only[e.key], 10), a, *b) for e in evaluations
        }
    else:
        if a.temperature:
            scaled = (a.logits / a.temperature).softmax(1).amax(1)
            lines = {"as is": lines["A"], f"temperature {a.temperature:.2f}": (scaled, a.right)}
        shown["pairs"] = pairs(a)
        shown["confusion"] = _svg(confusion(a.matrix, data.classes, data.superclasses, title))
        shown["galleries"] = {
            "Most confident mistakes": cards(surest(a, ~a.right, 12), a, maps=True),
            "Ten random images": cards(sample(len(a.labels)), a, maps=True),
        }
    return {**shown, "reliability": _svg(reliability(lines, title))}
