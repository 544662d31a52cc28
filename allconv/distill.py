"""Knowledge distillation with standardized logits (Sun et al., CVPR 2024, arXiv:2403.01427)."""

import hashlib

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from allconv import checkpoints
from allconv.errors import UserError

TEMPERATURE, WEIGHT, LABEL_WEIGHT = 2.0, 9.0, 0.1  # the paper's


def loss(student: Tensor, teacher: Tensor, label_loss: Tensor, mixed: bool) -> Tensor:
    """The loss of each image (B,): divergence from the teacher, and a little of the label's loss.

    Args:
        student: logits (B, classes).
        teacher: logits (B, classes).
        label_loss: cross-entropy (B,) with the labels.
        mixed: whether the images are mixed; the labels are then ignored.
    """
    z, target = (standardize(logits) / TEMPERATURE for logits in (student, teacher))
    divergence = kl_div(z.log_softmax(1), target.softmax(1), reduction="none").sum(1)
    distilled = WEIGHT * TEMPERATURE**2 * divergence
    return distilled if mixed else distilled + LABEL_WEIGHT * label_loss


def standardize(logits: Tensor) -> Tensor:
    """Logits (B, classes) with mean 0 and standard deviation 1 over the classes of each image."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


class Teacher:
    """A trained network in inference mode; the student's checkpoints do not contain it.

    Args:
        name: a value of --ckpt_path.
        data: the `allconv.CIFAR100` of the student.

    Raises:
        UserError: the teacher had another split, so it may have seen the validation images.
    """

    def __init__(self, name: str, data):
        self.name = name
        checkpoint = checkpoints.load(checkpoints.find(name, key="model.teacher"))
        known, here = checkpoint.data, {**data.hparams, "digest": data.digest}
        # without validation images, the teacher may have seen everything
        keys = ("digest", "val_size", "split_seed") if len(data.sets["val"]) else ()
        other = [key for key in keys if known.get(key) != here[key]]
        if checkpoint.dataset != data.dataset or "digest" in other:
            raise UserError(
                f"model.teacher is {name}: it was trained on other images "
                f"({checkpoint.dataset.title}) than these ({data.dataset.title})"
            )
        for key in other:
            raise UserError(
                f"model.teacher is {name}: its data.{key} is {known.get(key)}, not {here[key]}, so "
                "it has seen other images in training, validation images among them"
            )
        self.net = checkpoint.net()
        weights = (value for _, value in sorted(checkpoint.weights.items()))
        content = b"".join(value.flatten().view(torch.uint8).numpy().tobytes() for value in weights)
        self.digest = hashlib.sha256(content).hexdigest()

    def check(self, digest: str | None) -> None:
        """Refuse to resume a run whose teacher had another digest."""
        if digest != self.digest:
            raise UserError(f"model.teacher is {self.name}: its weights have changed")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalized images (B, 3, 32, 32)."""
        self.net.to(images.device)
        return self.net(images.to(next(self.net.parameters()).dtype))
