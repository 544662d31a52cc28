"""Callbacks that draw figures: curves, predictions, the confusion matrix."""

import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from allconv import plots
from allconv.rundir import read_metrics, write_atomic
from allconv.training.progress import run_directory


class Curves(Callback):
    """Draws `curves.png` in the run directory after the epochs, so that a stopped run has it.

    After the epoch's checkpoint, which a Ctrl-C during the drawing would lose. Short epochs share
    a drawing, so that at most a twentieth of the time is spent on it.
    """

    def __init__(self):
        self.due = 0.0  # when to draw again, by time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, if a drawing is due; always before the first epoch that is resumed."""
        start = time.monotonic()
        if start >= self.due:
            self.on_train_end(trainer, pl_module)
            self.due = start + 20 * (time.monotonic() - start)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the metrics of the whole run."""
        run = run_directory(trainer)
        if not (rows := read_metrics(run)):
            return
        title = f"AllCNN, width {pl_module.net.width}, on {trainer.datamodule.dataset.title}"
        save(plots.curves(rows, title), run / "curves.png", 100)


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as a PNG file, atomically."""
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


class Predictions(Callback):
    """Draws images with their predictions, and the confusion matrix.

    In training they go to TensorBoard, every ten epochs and after the last one.

    Args:
        base: the files of an evaluation, see `allconv.evaluation.place`; None in training.
    """

    def __init__(self, base: Path | None = None):
        self.base = base
        self.figures: dict[str, Figure] = {}  # of an evaluation, by the end of their name

    def save(self) -> None:
        """Write the figures of an evaluation."""
        for end, figure in self.figures.items():
            save(figure, self.base.with_name(f"{self.base.name}{end}.png"), 120)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset what is collected."""
        self.logits: list[Tensor] = []
        matrix = MulticlassConfusionMatrix(pl_module.net.num_classes, validate_args=False)
        self.matrix = matrix.to(pl_module.device)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_) -> None:
        """Collect the logits (B, classes) of a batch."""
        self.logits.append(outputs)
        self.matrix.update(outputs, batch[1])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, if this epoch is due."""
        epoch = trainer.current_epoch + 1
        if self.base:
            self._draw(trainer, "val", "validate")
        elif (epoch % 10 == 0 or epoch == trainer.max_epochs) and not trainer.sanity_checking:
            self._draw(trainer, "val", f"validation, epoch {epoch}")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figures of a test."""
        self._draw(trainer, "test", "test")

    def _draw(self, trainer: Trainer, split: str, what: str) -> None:
        matrix = self.matrix.compute().cpu()  # summed over all processes
        data, right, n = trainer.datamodule, matrix.trace().item(), matrix.sum().item()
        part = n < len(data.sets[split])  # an evaluation of a part is not written
        if not trainer.is_global_zero or (self.base and part):
            return
        logits = torch.cat(self.logits).cpu()
        # TensorBoard shows a figure 400 pixels wide: fewer images
        count, columns = (10, 5) if self.base else (6, 3)
        index = plots.sample(len(logits))[:count]
        loader = trainer.val_dataloaders if split == "val" else trainer.test_dataloaders
        # this process's part; with overfit_batches, Lightning replaces the sampler
        place = torch.tensor(list(loader.sampler))[index]
        images, labels = data.sets[split].images[place], data.sets[split].labels[place]
        title = f"{data.dataset.title}, {what}: {100 * right / n:.1f} % of {n:,} images correct"
        names, groups = data.dataset.classes, data.dataset.superclasses
        sheet = plots.predictions(images, labels, logits[index], names, title, columns)
        inches = 10 if self.base else 6  # labels that can be read at 350 pixels
        confusion = plots.confusion(matrix, names, groups, title, inches)
        if self.base:  # written after the results are printed
            self.figures = {"": sheet, "_confusion": confusion}
        else:
            board, step = trainer.loggers[0].experiment, trainer.global_step - 1
            board.add_figure("predictions", sheet, step)
            board.add_figure("confusion", confusion, step)
