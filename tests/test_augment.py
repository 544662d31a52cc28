"""Augmentation and Muon, against what they stand for."""

import torch
from torch.nn.functional import pad

from allconv.augment import alternating_flip, crop, resize
from allconv.muon import orthogonalize


def test_crop_is_reflection_padding_and_a_crop():
    images = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32)
    cropped = crop(images, 4, torch.Generator().manual_seed(1))
    dy, dx = torch.randint(-4, 5, (2, 2, 1), generator=torch.Generator().manual_seed(1))
    for i in range(2):
        padded = pad(images[i : i + 1].double(), (4, 4, 4, 4), mode="reflect")[0].long()
        y, x = 4 + dy[i].item(), 4 + dx[i].item()
        assert torch.equal(cropped[i], padded[:, y : y + 32, x : x + 32])
    assert cropped.is_contiguous(memory_format=torch.channels_last)


def test_crop_draws_for_each_picture():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(64, -1, -1, -1)
    assert len(crop(images, 4).flatten(1).unique(dim=0)) > 20


def test_two_epochs_show_each_picture_both_ways():
    images = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8)
    first, second = alternating_flip(images, 0), alternating_flip(images, 1)
    flipped = (first != images).flatten(1).any(1)
    assert 140 < flipped.sum() < 260
    assert torch.equal(second, torch.where(flipped[:, None, None, None], images, images.flip(3)))
    assert torch.equal(alternating_flip(images, 2), first)


def test_resize_keeps_a_plain_picture_plain():
    assert torch.equal(
        resize(torch.full((2, 3, 32, 32), 0.25), 20), torch.full((2, 3, 20, 20), 0.25)
    )


def test_orthogonalize_brings_singular_values_near_one():
    for shape in ((16, 40), (40, 16)):
        update = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        values = torch.linalg.svdvals(orthogonalize(update, steps=6))
        assert values.min() > 0.6
        assert values.max() < 1.3
