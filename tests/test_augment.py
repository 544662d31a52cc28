"""Augmentation and normalization, against what they stand for."""

import torch
from torch.nn.functional import pad
from torchvision.transforms.functional import normalize as tv_normalize
from torchvision.transforms.functional import to_tensor

from allconv.augment import alternating_flip, crop, normalize, resize
from allconv.datasets.cifar100 import MEAN, STD


def test_normalizes_as_torchvision_does():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = torch.stack(
        [tv_normalize(to_tensor(x.permute(1, 2, 0).numpy()), MEAN, STD) for x in images]
    )
    for given in (images, images.float()):  # CutMix may hand on either
        found = normalize(given, MEAN, STD)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_normalizes_other_constants_and_widths():
    images = torch.randint(0, 256, (2, 3, 20, 28), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = tv_normalize(images / 255, mean, std)
    torch.testing.assert_close(normalize(images, mean, std), expected, atol=1e-6, rtol=1e-6)


def test_crop_is_reflection_padding_and_a_crop():
    images = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32)
    for size in (4, 31):
        torch.manual_seed(1)
        cropped = crop(images, size)
        draws = torch.Generator().manual_seed(1)
        dy, dx = torch.randint(-size, size + 1, (2, 2, 1), generator=draws)
        for i in range(2):
            padded = pad(images[i : i + 1].double(), [size] * 4, mode="reflect")[0].long()
            y, x = size + dy[i].item(), size + dx[i].item()
            assert torch.equal(cropped[i], padded[:, y : y + 32, x : x + 32])
        assert cropped.is_contiguous(memory_format=torch.channels_last)


def test_crop_draws_for_each_image():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(64, -1, -1, -1)
    cropped = crop(images, 4)
    assert cropped.dtype == torch.uint8
    assert len(cropped.flatten(1).unique(dim=0)) > 20


def test_two_epochs_show_each_image_both_ways():
    images = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8)
    first, second = alternating_flip(images, 0), alternating_flip(images, 1)
    flipped = (first != images).flatten(1).any(1)
    assert 140 < flipped.sum() < 260
    assert torch.equal(second, torch.where(flipped[:, None, None, None], images, images.flip(3)))
    assert torch.equal(alternating_flip(images, 2), first)


def test_resize_keeps_a_plain_image_plain():
    plain = torch.full((2, 3, 32, 32), 0.25)
    assert torch.equal(resize(plain, 20), torch.full((2, 3, 20, 20), 0.25))
