"""`python -m allconv predict IMAGE...`: classify your own images and show the class evidence."""

import contextlib
import csv
import io
import json
import os
import sys
from pathlib import Path

from allconv.errors import Parser, UsageError, printable, say

# Of 5,000 validation images (accuracy 76.9 %), the packaged net gives the top class of 941 a
# probability below 0.5, and 36 % of these are right; from 0.45 to 0.5, 49 %.
LOW = 0.5
DESCRIPTION = (
    "Classify your own images, and show the class evidence. The network sees the centre square in "
    "32 x 32 pixels, and always answers with one of its classes. A prediction with a probability "
    f"below {LOW:.0%} is marked as uncertain; most of these are wrong (packaged network). "
    "Unreadable files are listed and skipped; the exit code is then 1."
)
CKPT_PATH = "pretrained (the default where packaged, else best), best, last or a file"
BATCH = 64
SHEET = 12  # images on a sheet


def predict(
    names: list[str], ckpt_path: str | None, format: str, out: str | None, top: int | None
) -> int:
    """Print the predictions and draw the sheet; returns the number of files skipped."""
    from allconv import checkpoints

    default = "pretrained" if checkpoints.PRETRAINED.is_file() else "best"
    checkpoint = checkpoints.load(checkpoints.find(default if ckpt_path is None else ckpt_path))
    files, n = _files(names), len(checkpoint.classes)
    top = min(5, n) if top is None else top
    if not 1 <= top <= n:
        raise UsageError(f"top is {top}: it must be from 1 to {n}")
    if out is not None:
        _check_out(out, files)
    readable, shown, seen = _read(files)
    rows, maps = _answers(checkpoint, readable, seen, top)
    WRITERS[format](rows)
    uncertain = sum(not row["confident"] for row in rows)
    named = checkpoint.classes == checkpoint.dataset.classes
    known = f"{n} classes of {checkpoint.dataset.title if named else 'an unknown data set'}"
    done = f"{len(rows):,} of {len(files):,} images classified, {uncertain:,} uncertain"
    say(f"{done}; {known}; weights: {checkpoint.path}")
    if out is not None and rows:
        from allconv.commands import predict_figure

        sheet = list(zip(rows, shown, seen, maps, strict=False))  # of the first images
        predict_figure.write(Path(out), sheet, f"AllCNN: {known}")
        say(f"written: {out}, with {len(sheet)} of {len(rows):,} images")
    return len(files) - len(rows)


def _files(names: list[str]) -> list[str]:
    """The names, with each folder replaced by the images under it, without hidden ones."""
    from allconv.datasets.images import SUFFIXES

    files = []
    for name in names:
        paths = Path(name).rglob("*") if name else ()  # Path("") is the current folder
        inside = [path for path in paths if path.is_file()]
        shown = [path for path in inside if "/." not in f"/{path.relative_to(name).as_posix()}"]
        found = sorted(path for path in shown if path.suffix.lower() in SUFFIXES)
        if ignored := len(inside) - len(found):
            endings = " ".join(sorted({path.suffix for path in shown} - {p.suffix for p in found}))
            say(f"{name}: {ignored:,} other or hidden files ignored {endings}".rstrip())
        files += [str(path) for path in found] or [name]
    return files


def _check_out(out: str, files: list[str]) -> None:
    """Refuse a sheet that is not a .png, or would replace an input."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UsageError(f"out is {printable(out)}: its ending must be .png")
    for name in files:
        with contextlib.suppress(OSError):  # one of the two does not exist
            if os.path.samefile(0 if name == "-" else name, path):  # also by a link
                raise UsageError(f"out is {printable(out)}: it would replace {printable(name)}")


def _read(files: list[str]) -> tuple[list[str], list, list]:
    """Of the readable files: their names, the first few images, and all network inputs."""
    from rich.console import Console
    from rich.progress import track

    from allconv.datasets import images

    names, shown, seen, frames, quiet = [], [], [], 0, not sys.stderr.isatty()
    for name in track(files, "", console=Console(stderr=True), disable=quiet, transient=True):
        try:
            file = name
            if name == "-":  # limited, since a stream may be endless
                file = io.BytesIO(os.fdopen(0, "rb", closefd=False).read(2**28))
            image = images.read(file)
        except (images.ImageError, OSError) as error:
            say(f"skipped {name}: {error}")
            continue
        names.append(name)
        seen.append(images.reduce(image))  # (3, 32, 32) uint8
        frames += 1 if image.info.get("animated") else 0
        if len(shown) < SHEET:
            image.thumbnail((400, 400))
            shown.append(image)
    if frames:
        say(f"images with several frames or pages: {frames:,}; the first of each was used")
    return names, shown, seen


def _answers(checkpoint, names: list[str], seen: list, top: int) -> tuple[list[dict], list]:
    """Each image's prediction, and for the first batch the map (8, 8) of its top class."""
    import torch

    from allconv.augment import normalize
    from allconv.datasets.cifar100 import MEAN, STD

    # contiguous: with channels-last weights, a few images take ten times as long
    net = checkpoint.net().to(memory_format=torch.contiguous_format)
    rows, shown = [], []
    for start in range(0, len(seen), BATCH):
        with torch.inference_mode():
            batch = normalize(torch.stack(seen[start : start + BATCH]), MEAN, STD)
            maps = net.maps(batch.contiguous())  # (B, classes, 8, 8)
            shares, labels = maps.mean((2, 3)).softmax(1).topk(top)
        shown = shown or [maps[i, label] for i, label in enumerate(labels[:, 0])]
        for best in zip(shares.tolist(), labels.tolist(), strict=True):
            answers = [
                {"class": checkpoint.classes[label], "probability": round(share, 6)}
                for share, label in zip(*best, strict=True)
            ]
            confident = best[0][0] >= LOW
            rows.append({"image": names[len(rows)], "confident": confident, "top": answers})
    return rows, shown


def write_table(rows: list[dict]) -> None:
    """Print each image's name, and its classes below."""
    for row in rows:
        print(printable(row["image"]) + ("" if row["confident"] else "   (uncertain)"))
        for best in row["top"]:
            print(f"  {best['probability']:7.1%}  {printable(best['class']).replace('_', ' ')}")


def write_json(rows: list[dict]) -> None:
    """Print a list of objects."""
    print(json.dumps(rows, indent=2))


def write_csv(rows: list[dict]) -> None:
    """Print a line per image and class."""
    write = csv.writer(sys.stdout, lineterminator="\n").writerow
    write(["image", "rank", "class", "probability", "confident"])
    for row in rows:
        for rank, best in enumerate(row["top"], 1):
            write([printable(row["image"]), rank, *best.values(), str(row["confident"]).lower()])


WRITERS = {"table": write_table, "json": write_json, "csv": write_csv}


def main(args: list[str]) -> None:
    """Run the command; exits with 1 if a file was skipped."""
    parser = Parser(prog="allconv predict", description=DESCRIPTION)
    parser.add_argument("IMAGE", nargs="+", help="files, folders, or - for standard input")
    parser.add_argument("--ckpt_path", help=CKPT_PATH)
    parser.add_argument("--format", choices=[*WRITERS], default="table", help="of the output")
    parser.add_argument("--out", help="PNG file for a sheet of the first 12 images")
    parser.add_argument("--top", type=int, help="classes named for an image; by default 5")
    settings = parser.parse_args(args).as_dict()
    if predict(settings.pop("IMAGE"), **settings):
        sys.exit(1)
