"""The sheet of `predict --out`: each image, the network's input, the class evidence, the answer."""

import warnings
from pathlib import Path

from matplotlib.colors import CenteredNorm, LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from allconv.errors import printable
from allconv.plots import BLUE, GREY, VERMILION, readable
from allconv.rundir import write_atomic

# transparent where there is no evidence, so that the image shows through
ENDS = to_rgba(BLUE, 0.8), to_rgba(BLUE, 0), to_rgba(VERMILION, 0), to_rgba(VERMILION, 0.8)
EVIDENCE = LinearSegmentedColormap.from_list("", list(zip((0, 0.5, 0.5, 1), ENDS, strict=True)))


def write(path: Path, answers: list[tuple], title: str) -> None:
    """Write a PNG file with a row for each prediction, image, network input and map (8, 8)."""
    height = 3.0 * len(answers) + 0.4  # inches
    figure = Figure(figsize=(10.4, height))
    figure.text(0.5, 1 - 0.2 / height, title, ha="center", va="center", fontsize=12)
    rows = figure.subplots(len(answers), 4, squeeze=False)
    edges = {"top": 1 - 1 / height, "bottom": 0.35 / height, "hspace": 0.45}
    figure.subplots_adjust(left=0.02, right=0.98, wspace=0.3, **edges)
    for axes, answer in zip(rows, answers, strict=True):
        _draw(axes, *answer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in another script
        write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=100))


def _draw(axes, row, image, given, evidence) -> None:
    """Draw the four panels of an image."""
    whole, seen, where, bars = axes
    name = row["image"] if len(row["image"]) <= 80 else f"...{row['image'][-77:]}"
    name = printable(name) + ("" if row["confident"] else "   (uncertain)")
    # a dollar sign in a file name does not start a formula
    whole.text(0, 1.18, name, transform=whole.transAxes, weight="bold", parse_math=False)
    side, long, (w, h) = min(image.size), max(image.size), image.size
    whole.imshow(image, extent=(-w / 2, w / 2, -h / 2, h / 2))
    frame = {"fill": False, "lw": 2, "edgecolor": VERMILION, "clip_on": False}
    whole.add_patch(Rectangle((-side / 2, -side / 2), side, side, **frame))
    whole.set(xlim=(-long / 2, long / 2), ylim=(-long / 2, long / 2), facecolor="#eeeeee")
    seen.imshow(given.permute(1, 2, 0).numpy())
    # light greys, which are not mistaken for evidence
    where.imshow(given.float().mean(0).numpy(), cmap="gray", vmin=-100, vmax=255)
    over = {"norm": CenteredNorm(), "interpolation": "bilinear", "extent": (-0.5, 31.5, 31.5, -0.5)}
    shown = where.imshow(evidence.numpy(), cmap=EVIDENCE, **over)
    scale = where.inset_axes((1.04, 0, 0.05, 1))
    where.figure.colorbar(shown, cax=scale).ax.tick_params(labelsize=8)
    where.set_xlabel(f"mean {evidence.mean():.1f} = logit", fontsize=9)
    for i, (label, share) in enumerate(map(dict.values, row["top"][:5])):
        color = GREY if i else BLUE if row["confident"] else VERMILION
        bars.barh(i + 0.7, share, height=0.3, color=color)
        bars.text(0, i + 0.45, f"{readable(label)}  {share:.1%}", fontsize=9, parse_math=False)
    bars.set(xlim=(0, 1), ylim=(5, 0), box_aspect=1)
    bars.spines[:].set_visible(False)
    titles = ("image (frame: used)", "network input", "evidence for the top class", "probability")
    for each, text in zip(axes, titles, strict=True):
        each.set(xticks=[], yticks=[])
        each.set_title(text, fontsize=9, parse_math=False)
