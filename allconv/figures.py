"""Figures: tensors in, matplotlib Figure out. Nothing is read, written or shown here.

Blue and vermilion are Okabe and Ito's (https://jfly.uni-koeln.de/color/): told apart by everyone.
"""

import math

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn.functional import interpolate

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#777777"


def readable(name: str) -> str:
    """A class name as a person writes it."""
    return name.replace("_", " ")


def some(n: int) -> Tensor:
    """Numbers of ten of n pictures: the same in every epoch and of every net, to compare them."""
    return torch.from_numpy(np.random.RandomState(43).permutation(n)[:10])


def curves(rows: list[dict[str, float]], title: str, upright: bool = False) -> Figure:
    """Cross-entropy and accuracy over the epochs.

    Args:
        rows: a run's metrics, one dict an epoch, with the project's metric names.
        title: what the run was.
        upright: one above the other, for a narrow page.
    """
    figure = Figure(figsize=(5, 6.5) if upright else (10, 4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(*((2, 1) if upright else (1, 2)))

    last = max((row["epoch"] + 1 for row in rows), default=1)

    def line(axes, name, label, color, scale=1.0):
        points = [(row["epoch"] + 1, row[name] * scale) for row in rows if name in row]
        if points:
            style = "o-" if last <= 30 else "-"  # dots of more epochs run into each other
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
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0.5, last + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if axes.lines:
            _legend(axes)
    return figure


def _legend(axes) -> None:
    """Above the axes, where it hides no point."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3, frameon=False, fontsize=9)


def predictions(
    images: Tensor, labels: Tensor, logits: Tensor, names: tuple[str, ...], title: str
) -> Figure:
    """Pictures with their true class, predicted class and its probability.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,) true classes.
        logits: (N, classes).
        names: class names.
        title: where the pictures are from.
    """
    probabilities, predicted = logits.float().softmax(1).max(1)
    columns = 5
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.1 * columns, 2.5 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if i >= len(images):
            continue
        right = labels[i] == predicted[i]
        color, mark = (BLUE, "✓") if right else (VERMILION, "✗")
        axes.imshow(images[i].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axes.set_title(
            f"{mark} {readable(names[predicted[i]])} {100 * probabilities[i]:.0f} %\n"
            f"truth: {readable(names[labels[i]])}",
            fontsize=10,
            color=color,
        )
    return figure


def confusion(matrix: Tensor, names: tuple[str, ...], groups: dict[str, tuple[str, ...]], title):
    """Confusion matrix, the classes of a group side by side.

    Args:
        matrix: (classes, classes) counts, true class by predicted class.
        names: class names in the order of the matrix.
        groups: group names with the class names in them.
        title: what was evaluated.
    """
    order = [names.index(name) for members in groups.values() for name in members]
    shares = matrix[order][:, order].double()
    shares = 100 * shares / shares.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplots()
    # the square root shows the few per cent off the diagonal, which are what one looks for
    norm = PowerNorm(0.5, vmin=0, vmax=100)
    picture = axes.imshow(shares.numpy(), cmap="cividis", interpolation="nearest", norm=norm)
    sizes = torch.tensor([len(members) for members in groups.values()])
    ends = sizes.cumsum(0)
    centres = (ends - sizes / 2 - 0.5).tolist()
    labels = [readable(name) for name in groups]
    axes.set_xticks(centres, labels, rotation=90, fontsize=8)
    axes.set_yticks(centres, labels, fontsize=8)
    for edge in ends[:-1].tolist():
        axes.axhline(edge - 0.5, color="white", lw=0.3)
        axes.axvline(edge - 0.5, color="white", lw=0.3)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.colorbar(picture, label="share of the true class (%)", shrink=0.8)
    return figure


def ladder(accuracies: dict[str, float], title: str) -> Figure:
    """Bars of accuracies, top to bottom.

    Args:
        accuracies: fractions by what was done; names that begin with "+" stand apart.
        title: what they have in common.
    """
    figure = Figure(figsize=(10, 0.34 * len(accuracies) + 1), layout="constrained")
    axes = figure.subplots()
    colors = [GREY if name.startswith("+") else BLUE for name in accuracies]
    values = [100 * value for value in accuracies.values()]
    bars = axes.barh(list(accuracies), values, color=colors)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="validation accuracy (%)", title=title)
    return figure


def race(lines: dict[str, list[tuple[float, float]]], title: str) -> Figure:
    """Validation accuracy against training time.

    Args:
        lines: by name, a point an epoch: seconds since the start, accuracy as a fraction.
        title: what was trained, and on what.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, points), color in zip(lines.items(), (VERMILION, BLUE), strict=False):
        seconds, accuracies = zip(*points, strict=True)
        axes.plot(seconds, [100 * a for a in accuracies], "o-", ms=4, color=color, label=name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="training time (s)", ylabel="validation accuracy (%)", title=title)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend()
    return figure


