"""The training task: AllCNN with cross-entropy, SGD and a schedule.

The defaults are what the notebook meant: SGD with momentum 0.9 and weight decay 2e-5, learning
rate 0.1, halved every 20 of 100 epochs. Figures are counted over whole splits with torchmetrics.
"""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import MultiStepLR
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from allconv.model import AllCNN


class Classifier(LightningModule):
    """AllCNN with its loss, optimizer, schedule and metrics.

    Args:
        lr: learning rate at the start.
        momentum: momentum of SGD.
        weight_decay: L2 penalty on every parameter.
        milestones: epochs after which the learning rate is multiplied by gamma.
        gamma: factor of the learning rate at each milestone.
        compile: compile the net with torch.compile (pays on a GPU; nothing gained on a CPU).
        **net: arguments of AllCNN.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 2e-5,
        milestones: tuple[int, ...] = (20, 40, 60, 80),
        gamma: float = 0.5,
        compile: bool = False,
        **net,
    ):
        super().__init__()
        if lr <= 0:
            raise ValueError(f"model.lr is {lr}: it must be above 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"model.momentum is {momentum}: it must be at least 0 and below 1")
        if weight_decay < 0:
            raise ValueError(f"model.weight_decay is {weight_decay}: it must be at least 0")
        if gamma <= 0:
            raise ValueError(f"model.gamma is {gamma}: it must be above 0")
        self.save_hyperparameters(logger=False)
        self.net = AllCNN(**net).to(memory_format=torch.channels_last)
        num_classes = self.net.conv9[0].out_channels
        self.example_input_array = torch.zeros(1, 3, 32, 32)  # the summary's shapes and FLOPs
        # nan_strategy: a loss that is not a number has to show as one
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

    def configure_model(self) -> None:
        """Compile in place, so that the names in the checkpoint stay as they are."""
        if self.hparams.compile:
            self.net.compile()

    def configure_optimizers(self):
        """SGD, and a MultiStepLR that counts steps.

        Stepped once a batch and not once an epoch: Lightning saves checkpoints before it steps
        the epoch's scheduler, and a resumed run would keep the old rate for one epoch more.
        """
        h = self.hparams
        optimizer = torch.optim.SGD(
            self.parameters(), h.lr, h.momentum, weight_decay=h.weight_decay, fused=True
        )
        self.trainer.fit_loop.setup_data()  # until then Lightning does not know the number below
        steps = self.trainer.num_training_batches // self.trainer.accumulate_grad_batches
        milestones = [epoch * steps for epoch in h.milestones]
        schedule = MultiStepLR(optimizer, milestones, h.gamma)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalized pictures (B, 3, H, W)."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch of normalized pictures (B, 3, H, W) and labels (B,)."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.train_loss.update(loss.detach(), len(labels))
        self.rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Count a batch in; the logits (B, num_classes) go to the callbacks."""
        images, labels = batch
        logits = self(images).float()
        self.split_figures["loss"].update(cross_entropy(logits, labels), len(labels))
        self.split_figures["acc"].update(logits, labels)
        self.split_figures["top5"].update(logits, labels)
        self.split_figures["n"].update(len(labels))
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the whole split; in training, beside the epoch's loss and rate.

        One row an epoch, written before the checkpoint that stands for it.
        """
        stage = "test" if self.trainer.testing else "val"
        self.log_dict({f"{stage}/{name}": metric for name, metric in self.split_figures.items()})
        if self.trainer.state.fn == "fit":
            self.log("train/loss", self.train_loss)
            self.log("lr", self.rate)  # of the epoch's last step; the schedule has moved on

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
