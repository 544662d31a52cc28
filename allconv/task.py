"""The LightningModule: AllCNN with its loss, optimizer, schedule, metrics and initialization.

The defaults are what the notebook intended. Metrics are computed over whole splits.
"""

import math
from functools import partial

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, ModelPruning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from allconv import distill
from allconv.augment import normalize
from allconv.data import CIFAR100
from allconv.datasets.cifar100 import MEAN, STD
from allconv.model import AllCNN, biases_before_norm, dirac_, whiten_
from allconv.optim import MuonSGD, parameter_groups, triangle
from allconv.ranges import check_model


def _mark_initialized(net: nn.Module, *_) -> None:
    net.initialized = True  # the weights are no longer those to be whitened


class Classifier(LightningModule):
    """AllCNN with its loss, optimizer, schedule and metrics.

    Args:
        lr: initial learning rate; with warmup, the peak.
        momentum: momentum of SGD.
        nesterov: use Nesterov momentum.
        weight_decay: L2 penalty.
        decay_norms: apply weight decay to biases and batch norm parameters too; if not, the biases
            in front of a batch norm, which have no effect, are frozen.
        milestones: epochs after which the learning rate is multiplied by gamma.
        gamma: factor of the learning rate at each milestone.
        warmup: share of the steps over which the learning rate rises linearly from a tenth of lr;
            it then falls linearly to zero, and milestones and gamma are ignored (Smith and Topin,
            arXiv:1708.07120). None: use the milestones.
        muon_lr: learning rate of Muon for the convolutions between the first and the last, see
            `allconv.optim`. 0: train them with SGD.
        label_smoothing: label smoothing of the training loss (Szegedy et al., arXiv:1512.00567).
        dirac: initialize the inner convolutions as identities, see `allconv.model.dirac_`.
        whiten: initialize the first convolution by whitening filters, see `allconv.model.whiten_`.
        teacher: network to distill from: pretrained, or a checkpoint; see `allconv.distill`.
        flip_test: also report test/acc_flip, with the logits of an image and its mirror averaged.
        compile: compile the network with torch.compile (faster on a GPU; no gain on a CPU).
        **net: arguments of AllCNN.
    """

    def __init__(
        self,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 2e-5,
        decay_norms: bool = True,
        milestones: tuple[int, ...] = (20, 40, 60, 80),
        gamma: float = 0.5,
        warmup: float | None = None,
        muon_lr: float = 0.0,
        label_smoothing: float = 0.0,
        dirac: bool = False,
        whiten: bool = False,
        teacher: str | None = None,
        flip_test: bool = False,
        compile: bool = False,
        **net,
    ):
        super().__init__()
        self.save_hyperparameters()
        check_model(self.hparams)
        self.net = AllCNN(**net)
        if dirac:
            dirac_(self.net)
        if not decay_norms:  # before DDP wraps the module: it would wait for their gradients
            for bias in biases_before_norm(self.net):
                bias.requires_grad_(False)
        if compile:
            self.net.compile()  # in place, so that the names in the checkpoint do not change
        self.example_input_array = torch.zeros(1, 3, 32, 32)  # the summary's shapes and FLOPs
        self.net.register_load_state_dict_post_hook(_mark_initialized)
        self.teacher: distill.Teacher | None = None
        self.rate: float | None = None  # learning rate of the last step
        # "disable": a NaN has to show. torchmetrics 1.9 then ignores weights: one loss per image
        self.train_loss = MeanMetric(nan_strategy="disable")
        options = {"num_classes": self.net.num_classes, "average": "micro", "validate_args": False}
        self.metrics = nn.ModuleDict()
        self.metrics["loss"] = MeanMetric(nan_strategy="disable")
        self.metrics["acc"] = MulticlassAccuracy(**options)
        self.metrics["top5"] = MulticlassAccuracy(top_k=min(5, self.net.num_classes), **options)
        self.metrics["n"] = SumMetric(nan_strategy="disable")
        self.acc_flip = MulticlassAccuracy(**options)

    def setup(self, stage: str) -> None:
        """Load the teacher, and initialize new weights; a checkpoint is loaded after this."""
        data, h = self.trainer.datamodule, self.hparams
        ours, found = isinstance(data, CIFAR100), getattr(self.net, "num_classes", None)
        if ours and found and found != (n := len(data.dataset.classes)):
            raise ValueError(f"model.num_classes is {found}, but {data.dataset.title} has {n}")
        if not any(isinstance(callback, ModelPruning) for callback in self.trainer.callbacks):
            self.net.to(memory_format=torch.channels_last)  # torch's pruning needs it contiguous
        if stage != "fit":
            return
        if (h.whiten or h.teacher) and not ours:
            raise ValueError("model.whiten and model.teacher need the CIFAR100 data module")
        if h.teacher:
            self.teacher = distill.Teacher(h.teacher, data)
        if h.whiten and not getattr(self.net, "initialized", False):
            whiten_(self.net, normalize(data.sets["train"].images[::10], MEAN, STD))
        _mark_initialized(self.net)
        # Lightning does so after it has loaded a checkpoint: float64 weights would be rounded
        self.trainer.strategy.precision_plugin.convert_module(self)

    def on_fit_start(self) -> None:
        """Make the schedule again where a BatchSizeFinder has changed the steps of an epoch."""
        if any(isinstance(callback, BatchSizeFinder) for callback in self.trainer.callbacks):
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_validation_start(self) -> None:
        """Do not sum onto inference tensors, which an earlier `test` has left."""
        for metric in self.metrics.values():
            metric.reset()

    on_test_start = on_validation_start

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Record the teacher's digest."""
        if self.teacher:
            checkpoint["teacher"] = self.teacher.digest

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Refuse to resume with another teacher."""
        if self.teacher:
            self.teacher.check(checkpoint.get("teacher"))

    def configure_optimizers(self):
        """SGD, or SGD and Muon, with a schedule that advances every step, not every epoch.

        Lightning saves before it advances an epoch's scheduler: a resumed run would lag behind.
        """
        h, trainer = self.hparams, self.trainer
        groups, fused = parameter_groups(self.net, h), None if h.muon_lr else True
        optimizer = MuonSGD(groups, h.lr, h.momentum, nesterov=h.nesterov, fused=fused)
        trainer.fit_loop.setup_data()  # sets num_training_batches
        if trainer.num_training_batches == math.inf:
            raise ValueError("the training loader has no length: set limit_train_batches")
        # the last batch of an epoch always completes a step
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if h.warmup is None:
            schedule = MultiStepLR(optimizer, [epoch * steps for epoch in h.milestones], h.gamma)
        elif trainer.max_epochs < 0:
            raise ValueError("model.warmup is a share of trainer.max_epochs: give a number")
        else:
            total = steps * trainer.max_epochs
            schedule = LambdaLR(optimizer, partial(triangle, total=total, warmup=h.warmup))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W), normalized, or uint8 as loaders give."""
        if images.dtype == torch.uint8:
            images = normalize(images, MEAN, STD)
        return self.net(images.to(self.dtype))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of normalized images (B, 3, H, W) and labels (B,) or (B, num_classes)."""
        if batch_idx == 0:
            self.train_loss.reset()
        images, labels, *full_size = batch  # full_size: the images at 32 x 32, for the teacher
        smoothing, logits = self.hparams.label_smoothing, self(images)
        losses = cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        if self.teacher:
            answers = self.teacher(full_size[0] if full_size else images)
            losses = distill.loss(logits, answers, losses, mixed=labels.ndim > 1)
        self.train_loss.set_dtype(torch.float32).update(losses.detach())
        self.rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("loss", losses.detach().mean(), prog_bar=True, logger=False)
        return losses.mean()

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        """After the last step of an epoch, log its mean loss and its last learning rate.

        Directly to the loggers: Lightning writes what `self.log` collects over an epoch after that
        epoch's checkpoint, and a run killed in between would lose the row.
        """
        if not (self.trainer.is_last_batch and self.train_loss.update_called):
            return  # a subclass may have a training_step of its own
        values = {"train/loss": self.train_loss.compute().item(), "lr": self.rate}
        self.log_dict(values, logger=False)  # for callbacks
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, self.global_step - 1)
            logger.save()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Update and log the metrics; returns the logits (B, num_classes) for the callbacks."""
        images, labels = batch
        logits = self(images).float()
        losses = cross_entropy(logits, labels, reduction="none")
        self.metrics["acc"].update(logits, labels)
        self.metrics["top5"].update(logits, labels)
        for name, value in (("loss", losses), ("n", len(labels))):  # bf16-true makes them bfloat16
            self.metrics[name].set_dtype(torch.float32).update(value)
        stage = "test" if self.trainer.testing else "val"
        self.log_dict({f"{stage}/{k}": metric for k, metric in self.metrics.items()}, prog_bar=True)
        if stage == "test" and self.hparams.flip_test:
            self.acc_flip.update(logits + self(images.flip(3)).float(), labels)
            self.log("test/acc_flip", self.acc_flip)
        return logits

    test_step = validation_step

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits (B, num_classes) of normalized images (B, 3, H, W), with labels or without."""
        return self(batch if isinstance(batch, Tensor) else batch[0])
