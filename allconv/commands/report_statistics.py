"""Statistics of `report`: predictions, accuracy and calibration of a net, two nets compared."""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error

from allconv import calibration
from allconv.checkpoints import Checkpoint
from allconv.datasets.cifar100 import Images
from allconv.errors import UserError
from allconv.model import AllCNN
from allconv.training import runtime

Z = 1.959964  # standard errors on each side of a 95 % interval


@dataclass
class Evaluation:
    """The predictions of a checkpoint's network for the N images of a split."""

    key: str  # A or B
    checkpoint: Checkpoint
    net: AllCNN
    images: Tensor  # (N, 3, 32, 32) uint8
    labels: Tensor  # (N,)
    logits: Tensor  # (N, classes)
    temperature: float | None  # fitted on the validation images, if there are any

    def __post_init__(self):
        self.confidence, self.predicted = self.logits.softmax(1).max(1)  # (N,)
        self.right = self.predicted == self.labels  # (N,)
        self.acc = self.right.double().mean().item()
        self.interval = wilson(self.right.sum().item(), len(self.labels))
        n = self.logits.shape[1]
        cells = self.labels * n + self.predicted
        self.matrix = cells.bincount(minlength=n * n).view(n, n)  # true class, predicted class


def read_sets(checkpoints: list[Checkpoint], split: str, data_dir: str | None) -> list[dict]:
    """For each checkpoint, its validation split, which may be empty, and `split`.

    Raises:
        UserError: `split` differs between the checkpoints, or is empty.
    """
    known = [c for c in checkpoints if c.data.keys() & {"data_dir", "folder"}]
    data, sets = (known or checkpoints)[0].dataset, []
    if data_dir:
        data = replace(data, path=Path(data_dir).expanduser())
    data.prepare()
    load = cache(data.load)
    for c in checkpoints:
        own = {key: c.data[key] for key in ("val_size", "split_seed") if key in c.data}
        parts = {**load("train", **own), **(load("test") if split == "test" else {})}
        sets.append({name: parts[name] for name in dict.fromkeys(("val", split))})
    if not len(sets[0][split]):
        raise UserError("there are no validation images: data.val_size was 0")
    if not torch.equal(sets[0][split].images, sets[-1][split].images):
        raise UserError("A and B hold out different validation images (val_size, split_seed)")
    return sets


def evaluate(key: str, checkpoint: Checkpoint, sets: dict[str, Images]) -> Evaluation:
    """Run the network over each set that is not empty; the last one is reported."""
    runtime.keep_memory()
    net, temperature = checkpoint.net().to("cuda" if torch.cuda.is_available() else "cpu"), None
    for split, data in sets.items():
        images, labels = data.images, data.labels
        if not len(labels):
            continue
        logits = calibration.logits(net, images, f"{key}: {len(images):,} {split} images")
        if not logits.isfinite().all():
            raise UserError(f"{checkpoint.path}: its logits are not all finite")
        if split == "val":
            temperature = calibration.fit_temperature(logits, labels)
    return Evaluation(key, checkpoint, net, images, labels, logits, temperature)


def percent(share: float, digits: int = 2) -> str:
    """Format a share in per cent."""
    return f"{100 * share:.{digits}f}\u00a0%"


def results(e: Evaluation) -> dict[str, str]:
    """A network's column in the table of results."""
    data = e.checkpoint.dataset
    best = e.logits.topk(min(5, e.logits.shape[1])).indices
    top5 = (best == e.labels[:, None]).any(1).double().mean().item()
    loss, ece = loss_and_ece(e.logits, e.labels)
    found = {
        "accuracy (top 1)": percent(e.acc),
        "95 % interval": f"{100 * e.interval[0]:.2f} to {percent(e.interval[1])}",
        "top-5 accuracy": percent(top5),
        "cross-entropy (nats)": f"{loss:.4f}",
        "ECE": percent(ece),
        "parameters": f"{sum(p.numel() for p in e.net.parameters()):,}",
        "epochs trained": str(e.checkpoint.epoch or "unknown"),
    }
    groups = [[data.classes.index(name) for name in g] for g in data.superclasses.values()]
    if len(groups) < len(data.classes):  # a folder has no superclasses
        inside = sum(e.matrix[group][:, group].sum().item() for group in groups)
        found["superclass accuracy"] = percent(inside / len(e.labels))
    if e.temperature:
        loss, ece = loss_and_ece(e.logits / e.temperature, e.labels)
        found |= {"temperature": f"{e.temperature:.4f}", "ECE, calibrated": percent(ece)}
        found["cross-entropy, calibrated"] = f"{loss:.4f}"
    return found


def by_class(evaluations: list[Evaluation], groups: dict[str, tuple[str, ...]]) -> list[tuple]:
    """The accuracies of the networks in each group of classes that has images.

    Sorted from the lowest accuracy, or for two networks from the largest difference.
    """
    names, found = evaluations[0].checkpoint.dataset.classes, []
    for name, members in groups.items():
        index = [names.index(member) for member in members]
        counts = [(e.matrix[index, index].sum(), e.matrix[index].sum()) for e in evaluations]
        if counts[0][1]:
            found.append((name, [(right / n).item() for right, n in counts]))
    if len(evaluations) == 1:
        return sorted(found, key=lambda row: row[1])
    return sorted(found, key=lambda row: -abs(row[1][0] - row[1][1]))


def compare(a: Evaluation, b: Evaluation) -> dict[str, object]:
    """Count the images that both, one or neither of the networks classify correctly, and test."""
    only_a, only_b = (a.right & ~b.right).sum().item(), (b.right & ~a.right).sum().item()
    both, neither = (a.right & b.right).sum().item(), (~a.right & ~b.right).sum().item()
    counts = [("A right", both, only_a), ("A wrong", only_b, neither)]
    return {"counts": counts, "unequal": only_a + only_b, "p": mcnemar(only_a, only_b)}


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927)."""
    centre, half = right + Z**2 / 2, Z * math.sqrt(right * (n - right) / n + Z**2 / 4)
    return (centre - half) / (n + Z**2), (centre + half) / (n + Z**2)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test, a sign test on the images that only one has right."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def loss_and_ece(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Cross-entropy, and expected calibration error in 15 bins of equal width."""
    shares = logits.double().softmax(1)
    error = multiclass_calibration_error(shares, labels, logits.shape[1], n_bins=15)
    return cross_entropy(logits.double(), labels).item(), error.item()
