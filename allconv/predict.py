"""`python -m allconv predict PICTURE...`: what the net takes own pictures for, and where it saw it.

Pictures are read, classified and forgotten in batches: thousands need no more memory than a few.
"""

import csv
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import allconv
from allconv import cli, data, figures, pictures, runs
from allconv.model import AllCNN

BATCH = 64
SHEET = 12  # pictures that are still legible on one sheet
# Of the 5,000 validation pictures the packaged net (74.8 % right) gives 983 top classes less than
# 0.35: 37 % of those are right. From 0.30 to 0.35 it is 49 %, from 0.35 to 0.40 52 %.
LOW = 0.35


class Answer(NamedTuple):
    """What the net says to a picture."""

    top: list[tuple[str, float]]  # classes and probabilities, highest first
    seen: Tensor  # what the net was given, (3, 32, 32) uint8
    where: Tensor  # the top class's map (8, 8), whose mean is its logit
    image: Tensor | None  # the picture for the sheet, (3, H, W) uint8


def predict(
    names: list[str],
    ckpt_path: str | None = None,
    format: Literal["table", "json", "csv"] = "table",
    out: str | None = None,
    top: int = 5,
) -> int:
    """Classify own pictures, PNG, JPEG and WebP of any size: files, or folders with all in them.

    The results alone go to the output, remarks and the bar to the error stream. What cannot be
    read is named there and left out; then the exit code is 1.

    Args:
        names: files and folders.
        ckpt_path: pretrained, best, last or a file; without, the packaged weights, or the newest
            run's best if there are none.
        format: a table; json, a list of objects with picture, confident and top; or csv, a line
            for each picture and class.
        out: PNG file for a sheet of the first 12 pictures, with what the net saw of them and where.
        top: number of classes named for a picture.

    Returns:
        How many files and names were left out.

    Raises:
        ValueError: an argument is out of its range.
        CheckpointError: there are no weights.
    """
    name = ckpt_path or ("pretrained" if runs.PRETRAINED.is_file() else "best")
    path = runs.find_checkpoint(name, Path(runs.LOGS))
    net = allconv.load(path)
    if not 1 <= top <= len(net.classes):
        raise ValueError(f"top is {top}: it must be from 1 to {len(net.classes)}")
    if out and not (out.lower().endswith(".png") and Path(out).absolute().parent.is_dir()):
        raise ValueError(f"out is {out}: it must be a .png in a folder that is there")
    files, skipped = _files(names)
    if out and Path(out).absolute() in {file.absolute() for file in files}:
        raise ValueError(f"out is {out}, which is one of the pictures: choose another place")
    sheet, n, uncertain = [], 0, 0
    bar = Progress(
        console=Console(stderr=True),
        # at a terminal through the bar, which makes way; else where the results are wanted
        redirect_stdout=sys.stdout.isatty(),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    with bar:
        write = csv.writer(sys.stdout, lineterminator="\n").writerow
        if format == "csv":
            write(["picture", "rank", "class", "probability", "confident"])
        for file, answer in bar.track(_answers(net, files, top, SHEET if out else 0), len(files)):
            if isinstance(answer, pictures.PictureError):
                skipped += 1
                _say(f"skipped {printable(file)}: {answer}")
                continue
            confident = answer.top[0][1] >= LOW
            if format == "csv":
                for rank, (label, share) in enumerate(answer.top, 1):
                    write([printable(file), rank, label, f"{share:.6f}", str(confident).lower()])
            elif format == "json":
                best = [{"class": label, "probability": round(p, 6)} for label, p in answer.top]
                row = {"picture": str(file), "confident": confident, "top": best}
                print("," if n else "[", json.dumps(row), sep="\n", end="")
            else:
                print(printable(file) + ("" if confident else "   (uncertain)"))
                for label, share in answer.top:
                    print(f"  {share:7.1%}  {figures.readable(label)}")
            n += 1
            uncertain += not confident
            if len(sheet) < SHEET:
                sheet.append((printable(file), answer))
    if format == "json":
        print("\n]" if n else "[]")
    known = "CIFAR-100" if net.classes == data.CLASSES else "the drawn demo set"
    _say(
        f"pictures classified: {n:,}, left out: {skipped:,}; weights: {path}",
        f"the net knows the {len(net.classes)} classes of {known} and answers with one of them "
        "whatever it is shown; it saw the centre square of each picture, in 32 x 32 pixels",
    )
    if uncertain:
        _say(
            f"uncertain: {uncertain:,}, with a top class below {LOW:.0%}; on validation pictures "
            "such an answer is wrong more often than right"
        )
    if sheet and out:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in another script
            _draw(sheet, known).savefig(out, dpi=100)
        _say(f"written: {out}, with {len(sheet)} of {n:,} pictures")
    elif n:
        _say("to see what the net saw, and where: --out FILE.png")
    return skipped


def printable(path: Path) -> str:
    """A file's name in one line, whatever bytes and control characters are in it."""
    name = str(path)
    return name if name.isprintable() else ascii(name)[1:-1]


def _say(*lines: str) -> None:
    for line in lines:
        print("allconv:", line, file=sys.stderr, flush=True)


def _files(names: list[str]) -> tuple[list[Path], int]:
    """The files that the names mean, and how many names mean none."""
    files, skipped = [], 0
    for name in names:
        try:
            found, others = pictures.find(name)
        except pictures.PictureError as error:
            _say(f"skipped {printable(Path(name))}: {error}")
            skipped += 1
            continue
        files += found
        if others:
            _say(f"{printable(Path(name))}: {others:,} other files ignored")
    return files, skipped


def _answers(
    net: AllCNN, files: list[Path], top: int, sheet: int
) -> Iterator[tuple[Path, Answer | pictures.PictureError]]:
    """Each file with its answer or what is wrong with it, in order; `sheet` of them with image."""
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        read: list[tuple[Tensor, Tensor | None] | pictures.PictureError] = []
        for file in batch:
            try:
                image = pictures.read(file)
            except pictures.PictureError as error:
                read.append(error)
                continue
            seen, small = pictures.reduce(image), None
            if sheet:
                image.thumbnail((400, 400))
                small = pictures.tensor(image)
                sheet -= 1
            read.append((seen, small))
        seen = [item[0] for item in read if isinstance(item, tuple)]
        answers = iter(())
        if seen:
            with torch.inference_mode():
                maps = net.maps(data.normalize(torch.stack(seen)))  # (B, 100, 8, 8)
                shares, classes = maps.mean((2, 3)).softmax(1).topk(top)  # (B, top)
            answers = zip(maps, shares.tolist(), classes.tolist(), strict=True)
        for file, item in zip(batch, read, strict=True):
            if isinstance(item, tuple):
                each, share, label = next(answers)
                best = [(net.classes[i], p) for i, p in zip(label, share, strict=True)]
                item = Answer(best, item[0], each[label[0]].clone(), item[1])
            yield file, item


def _draw(sheet: list[tuple[str, Answer]], known: str):
    titles, answers = zip(*sheet, strict=True)
    top, seen, where, images = zip(*answers, strict=True)
    title = f"AllCNN: knows the 100 classes of {known} from 32 x 32 pixels, and nothing else"
    shortened = [name if len(name) <= 70 else "..." + name[-67:] for name in titles]
    return figures.classified(
        images, torch.stack(seen), torch.stack(where), top, shortened, title, LOW
    )


def main(args: list[str]) -> None:
    """Run the command; exits with 1 if a picture was left out."""
    parser = cli.Parser(prog="allconv predict", description=predict.__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="PICTURE", help="Files and folders.")
    parser.add_function_arguments(predict, skip={"names"})
    with cli.command():
        skipped = predict(**parser.parse_args(args).as_dict())
    if skipped:
        sys.exit(1)
