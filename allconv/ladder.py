"""`python -m allconv.ladder`: from the notebook's recipe to ours, a change at a time.

Trains each rung that has not ended yet (width 32, 6 epochs), then writes ladder.csv, a table and
two figures from the runs' metrics.csv and TensorBoard's clock. An hour on two CPU cores.
"""

import csv
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

from jsonargparse import auto_cli
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from allconv import figures, runs

EPOCHS, WIDTH = 6, 32

# Each rung keeps the flags of those before it. At the top it is configs/fast.yaml.
RUNGS = {
    "the notebook, as its code ran": "--model.gamma 1",
    "as it was meant, milestones at the same shares": (
        "--model.gamma 0.5 --model.milestones [1,2,4,5]"
    ),
    "no ReLU and dropout on the logits": "--model.rectify_logits false",
    "no dropout": "--model.dropout 0",
    "warm-up, fall to zero, Nesterov, batch 120, weight decay 5e-4 of weights only": (
        "--data.batch_size 120 --model.warmup 0.25 --model.lr 0.15 --model.nesterov true "
        "--model.weight_decay 5e-4 --model.decay_norms false"
    ),
    "crop, flip, growing pictures": (
        "--data.crop 4 --data.flip true --data.sizes [[0.15,20],[0.5,24]]"
    ),
    "label smoothing": "--model.label_smoothing 0.15",
    "whitening filters, dirac": "--model.whiten true --model.dirac true",
    "Muon": "--model.muon_lr 0.1",
}
# Each a change of one rung, counted from 0; -1 is the last.
BESIDE = {
    "residuals": (-1, "--model.residuals true"),
    "residuals, with the notebook as it was meant": (1, "--model.residuals true"),
    "residuals, without ReLU on the logits": (2, "--model.residuals true"),
    "CutMix of half of the batches": (-1, "--data.cutmix 0.5"),
    "Muon's rate 0.2": (-1, "--model.muon_lr 0.2"),
    "Muon's rate 0.05": (-1, "--model.muon_lr 0.05"),
    "SGD's rate 0.3": (-1, "--model.lr 0.3"),
    "EMA, decay 0.99": (
        -1,
        "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging "
        "--trainer.callbacks.decay=0.99",
    ),
}


def ladder(data_dir: str = "data", folder: str = "ladder", train: bool = True) -> None:
    """Train the rungs that are missing and draw what they gave.

    Args:
        data_dir: folder with the data set, as in fit.
        folder: where the runs lie, one folder a rung, and what is drawn.
        train: train the rungs that are missing; else they are left out.
    """
    flags = list(itertools.accumulate(RUNGS.values(), "{} {}".format))
    jobs = dict(zip(RUNGS, flags, strict=True))
    jobs |= {f"+ {name}": f"{flags[rung]} {more}" for name, (rung, more) in BESIDE.items()}
    config = Path(__file__).parent.parent / "configs" / "notebook.yaml"
    table = []
    for i, (name, given) in enumerate(jobs.items()):
        root = Path(folder, f"{i:02d}")
        run = root / runs.LOGS / "version_0"
        finished = len(runs.read_metrics(run)) == EPOCHS
        if not (finished or train):
            continue
        if not finished:
            shutil.rmtree(root, ignore_errors=True)  # of a resumed run the clock is of no use
            print(f"rung {i + 1} of {len(jobs)}: {name}", flush=True)
            command = [sys.executable, "-m", "allconv", "fit", "--config", str(config)]
            command += ["--data.data_dir", data_dir, "--model.width", str(WIDTH), *given.split()]
            command += ["--trainer.max_epochs", str(EPOCHS)]
            subprocess.run([*command, "--trainer.default_root_dir", str(root)], check=True)
        for row, seconds in zip(runs.read_metrics(run), _clock(run), strict=True):
            table.append({"rung": name, "seconds": round(seconds, 1), **row})
    with Path(folder, "ladder.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    _draw(table, Path(folder))


def _draw(table: list[dict[str, float]], folder: Path) -> None:
    """Print the last epoch of each rung as a table, and draw the figures."""
    ends = [row for row in table if row["epoch"] == EPOCHS - 1]
    first = ends[0]["seconds"]
    print("| rung | val/acc | time |\n|---|---|---|")
    for row in ends:
        print(f"| {row['rung']} | {row['val/acc']:.2%} | {row['seconds'] / first:.2f} |")
    accuracies = {row["rung"]: row["val/acc"] for row in ends}
    title = f"Validation accuracy, width {WIDTH}, {EPOCHS} epochs, one run each"
    figures.ladder(accuracies, title).savefig(folder / "ladder.png", dpi=120)
    notebook, ours = list(RUNGS)[1], list(RUNGS)[-1]
    lines = {
        label: [(row["seconds"], row["val/acc"]) for row in table if row["rung"] == rung]
        for label, rung in (("notebook.yaml", notebook), ("fast.yaml", ours))
    }
    title = f"Width {WIDTH}, {EPOCHS} epochs, 2 CPU cores"
    figures.race(lines, title).savefig(folder / "race.png", dpi=120)
    print(f"written: {folder}/ladder.csv, ladder.png, race.png")


def _clock(run: Path) -> list[float]:
    """Seconds from the run's start to the end of each epoch, by TensorBoard's clock."""
    events = EventAccumulator(str(run)).Reload()
    start = events.FirstEventTimestamp()
    return [event.wall_time - start for event in events.Scalars("val/acc")]


if __name__ == "__main__":
    auto_cli(ladder)
