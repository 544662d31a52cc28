"""Knowledge distillation with standardized logits (Sun et al., CVPR 2024, arXiv:2403.01427)."""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from allconv import checkpoints
from allconv.errors import UserError

TEMPERATURE, WEIGHT, LABEL_WEIGHT = 2.0, 9.0, 0.1  # the paper's


def loss(student: Tensor, teacher: Tensor, label_loss: Tensor, mixed: bool) -> Tensor:
    """The loss of each image: the teacher's answer, and a little of the label.

    Args:
        student: logits (B, classes).
        teacher: logits (B, classes) of the same images.
        label_loss: (B,) losses against the labels.
        mixed: whether the images are mixed; then only the teacher's answer counts.

    Returns:
        (B,).
    """
    z, target = (standardize(logits) / TEMPERATURE for logits in (student, teacher))
    divergence = kl_div(z.log_softmax(1), target.softmax(1), reduction="none").sum(1)
    distilled = WEIGHT * TEMPERATURE**2 * divergence
    return distilled if mixed else distilled + LABEL_WEIGHT * label_loss


def standardize(logits: Tensor) -> Tensor:
    """Logits (B, classes) with mean 0 and standard deviation 1 over the classes of each image."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


class Teacher:
    """A trained network that is asked, and neither trained nor saved.

    Args:
        name: as --ckpt_path takes it.
        data: the `allconv.CIFAR100`; the teacher must hold out the same images, if any are.

    Raises:
        UserError: it was trained on other images, so it may have seen the validation images.
    """

    def __init__(self, name: str, data):
        checkpoint = checkpoints.load(checkpoints.find(name, key="model.teacher"))
        settings, validated = data.hparams, len(data.sets["val"]) > 0
        same = checkpoint.data.get("digest") == data.digest or not validated
        if checkpoint.dataset != data.dataset or not same:
            raise UserError(
                f"model.teacher is {name}: it was trained on other images "
                f"({checkpoint.dataset.title}) than these ({data.dataset.title})"
            )
        # without validation images there is nothing that a teacher should not have seen
        for key in ("demo", "val_size", "split_seed") if validated else ("demo",):
            known = checkpoint.data.get(key, "unknown")
            if known != settings[key]:
                raise UserError(
                    f"model.teacher is {name}: its data.{key} is {known}, not {settings[key]}, so "
                    "it has seen other images in training, validation images among them"
                )
        self.net: nn.Module = checkpoint.net()
        digest = hashlib.sha256()
        for _, value in sorted(checkpoint.weights.items()):
            digest.update(value.contiguous().numpy().tobytes())
        self.digest = digest.hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalized images (B, 3, 32, 32)."""
        self.net.to(images.device)
        return self.net(images.to(next(self.net.parameters()).dtype))
