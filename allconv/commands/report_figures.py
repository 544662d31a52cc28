"""What `report` shows: plots as SVG, images and their class evidence as PNG, all as data URIs."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from allconv import cifar100
from allconv.augment import normalize
from allconv.plots import BLUE, GREY, VERMILION, confusion, curves, legend, readable, sample, style

if TYPE_CHECKING:
    from allconv.commands.report import Evaluation
    from allconv.model import AllCNN


@torch.inference_mode()
def evidence(net: AllCNN, images: Tensor) -> Tensor:
    """Class evidence maps (N, classes, 8, 8) of uint8 images; their means are the logits."""
    images = images.to(net.conv1[0].weight.device)
    return net.maps(normalize(images, cifar100.MEAN, cifar100.STD)).cpu()


def _uri(kind: str, write: Callable[[BinaryIO], None]) -> str:
    file = io.BytesIO()
    write(file)
    return f"data:image/{kind};base64," + b64encode(file.getvalue()).decode()


def _png(image: Tensor) -> str:
    pixels = image.permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)
    return _uri("png", lambda file: Image.fromarray(pixels).save(file, "PNG"))


def _svg(figure: Figure) -> str:
    return _uri("svg+xml", lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))


def share_axes(figures: list[Figure]) -> None:
    """Give the n-th axes of all figures the same limits, so that runs can be compared by eye."""
    for axes in zip(*(figure.axes for figure in figures), strict=True):
        x = [limit for each in axes for limit in each.get_xlim()]
        y = [limit for each in axes for limit in each.get_ylim()]
        for each in axes:
            each.set(xlim=(min(x), max(x)), ylim=(min(y), max(y)))


def members(data: ModuleType) -> Tensor:
    """Class numbers (superclasses, classes in each)."""
    return torch.tensor([[data.CLASSES.index(c) for c in g] for g in data.SUPERCLASSES.values()])


def by_class(evaluations: list[Evaluation], title: str) -> Figure:
    """Accuracy of each class as a dot, mean of each superclass as a bar, the best one on top."""
    figure = Figure(figsize=(5, 6.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    data, first = evaluations[0].checkpoint.dataset, evaluations[0].by_class
    order = first[members(data)].nanmean(1).nan_to_num().argsort()
    y, names = torch.arange(len(order)), list(data.SUPERCLASSES)
    shifts = (0.17, -0.17) if len(evaluations) > 1 else (0,)
    for e, shift, color, mark in zip(evaluations, shifts, (BLUE, VERMILION), "os", strict=False):
        found = 100 * e.by_class[members(data)[order]]
        axes.plot(found, y + shift, mark, ms=4, alpha=0.6, c=color)
        axes.plot(found.nanmean(1), y + shift, "|", ms=11, mew=2.5, c=color, label=e.key)
    axes.set_yticks(y, [readable(names[i]) for i in order], fontsize=9)
    axes.set(xlabel="accuracy (%)", xlim=(-2, 102), ylim=(-0.6, len(order) - 0.4))
    style(axes)
    if len(evaluations) > 1:
        legend(axes)
    return figure


def reliability(answers: dict[str, tuple[Tensor, Tensor]], title: str) -> Figure:
    """Accuracy by confidence in 15 bins of equal width, and the number of images in each.

    Args:
        answers: by name, (N,) confidences and (N,) whether the answers are right.
        title: what was evaluated.
    """
    figure = Figure(figsize=(5, 6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 100], [0, 100], "--", color=GREY, label="ideal")
    series = zip(answers.items(), (BLUE, VERMILION), ("o-", "s-"), strict=False)
    for (label, (confidence, right)), color, line in series:
        cells = (confidence * 15).long().clamp(max=14)
        counts = cells.bincount(minlength=15)
        x, y = (100 * cells.bincount(v.double(), 15) / counts for v in (confidence, right))
        enough = counts >= 10  # the accuracy of fewer is noise
        top.plot(x[enough], y[enough], line, ms=5, color=color, label=label, clip_on=False)
        bottom.stairs(counts, torch.linspace(0, 100, 16), color=color, lw=1.8)
    top.set(ylabel="accuracy (%)", ylim=(0, 100), xlim=(0, 100))
    legend(top)
    bottom.set(xlabel="confidence (%)", ylabel="images")
    style(top)
    style(bottom)
    return figure


def overlay(image: Tensor, share: Tensor) -> Tensor:
    """An image (3, H, W) uint8 in grey under a map (h, w) of 0, blue, to 1, yellow; enlarged."""
    size = [4 * n for n in image.shape[1:]]
    grey = interpolate(image.float().mean(0)[None, None], size)[0, 0] / 255
    share = interpolate(share[None, None], size, mode="bilinear")[0, 0]
    colours = torch.from_numpy(colormaps["viridis"](share.numpy())[..., :3]).float()
    mixed = 0.35 * grey[..., None] + 0.65 * colours
    return (255 * mixed).round().to(torch.uint8).permute(2, 0, 1)


def cards(index: Tensor, *nets: Evaluation, maps: bool = False) -> list[dict[str, object]]:
    """Images with the answers of the nets; with `maps`, where the first net saw its evidence."""
    a, found = nets[0], []
    names = a.checkpoint.dataset.CLASSES
    for i in index.tolist():
        truth, image = a.labels[i].item(), a.images[i]
        card = {"image": _png(image), "truth": names[truth], "maps": []}
        card["answers"] = [
            (e.key, e.right[i].item(), names[e.predicted[i]], e.confidence[i].item()) for e in nets
        ]
        if maps:
            shown = list(dict.fromkeys((a.predicted[i].item(), truth)))
            scores = evidence(a.net, image[None])[0, shown]  # (1 or 2, 8, 8), on one scale
            shares = (scores / scores.max().clamp(min=1e-6)).clamp(min=0)
            for c, share in zip(shown, shares, strict=True):
                card["maps"].append((names[c], _png(overlay(image, share))))
        found.append(card)
    return found


def surest(e: Evaluation, chosen: Tensor, k: int) -> Tensor:
    """Indices of the k chosen images of which the net is the most confident."""
    order = e.confidence.where(chosen, -1).argsort(descending=True, stable=True)
    return order[: min(k, int(chosen.sum()))]


def superclasses(e: Evaluation) -> list[dict[str, object]]:
    """Counts of each superclass: images, right answers, answers inside it; the best one first."""
    data, rows = e.checkpoint.dataset, []
    for (name, classes), own in zip(data.SUPERCLASSES.items(), members(data), strict=True):
        block, accuracies = e.matrix[own], e.by_class[own].tolist()
        row = {"name": name, "n": block.sum(), "right": block[:, own].trace()}
        row |= {
            "inside": block[:, own].sum(),
            "classes": list(zip(classes, accuracies, strict=True)),
        }
        rows.append(row)
    return sorted(rows, key=lambda row: -row["right"] / max(1, row["n"]))


def pairs(e: Evaluation, k: int = 10) -> list[dict[str, object]]:
    """The k pairs of classes that are confused most often, with the most confident errors."""
    names, found = e.checkpoint.dataset.CLASSES, []
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
    """All that the page shows of one net, or of two, beside its tables of numbers."""
    a, *b = evaluations
    data = a.checkpoint.dataset
    runs = [
        (e.key if b else data.TITLE, rows)
        for e, rows in zip(evaluations, metrics, strict=True)
        if rows
    ]
    figures = [curves(rows, name, upright=True) for name, rows in runs]
    share_axes(figures)
    shown = {"curves": [_svg(figure) for figure in figures]}
    shown["by_class"] = _svg(by_class(evaluations, title))
    lines = {e.key: (e.confidence, e.right) for e in evaluations}
    if b:
        only = {"A": a.right & ~b[0].right, "B": b[0].right & ~a.right}
        shown["only"] = {e.key: cards(surest(e, only[e.key], 10), a, *b) for e in evaluations}
    else:
        scaled = (a.logits / a.temperature).softmax(1).amax(1)
        lines = {"as is": lines["A"], f"temperature {a.temperature:.2f}": (scaled, a.right)}
        shown |= {
            "superclasses": superclasses(a),
            "pairs": pairs(a),
            "mistakes": cards(surest(a, ~a.right, 12), a, maps=True),
            "random": cards(sample(len(a.labels)), a, maps=True),
            "confusion": _svg(confusion(a.matrix, data.CLASSES, data.SUPERCLASSES, title)),
        }
    return {**shown, "reliability": _svg(reliability(lines, title))}
