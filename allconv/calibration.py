"""Logits of a whole split, and their temperature scaling (Guo et al., 2017, arXiv:1706.04599)."""

import math

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from allconv.augment import normalize
from allconv.datasets.cifar100 import MEAN, STD
from allconv.model import AllCNN

BATCH = 500  # images; takes the least CPU time, of 50 to 500


@torch.inference_mode()
def evidence(net: AllCNN, images: Tensor) -> Tensor:
    """Class evidence maps (N, classes, 8, 8) of uint8 images; their means are the logits."""
    images = images.to(net.conv1[0].weight.device)
    return net.maps(normalize(images, MEAN, STD)).cpu()


def logits(net: AllCNN, images: Tensor, title: str) -> Tensor:
    """Logits (N, classes) of uint8 images (N, 3, 32, 32), with a progress bar of this title."""
    batches = track(images.split(BATCH), title, console=Console(stderr=True))
    return torch.cat([evidence(net, batch).mean((2, 3)) for batch in batches])


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the lowest cross-entropy, by bisection."""
    logits, low, high = logits.double(), 0.01, 100.0
    of_labels = logits.gather(1, labels[:, None]).mean()
    for _ in range(40):
        middle = math.sqrt(low * high)
        # the derivative is zero where the expected logit equals the mean logit of the true classes
        expected = ((logits / middle).softmax(1) * logits).sum(1).mean()
        low, high = (middle, high) if expected > of_labels else (low, middle)
    return middle


@torch.no_grad()
def divide_logits_(net: AllCNN, temperature: float) -> None:
    """Divide the network's logits by the temperature, in its last layer."""
    for parameter in net.conv9.parameters():
        parameter /= temperature