def classified(
    images: list[Tensor],
    inputs: Tensor,
    maps: Tensor,
    top: list[list[tuple[str, float]]],
    titles: list[str],
    title: str,
    low: float,
) -> Figure:
    """Own pictures: each with what the net saw of it, where it saw its top class, and its answer.

    Args:
        images: N pictures (3, H, W) uint8 of any size; the centre square is marked.
        inputs: (N, 3, 32, 32) uint8, what the net was given.
        maps: (N, h, w), the top class's map, whose mean is the class's logit.
        top: of each picture its classes and their probabilities, highest first.
        titles: the pictures' names.
        title: what has classified them.
        low: the probability below which a top class is marked as uncertain.
    """
    columns = 1 if len(images) < 3 else 2
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(9.5 * columns, 2.5 * rows + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=11)
    cells = figure.subfigures(rows, columns, squeeze=False, hspace=0.04, wspace=0.03).flat
    for i, cell in enumerate(cells):
        if i >= len(images):
            break
        names, shares = zip(*top[i], strict=True)
        uncertain = shares[0] < low
        note = f": uncertain, below {100 * low:.0f} %" if uncertain else ""
        # a dollar sign in a file name is not the beginning of a formula
        cell.suptitle(titles[i] + note, fontsize=10, parse_math=False, weight="bold")
        left, seen, where, bars = cell.subplots(1, 4, width_ratios=(1, 1, 1.25, 1.5))
        for axes in (left, seen, where):
            axes.set_xticks([])
            axes.set_yticks([])
        height, width = images[i].shape[1:]
        side = min(height, width)
        corner = (width - side) / 2 - 0.5, (height - side) / 2 - 0.5
        left.imshow(images[i].permute(1, 2, 0).numpy())
        left.set_title("picture (frame: used)", fontsize=9)
        frame = {"fill": False, "lw": 2, "clip_on": False}
        left.add_patch(Rectangle(corner, side, side, edgecolor=VERMILION, **frame))
        seen.imshow(inputs[i].permute(1, 2, 0).numpy(), interpolation="nearest")
        seen.set_title("what the net saw: 32 x 32", fontsize=9)
        # beneath it the picture in lighter greys, so that light and dark are more the map's
        grey = {"cmap": "gray", "vmin": -100, "vmax": 255, "interpolation": "nearest"}
        where.imshow(inputs[i].float().mean(0).numpy(), **grey)
        colors = {"cmap": "viridis", "alpha": 0.55, "interpolation": "bilinear"}
        shown = where.imshow(maps[i].numpy(), extent=(-0.5, 31.5, 31.5, -0.5), **colors)
        where.set_title(f"where it saw: {readable(names[0])}", fontsize=9)
        where.set_xlabel(f"mean {maps[i].mean():.1f} = its logit", fontsize=9)
        cell.colorbar(shown, ax=where, shrink=0.9).ax.tick_params(labelsize=8)
        color = [VERMILION if uncertain else BLUE, *[GREY] * (len(names) - 1)]
        drawn = bars.barh([readable(name) for name in names], shares, color=color)
        bars.bar_label(drawn, [f"{100 * share:.1f} %" for share in shares], padding=3, fontsize=9)
        bars.invert_yaxis()
        bars.set(xlim=(0, 1.3), xticks=[])
        bars.set_title("probability", fontsize=9)
        bars.tick_params("y", labelsize=9, length=0)
        bars.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def by_class(shares: dict[str, Tensor], names: tuple[str, ...], groups, title: str) -> Figure:
    """Accuracy of each class as a dot, and of each group as a bar; the best group is on top.

    Args:
        shares: (classes,) fractions right of one net, or of two under their names.
        names: class names in that order.
        groups: group names with the class names in them.
        title: what was evaluated.
    """
    members = {group: [names.index(name) for name in groups[group]] for group in groups}
    first = next(iter(shares.values()))
    order = sorted(members, key=lambda group: first[members[group]].mean())
    figure = Figure(figsize=(5, 6.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    for (label, of_net), color, mark in zip(shares.items(), (BLUE, VERMILION), "os", strict=False):
        shift = 0.17 * (mark == "o") - 0.17 * (mark == "s") if len(shares) > 1 else 0
        for y, group in enumerate(order):
            found = 100 * of_net[members[group]]
            label = label if y == 0 else None
            axes.plot(found, [y + shift] * len(found), mark, ms=4, alpha=0.6, c=color, label=label)
            axes.plot(found.mean(), y + shift, "|", ms=11, mew=2.5, c=color)
    axes.set_yticks(range(len(order)), [readable(group) for group in order], fontsize=9)
    axes.set(xlabel="right (%)", xlim=(-2, 102), ylim=(-0.6, len(order) - 0.4))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(shares) > 1:
        _legend(axes)
    return figure


def reliability(answers: dict[str, tuple[Tensor, Tensor]], title: str) -> Figure:
    """How often answers of a confidence are right, in 15 bins of equal width, and how many are.

    Args:
        answers: (N,) probabilities of the answers, and (N,) whether they are right; of one series
            or of two, under their names.
        title: what was evaluated.
    """
    bins = 15
    figure = Figure(figsize=(5, 6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 100], [0, 100], "--", color=GREY, label="ideal")
    series = zip(answers.items(), (BLUE, VERMILION), ("o-", "s-"), strict=False)
    for (label, (confidence, right)), color, style in series:
        cells = (confidence * bins).long().clamp(max=bins - 1)
        counts = cells.bincount(minlength=bins)
        sure, correct = (
            100 * cells.bincount(values.double(), bins) / counts for values in (confidence, right)
        )
        enough = counts >= 10  # of fewer, the share is chance
        line = {"ms": 5, "color": color, "label": label, "clip_on": False}
        top.plot(sure[enough], correct[enough], style, **line)
        bottom.stairs(counts, torch.linspace(0, 100, bins + 1), color=color, lw=1.8)
    top.set(ylabel="right (%)", ylim=(0, 100), xlim=(0, 100))
    _legend(top)
    bottom.set(xlabel="confidence (%)", ylabel="pictures")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def overlay(image: Tensor, evidence: Tensor, top: float) -> Tensor:
    """A picture in grey under the map of a class: dark blue is none, yellow the most.

    Args:
        image: (3, H, W) uint8.
        evidence: (h, w) the class's map.
        top: evidence that is shown as the most.

    Returns:
        (3, 4H, 4W) uint8.
    """
    size = [4 * n for n in image.shape[1:]]
    grey = interpolate(image.float().mean(0)[None, None], size)[0, 0] / 255
    share = (evidence.float() / top).clamp(0, 1)[None, None]
    share = interpolate(share, size, mode="bilinear")[0, 0]
    colours = torch.from_numpy(colormaps["viridis"](share.numpy())[..., :3]).float()
    mixed = 0.35 * grey[..., None] + 0.65 * colours
    return (255 * mixed).round().to(torch.uint8).permute(2, 0, 1)
