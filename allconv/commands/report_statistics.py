"""Statistics of `report`: intervals, McNemar's test, calibration."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Z = 1.959964  # standard errors on each side of a 95 % interval


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927)."""
    centre, half = right + Z**2 / 2, Z * math.sqrt(right * (n - right) / n + Z**2 / 4)
    return (centre - half) / (n + Z**2), (centre + half) / (n + Z**2)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test: how often a fair coin falls at least as unevenly."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def paired_interval(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """95 % interval of A's accuracy minus B's on the same n images (Agresti and Min, 2005)."""
    a, b, n = only_a + 0.5, only_b + 0.5, n + 2
    half = Z * math.sqrt(a + b - (a - b) ** 2 / n)
    return (a - b - half) / n, (a - b + half) / n


def fit_temperature(logits: "Tensor", labels: "Tensor") -> float:
    """The divisor of the logits with the lowest cross-entropy (Guo et al., 2017), by bisection."""
    logits, low, high = logits.double(), 0.01, 100.0
    of_labels = logits.gather(1, labels[:, None]).mean()
    for _ in range(40):
        middle = math.sqrt(low * high)
        # the derivative is zero where the softmax expects the true classes' mean logit
        expected = ((logits / middle).softmax(1) * logits).sum(1).mean()
        low, high = (middle, high) if expected > of_labels else (low, middle)
    return middle


def calibration(logits: "Tensor", labels: "Tensor") -> tuple[float, float]:
    """Cross-entropy, and expected calibration error in 15 bins of equal width."""
    log_p = logits.double().log_softmax(1)
    confidence, predicted = log_p.exp().max(1)
    gaps = (confidence * 15).long().bincount(confidence - (predicted == labels).double())
    loss = -log_p.gather(1, labels[:, None]).mean().item()
    return loss, gaps.abs().sum().item() / len(labels)
