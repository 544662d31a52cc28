"""The training task: AllCNN with cross-entropy, SGD and a schedule.

The defaults are what the notebook meant: SGD with momentum 0.9 and weight decay 2e-5, learning
rate 0.1, halved every 20 of 100 epochs. Figures are counted over whole splits with torchmetrics.
"""

import math
from functools import partial

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from allconv.model import AllCNN, dirac_, whiten_
from allconv.muon import MuonSGD


def triangle(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate: up in a line from a tenth to 1, then down in a line to 0."""
    top = max(1, round(warmup * total)) if warmup else 0
    if step < top:
        return 0.1 + 0.9 * step / top
    return max(0.0, (total - step) / max(1, total - top))


class Classifier(LightningModule):
    """AllCNN with its loss, optimizer, schedule and metrics.

    Args:
        lr: learning rate at the start; with warmup, the highest.
        momentum: momentum of SGD.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: L2 penalty.
        decay_norms: whether biases and batch norm are decayed as well; if not, the biases before a
            batch norm, which it cancels, are not trained.
        milestones: epochs after which the learning rate is multiplied by gamma.
        gamma: factor of the learning rate at each milestone.
        warmup: share of the steps in which the rate rises from a tenth of lr; then it falls to
            zero in a line, and milestones and gamma have no part (Smith and Topin,
            arXiv:1708.07120). None keeps the milestones.
        muon_lr: learning rate of Muon on the convolutions between the first and the last, see
            `allconv.muon`; 0 leaves them to SGD.
        muon_momentum: Muon's momentum, of Nesterov's kind.
        label_smoothing: share of the target spread over all classes, in training (Szegedy et al.,
            arXiv:1512.00567).
        dirac: begin the inner convolutions as the identity, see `allconv.model.dirac_`.
        whiten: begin the first convolution with whitening filters, see `allconv.model.whiten_`.
        flip_test: average the logits of each test picture and its mirror image, and report that
            accuracy apart as test/acc_flip.
        compile: compile the net with torch.compile (pays on a GPU; nothing gained on a CPU).
        **net: arguments of AllCNN.

    Raises:
        ValueError: an argument is out of its range.
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
        muon_momentum: float = 0.6,
        label_smoothing: float = 0.0,
        dirac: bool = False,
        whiten: bool = False,
        flip_test: bool = False,
        compile: bool = False,
        **net,
    ):
        super().__init__()
        for name, value, right, rule in (
            ("lr", lr, lr > 0, "above 0"),
            ("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("milestones", milestones, all(m > 0 for m in milestones), "of numbers above 0"),
            ("gamma", gamma, gamma > 0, "above 0"),
            ("warmup", warmup, warmup is None or 0 <= warmup < 1, "null, or from 0 to below 1"),
            ("muon_lr", muon_lr, muon_lr >= 0, "at least 0"),
            ("muon_momentum", muon_momentum, 0 <= muon_momentum < 1, "at least 0 and below 1"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "from 0 to below 1"),
        ):
            if not right:
                raise ValueError(f"model.{name} is {value}: it must be {rule}")
        if nesterov and not momentum:
            raise ValueError("model.nesterov is true: model.momentum must be above 0 then")
        self.save_hyperparameters(logger=False)
        self.net = AllCNN(**net).to(memory_format=torch.channels_last)
        if dirac:
            dirac_(self.net)
        if not decay_norms:  # here, not with the optimizer: DDP must not wait for their gradients
            for layer in self.net.children():
                if len(layer) > 1 and isinstance(layer[1], nn.BatchNorm2d):
                    layer[0].bias.requires_grad_(False)
        num_classes = self.net.conv9[0].out_channels
        self.example_input_array = torch.zeros(1, 3, 32, 32)  # the summary's shapes and FLOPs
        # "disable": a loss that is not a number has to show as one. torchmetrics 1.9 then takes
        # every weight for 1, so the losses go in picture by picture
        self.train_loss = MeanMetric(nan_strategy="disable")
        top = {"num_classes": num_classes, "average": "micro", "validate_args": False}
        self.split_figures = nn.ModuleDict(
            {
                "loss": MeanMetric(nan_strategy="disable"),
                "acc": MulticlassAccuracy(**top),
                "top5": MulticlassAccuracy(top_k=min(5, num_classes), **top),
                "n": SumMetric(nan_strategy="disable"),
            }
        )
        self.acc_flip = MulticlassAccuracy(**top)

    def configure_model(self) -> None:
        """Compile in place, so that the names in the checkpoint stay as they are."""
        if self.hparams.compile:
            self.net.compile()

    def whiten(self, images: Tensor) -> None:
        """Begin with whitening filters of these normalized pictures (B, 3, H, W), if asked to."""
        if self.hparams.whiten:
            whiten_(self.net, images)

    def configure_optimizers(self):
        """SGD or Muon with SGD, and a schedule that counts steps.

        Stepped once a batch and not once an epoch: Lightning saves checkpoints before it steps
        the epoch's scheduler, and a resumed run would keep the old rate for one epoch more.
        """
        h = self.hparams
        options = {"lr": h.lr, "momentum": h.momentum, "nesterov": h.nesterov}
        groups = self.parameter_groups()
        if h.muon_lr:
            optimizer = MuonSGD(groups, **options)
        else:
            optimizer = torch.optim.SGD(groups, **options, fused=True)
        self.trainer.fit_loop.setup_data()  # until then Lightning does not know the number below
        batches, together = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        steps = math.ceil(batches / together)  # Lightning steps at an epoch's end in any case
        if h.warmup is None:
            milestones = [epoch * steps for epoch in h.milestones]
            schedule = MultiStepLR(optimizer, milestones, h.gamma)
        else:
            total = steps * self.trainer.max_epochs
            schedule = LambdaLR(optimizer, partial(triangle, total=total, warmup=h.warmup))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def parameter_groups(self) -> list[dict]:
        """Parameters by how they are trained: by Muon, by SGD with and without weight decay."""
        h, net = self.hparams, self.net
        inner = [layer[0].weight for layer in list(net.children())[1:-1]] if h.muon_lr else []
        rest = [p for p in net.parameters() if p.requires_grad and not any(p is q for q in inner)]
        decayed = [p for p in rest if h.decay_norms or p.ndim > 1]
        plain = [p for p in rest if not h.decay_norms and p.ndim == 1]
        groups = [
            {"params": decayed, "weight_decay": h.weight_decay},
            {"params": plain},
            {"params": inner, "lr": h.muon_lr, "momentum": h.muon_momentum, "muon": True},
        ]
        return [group for group in groups if group["params"]]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalized pictures (B, 3, H, W)."""
        return self.net(images.to(self.dtype))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch of normalized pictures (B, 3, H, W) and labels (B,)."""
        images, labels = batch
        smoothing = self.hparams.label_smoothing
        losses = cross_entropy(self(images), labels, label_smoothing=smoothing, reduction="none")
        self.train_loss.update(losses.detach())
        self.rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        return losses.mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Count a batch in; the logits (B, num_classes) go to the callbacks."""
        images, labels = batch
        logits = self(images).float()
        self.split_figures["loss"].update(cross_entropy(logits, labels, reduction="none"))
        self.split_figures["acc"].update(logits, labels)
        self.split_figures["top5"].update(logits, labels)
        self.split_figures["n"].update(len(labels))
        if self.trainer.testing and self.hparams.flip_test:
            self.acc_flip.update(logits + self(images.flip(3)).float(), labels)
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the whole split; in training, beside the epoch's loss and rate.

        One row an epoch, written before the checkpoint that stands for it.
        """
        stage = "test" if self.trainer.testing else "val"
        self.log_dict({f"{stage}/{name}": metric for name, metric in self.split_figures.items()})
        if stage == "test" and self.hparams.flip_test:
            self.log("test/acc_flip", self.acc_flip)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.log("train/loss", self.train_loss)
            self.log("lr", self.rate)  # of the epoch's last step; the schedule has moved on

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
