"""Augmentation: pure functions on a batch, on the device it is on, a draw for each picture."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def crop(images: Tensor, pad: int, generator: torch.Generator | None = None) -> Tensor:
    """Shift each picture by up to `pad` pixels each way; what comes in is the picture mirrored.

    The same as reflection padding and a random crop (He et al., arXiv:1512.03385, with zeros), by
    indexing: it works on uint8 and gives channels last for nothing.

    Args:
        images: (B, C, H, W).
        pad: greatest shift in pixels, below H and W.
        generator: on the pictures' device; torch's own when None.

    Returns:
        (B, C, H, W) of the same type, channels last in memory.
    """
    batch, _, height, width = images.shape
    shift = {"size": (2, batch, 1), "generator": generator, "device": images.device}
    dy, dx = torch.randint(-pad, pad + 1, **shift)
    rows = _mirrored(torch.arange(height, device=images.device) + dy, height)  # (B, H)
    columns = _mirrored(torch.arange(width, device=images.device) + dx, width)  # (B, W)
    which = torch.arange(batch, device=images.device)[:, None, None]
    return images[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _mirrored(index: Tensor, size: int) -> Tensor:
    last = size - 1
    return last - (last - index.abs()).abs()


def alternating_flip(images: Tensor, epoch: int) -> Tensor:
    """Mirror half of the pictures left to right, in the next epoch the other half.

    From Jordan, "94% on CIFAR-10 in 3.29 Seconds" (arXiv:2404.00498): every two epochs show each
    picture both ways. Which half a picture is in is a coin of its own, the parity of its bytes.

    Args:
        images: (B, C, H, W) uint8, not yet changed by anything random.
        epoch: number of the epoch.
    """
    flipped = (images.sum((1, 2, 3), dtype=torch.long) + epoch) % 2 == 1
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


def resize(images: Tensor, size: int) -> Tensor:
    """Pictures (B, C, H, W) float, scaled to (B, C, size, size); bilinear, antialiased."""
    return interpolate(images, (size, size), mode="bilinear", antialias=True)
