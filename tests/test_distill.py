"""Distillation: the loss, the teacher's view, its split, and resuming."""

import shutil
from pathlib import Path

import lightning
import pytest
import torch
from conftest import TINY
from torch.nn.functional import cross_entropy

from allconv import distill
from allconv.__main__ import main
from allconv.augment import normalize, resize
from allconv.data import CIFAR100
from allconv.datasets.cifar100 import MEAN, STD
from allconv.task import Classifier


def test_the_loss_is_the_papers():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 10, dtype=torch.float64)
    labels = torch.tensor([3, 1, 4, 1])
    of_labels = cross_entropy(student, labels, reduction="none")
    found = distill.loss(student, teacher, of_labels, mixed=False)
    for i in range(4):
        z, t = ((x[i] - x[i].mean()) / x[i].std() / 2 for x in (student, teacher))
        p, q = t.exp() / t.exp().sum(), z.exp() / z.exp().sum()
        divergence = (p * (p / q).log()).sum()
        expected = 9 * 4 * divergence + 0.1 * of_labels[i]
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-5)
    mixed = distill.loss(student, teacher, of_labels, mixed=True)
    torch.testing.assert_close(mixed, found - 0.1 * of_labels)


def test_the_teacher_sees_the_students_images_at_full_size(run):
    """With the student's images at 20 pixels, the loss is that of the same images at 32."""
    data = CIFAR100(demo=True, sizes=((1.0, 20),), crop=2, batch_size=8)
    task = Classifier(width=4, teacher=str(run / "checkpoints/best.ckpt"))
    seen = []

    class Trainer:
        training, max_epochs, num_training_batches = True, 1, 10
        global_step, accumulate_grad_batches, current_epoch = 0, 1, 0
        lightning_module, datamodule, callbacks, ckpt_path = task, data, [], None
        strategy = lightning.Trainer(logger=False, accelerator="cpu").strategy

    data.setup("fit")
    data.trainer = task._trainer = Trainer
    task.setup("fit")
    images, labels = data.sets["train"].batch(range(8))
    torch.manual_seed(1)
    small, _, full = data.on_after_batch_transfer((images, labels), 0)
    assert small.shape == (8, 3, 20, 20)
    torch.testing.assert_close(resize(full, 20), small)
    assert full.shape == (8, 3, 32, 32)
    answers = task.teacher(full)
    assert not answers.requires_grad
    seen.append(answers)
    torch.testing.assert_close(task.teacher(full), seen[0])
    plain = task.teacher(normalize(images, MEAN, STD))
    assert not torch.equal(plain, answers)  # the crop is the student's


@pytest.mark.slow
def test_resuming_is_exact_and_the_teacher_is_known_by_its_content(run, refused):
    shutil.copy(run / "checkpoints/best.ckpt", "teacher.ckpt")
    fit = [*TINY, "--model.teacher", "teacher.ckpt", "--data.sizes", "[[0.5,20]]",
           "--data.cutmix", "0.5", "--data.crop", "2"]  # fmt: skip
    main(fit)
    main([*fit, "--trainer.max_steps", "18"])
    main("fit --ckpt_path last --trainer.max_steps -1".split())
    whole, resumed = (
        torch.load(f"lightning_logs/version_{n}/checkpoints/last.ckpt", weights_only=True)
        for n in (1, 2)
    )
    assert len(whole["teacher"]) == 64
    assert not any("teacher" in name for name in whole["state_dict"])
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name])
    shutil.copy(run / "checkpoints/last.ckpt", "teacher.ckpt")
    content = torch.load("teacher.ckpt", weights_only=True)
    content["state_dict"]["net.conv9.0.bias"] += 1
    torch.save(content, "teacher.ckpt")
    more = "fit --ckpt_path last --trainer.max_epochs 4".split()
    assert "its weights have changed" in refused(*more, code=1)
    Path("teacher.ckpt").unlink()
    assert "model.teacher is teacher.ckpt" in refused(*more, code=1)
    assert "made with teacher.ckpt" in refused(*more, "--model.teacher", "null", code=1)
    main(["test"])  # needs no teacher
    main([*more, "--model.teacher", str(run)])  # its best.ckpt, which is where it came from


def test_a_teacher_is_recorded_by_its_file(run):
    """Not as best, which would be the student itself when it is resumed."""
    main([*TINY, "--model.teacher", "best", "--trainer.max_steps", "9"])
    config = (run.with_name("version_1") / "config.yaml").read_text()
    assert f"teacher: {run}/checkpoints/best.ckpt" in config
    main("fit --ckpt_path last --trainer.max_steps -1".split())


def test_without_validation_images_any_split_of_the_teacher_will_do(run, refused):
    teacher = ["--model.teacher", str(run / "checkpoints/best.ckpt")]
    main([*TINY, *teacher, "--data.val_size", "0"])
    last = "lightning_logs/version_1/checkpoints/last.ckpt"
    assert f"name {last}" in refused("test", code=1)  # not the older run's best
    assert "val_size is 0, not 5000" in refused(*TINY, "--model.teacher", last, code=1)
    main(["test", "--ckpt_path", last])


@pytest.mark.parametrize("flag", ["--data.split_seed 7", "--data.val_size 300"])
def test_a_teacher_of_another_split_is_refused(flag, run, refused):
    teacher = ["--model.teacher", str(run / "checkpoints/best.ckpt")]
    assert "validation images among them" in refused(*TINY, *teacher, *flag.split(), code=1)
    assert not Path("lightning_logs/version_1").exists()
