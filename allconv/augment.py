"""Augmentation and normalization: pure functions on a batch, random for each image."""

import functools

import torch
from torch import Tensor
from torch.nn.functional import interpolate


@functools.cache
def _scale(mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device):
    """Factors and offsets (3W,) that normalize a row of 0..255 pixels; cached on the device."""
    m, s = (torch.tensor(c, dtype=torch.float64).repeat(width) for c in (mean, std))
    return (1 / (255 * s)).float().to(device), (-m / s).float().to(device)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalize images (B, 3, H, W) of values 0..255 to float32, channels last in memory.

    `mean` and `std` are those of each channel, as fractions of 255.
    """
    factor, offset = _scale(tuple(mean), tuple(std), images.shape[3], images.device)
    # by rows: an inner loop over 3 channels is not vectorized, and takes four times as long
    rows = images.permute(0, 2, 3, 1).flatten(2).float()  # (B, H, 3W)
    return torch.addcmul(offset, rows, factor).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


def crop(images: Tensor, pad: int) -> Tensor:
    """Shift each image by up to `pad` pixels in each direction, with reflection padding.

    The same as padding and a random crop (He et al., arXiv:1512.03385, who pad with zeros), but by
    indexing, which works on uint8 and returns channels last for free. Images are (B, C, H, W), and
    `pad` is below H and W.
    """
    batch, _, height, width = images.shape
    dy, dx = torch.randint(-pad, pad + 1, (2, batch, 1), device=images.device)
    rows = _reflect(torch.arange(height, device=images.device) + dy, height)  # (B, H)
    columns = _reflect(torch.arange(width, device=images.device) + dx, width)  # (B, W)
    which = torch.arange(batch, device=images.device)[:, None, None]
    return images[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _reflect(index: Tensor, size: int) -> Tensor:
    last = size - 1
    return last - (last - index.abs()).abs()


def alternating_flip(images: Tensor, epoch: int) -> Tensor:
    """Flip half of the images left to right, and the other half in the next epoch.

    From Jordan, "94% on CIFAR-10 in 3.29 Seconds" (arXiv:2404.00498): any two epochs show each
    image both ways. The parity of the sum of its bytes decides which half an image is in, so
    `images` (B, C, H, W) must be uint8 and not yet augmented.
    """
    flipped = (images.sum((1, 2, 3), dtype=torch.long) + epoch) % 2 == 1
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


def resize(images: Tensor, size: int) -> Tensor:
    """Scale float images (B, C, H, W) to (B, C, size, size); bilinear, antialiased."""
    return interpolate(images, (size, size), mode="bilinear", antialias=True)
