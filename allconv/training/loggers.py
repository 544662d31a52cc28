"""Loggers of a run directory: TensorBoard events, metrics.csv, config.yaml."""

import csv
import io
from enum import Enum
from pathlib import Path

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from allconv.rundir import best_row, read_rows, write_text
from allconv.training.progress import run_directory

# a default of Lightning's Timer, for one, is an enumeration member
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, e: dumper.represent_data(e.value))


def loggers(run: Path, step: int) -> list[Logger]:
    """TensorBoard and metrics.csv.

    Args:
        run: the run directory.
        step: the step that a resumed run starts from, else 0; later rows and events are dropped.
            Not those of the step itself: a callback may log at the end of an epoch with it.
    """
    place = {"save_dir": run.parent.parent, "name": run.parent.name, "version": run.name}
    purge = {"purge_step": step + 1 if step else 0}
    return [Board(**place, default_hp_metric=False, **purge), Table(run, step)]


class Board(TensorBoardLogger):
    """TensorBoard without a chart of the epoch number; hyperparameters come with the results."""

    @rank_zero_only
    def log_hyperparams(self, params: dict, metrics: dict | None = None, **kwargs) -> None:
        """Log them at the end of a run, not when Lightning does, before it."""
        if metrics:
            super().log_hyperparams(params, metrics, **kwargs)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log all metrics but the epoch."""
        super().log_metrics({k: v for k, v in metrics.items() if k != "epoch"}, step)


class Table(Logger):
    """metrics.csv: a row for each step that logged anything; written atomically.

    Lightning's CSVLogger deletes the table when a run is resumed, and writes it in place.
    """

    name, version = "metrics.csv", None

    def __init__(self, run: Path, step: int):
        super().__init__()
        self.run = run
        rows = read_rows(run) if step else []
        self.written = not step  # whether the file holds these rows
        self.rows = {int(row["step"]): row for row in rows if int(row["step"]) <= step}

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: they are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of a step, and write the file if it is that of an epoch's end."""
        step = max(self.rows, default=0) if step is None else step
        row = self.rows.setdefault(step, {"step": step})
        row.update(metrics)
        if not row.keys().isdisjoint({"train/loss", "val/acc"}):
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write the file."""
        columns = sorted({key for row in self.rows.values() for key in row})
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows.values())
        write_text(self.run / "metrics.csv", text.getvalue())
        self.written = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left, unless a resumed run was broken off before its first epoch's end.

        If it was resumed from an older checkpoint, the later rows are still in the file.
        """
        if self.rows and (status == "success" or self.written):
            self.write()


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml in the run directory; shows it and the results in TensorBoard."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration as a file and as text, and put both losses on one chart."""
        text = self.parser.dump(self.config, skip_none=False)
        # jsonargparse puts this before the text of, for example, a torch.device
        text = text.replace("Unable to serialize instance ", "")
        # `runs` reads it; Lightning's logger writes an hparams.yaml of its own if there is none
        changed = self.parser.dump(self.config, skip_default=True)
        for name, content in (("config.yaml", text), ("hparams.yaml", changed)):
            path = run_directory(trainer) / name
            if not path.is_file() or path.read_text("utf-8") != content:
                write_text(path, content)
        board = trainer.loggers[0].experiment
        for logger in trainer.loggers[2:]:  # the user's
            logger.log_hyperparams(yaml.safe_load(text))
        board.add_text("configuration", "\n".join("    " + line for line in text.splitlines()))
        # TensorBoard takes regular expressions: train/loss alone would match train/loss_step
        chart = ["Multiline", ["^train/loss$", "^val/loss$"]]
        board.add_custom_scalars({"loss": {"training and validation": chart}})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a resumed run whose start fails is left as it was."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the configuration, with what a BatchSizeFinder or LearningRateFinder has found."""
        self.config["data.batch_size"] = trainer.datamodule.hparams.batch_size
        self.config["model.lr"] = pl_module.hparams.lr
        self.save_config(trainer, pl_module, "fit")

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the hyperparameters with the results of the best epoch."""
        if best := best_row(run_directory(trainer)):
            always, groups = ("seed_everything", "trainer.max_epochs"), ("model.", "data.")
            # changed settings only: TensorBoard sorts by name and shows the first five
            settings = {
                key: self.config[key]
                for key, default in self.parser.get_defaults().items()
                if key in always or (key.startswith(groups) and self.config[key] != default)
            }
            settings.pop("data.data_dir", None)
            results = {"val/best_acc": best["val/acc"], "val/best_loss": best["val/loss"]}
            trainer.loggers[0].log_hyperparams(settings, results)
