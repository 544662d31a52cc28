"""Plots: tensors in, matplotlib Figure out; pure functions.

Blue and vermilion are Okabe and Ito's (https://jfly.uni-koeln.de/color/), safe for color blindness.
"""

import math

import matplotlib
import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

matplotlib.rcParams["text.parse_math"] = False  # a class name may hold a $
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#777777"


def readable(name: str) -> str:
    """A class name with spaces."""
    return name.replace("_", " ")


def sample(n: int) -> Tensor:
    """Ten indices out of n, the same in every epoch and for every network."""
    return torch.from_numpy(np.random.RandomState(43).permutation(n)[:10])


def curves(rows: list[dict[str, float]], title: str, upright: bool = False) -> Figure:
    """Cross-entropy and accuracy over the epochs; `upright` for a narrow page.

    `rows` are a run's metrics, one dict per epoch; see `allconv.rundir.read_metrics`.
    """
    figure = Figure(figsize=(5, 6.5) if upright else (10, 4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(*((2, 1) if upright else (1, 2)))

    last = max((row["epoch"] + 1 for row in rows), default=1)

    def line(axes, name, label, color, scale=1.0):
        points = [(row["epoch"] + 1, row[name] * scale) for row in rows if name in row]
        if points:
            style = "o-" if last <= 30 else "-"  # the dots of more epochs overlap
            axes.plot(*zip(*points, strict=True), style, ms=3, label=label, color=color)

    line(left, "train/loss", "training (as trained)", VERMILION)
    line(left, "val/loss", "validation", BLUE)
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)")
    best = max(rows, key=lambda row: row.get("val/acc", -1), default={})
    note = "top 1"
    if "val/acc" in best:
        note += f" (best {100 * best['val/acc']:.1f} %, epoch {best['epoch'] + 1:.0f})"
    line(right, "val/acc", note, BLUE, 100)
    line(right, "val/top5", "top 5", GREY, 100)
    right.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 100))
    for axes in (left, right):
        style(axes)
        axes.set_xlim(0.5, last + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if axes.lines:
            legend(axes)
    return figure


def bars(values: dict[str, float], expected: dict[str, float]) -> Figure:
    """Accuracies in % by name, each with a tick at the expected one."""
    figure = Figure(figsize=(8, 0.35 * len(values) + 1), layout="constrained")
    axes, names = figure.subplots(), list(values)
    axes.bar_label(axes.barh(names, values.values(), color=BLUE), fmt="%.1f", padding=8)
    axes.plot([expected[name] for name in names], names, "|", color=VERMILION, ms=14, mew=2)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy (%; the ticks are the published values)", xlim=(0, 100))
    style(axes)
    return figure


def growth(
    points: list[tuple[float, float, float]], label: str, levels: dict[str, float]
) -> Figure:
    """Accuracy in % against a quantity on a logarithmic axis.

    `points` are triples of the quantity, the accuracy and its standard deviation; `label` names the
    quantity, and `levels` are accuracies to compare with, by name.
    """
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    x, accuracy, deviation = zip(*sorted(points), strict=True)
    axes.errorbar(x, accuracy, deviation, fmt="o-", color=BLUE, capsize=3)
    for name, level in levels.items():
        axes.axhline(level, color=GREY, ls="--", lw=1)
        axes.annotate(f"{name}: {level} %", (max(x), level), ha="right", va="top", fontsize=8)
    axes.set(xscale="log", xlabel=label, ylabel="test accuracy (%)")
    axes.set_xticks(x, map("{:g}".format, x))
    axes.minorticks_off()
    style(axes)
    return figure


def style(axes) -> None:
    """Set a light grid and no box."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend(axes) -> None:
    """Place the legend above the axes, where it hides no point."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3, frameon=False, fontsize=9)


def predictions(
    images: Tensor, labels: Tensor, logits: Tensor, names: tuple[str, ...], title: str, columns: int
) -> Figure:
    """Images with their true class, predicted class and its probability.

    Images are (N, 3, H, W) uint8, labels (N,) and logits (N, classes); `names` are class names.
    """
    probabilities, predicted = logits.float().softmax(1).max(1)
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.1 * columns, 2.5 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        axes.set(xticks=[], yticks=[])  # unseen ticks would double the time of the layout
        if i >= len(images):
            continue
        color, mark = (BLUE, "✓") if labels[i] == predicted[i] else (VERMILION, "✗")
        axes.imshow(images[i].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axes.set_title(
            f"{mark} {readable(names[predicted[i]])} {100 * probabilities[i]:.0f} %\n"
            f"truth: {readable(names[labels[i]])}",
            fontsize=10,
            color=color,
        )
    return figure


def confusion(
    matrix: Tensor,
    names: tuple[str, ...],
    groups: dict[str, tuple[str, ...]],
    title: str,
    inches: float = 10,
) -> Figure:
    """Confusion matrix with the classes sorted by group.

    `matrix` are counts (classes, classes), true by predicted class, in the order of `names`;
    `groups` maps group names to their class names; `inches` is the width.
    """
    order = [names.index(name) for members in groups.values() for name in members]
    shares = matrix[order][:, order].double()
    shares = 100 * shares / shares.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(inches, 0.9 * inches), layout="constrained")
    axes = figure.subplots()
    # the square root makes the few per cent off the diagonal visible
    norm = PowerNorm(0.5, vmin=0, vmax=100)
    image = axes.imshow(shares.numpy(), cmap="cividis", interpolation="nearest", norm=norm)
    sizes = torch.tensor([len(members) for members in groups.values()])
    ends = sizes.cumsum(0)
    every = math.ceil(len(groups) / (6 * inches))  # more names would overlap
    centres = (ends - sizes / 2 - 0.5).tolist()[::every]
    labels = [readable(name) for name in groups][::every]
    axes.set_xticks(centres, labels, rotation=90, fontsize=8)
    axes.set_yticks(centres, labels, fontsize=8)
    for edge in ends[:-1].tolist() if len(groups) < len(names) else ():
        axes.axhline(edge - 0.5, color="white", lw=0.3)
        axes.axvline(edge - 0.5, color="white", lw=0.3)
    axes.set(xlabel="predicted", ylabel="true")
    figure.suptitle(title, fontsize="medium")
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
    return figure
