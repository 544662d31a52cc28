"""What a run logs into its directory: TensorBoard's events, metrics.csv, config.yaml."""

import csv
import io
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from allconv.progress import run_directory
from allconv.rundir import best_row, read_rows, write_text


def loggers(run: Path, resume_step: int | None) -> list[Logger]:
    """TensorBoard and metrics.csv.

    Args:
        run: the run directory.
        resume_step: steps taken when a resumed run goes on; what was logged later is dropped.
    """
    purge = {} if resume_step is None else {"purge_step": resume_step}
    place = {"save_dir": run.parent.parent, "name": run.parent.name, "version": run.name}
    return [Board(**place, default_hp_metric=False, **purge), Table(run, resume_step)]


class Board(TensorBoardLogger):
    """TensorBoard without a chart of the epoch's number."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log all metrics but the epoch."""
        super().log_metrics({k: v for k, v in metrics.items() if k != "epoch"}, step)


class Table(Logger):
    """metrics.csv: a row a step that logged, whatever was logged; always a whole file.

    Lightning's CSVLogger deletes the table when a run is resumed, and writes it in place.
    """

    def __init__(self, run: Path, resume_step: int | None):
        super().__init__()
        self.run, self.due = run, False
        rows = [] if resume_step is None else read_rows(run)
        self.rows = {int(row["step"]): row for row in rows if int(row["step"]) < resume_step}

    @property
    def name(self) -> str:
        """The folder of the runs."""
        return self.run.parent.name

    @property
    def version(self) -> str:
        """The run directory's name."""
        return self.run.name

    def log_hyperparams(self, *args, **kwargs) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Put values into the row of a step."""
        step = max(self.rows, default=0) if step is None else step
        self.rows.setdefault(step, {"step": step}).update(metrics)
        self.due = self.due or not metrics.keys().isdisjoint({"train/loss", "val/acc"})

    @rank_zero_only
    def save(self) -> None:
        """Write the file, if a metric of an epoch was logged since."""
        if not self.due:
            return
        columns = sorted({key for row in self.rows.values() for key in row})
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows.values())
        write_text(self.run / "metrics.csv", text.getvalue())
        self.due = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.due = bool(self.rows)
        self.save()


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml into the run directory, and shows it and the results in TensorBoard."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The configuration as a file and as text, and both losses on one chart."""
        run = run_directory(trainer)
        if not run:
            return
        path, text = run / "config.yaml", self.parser.dump(self.config, skip_none=False)
        if not path.is_file() or path.read_text("utf-8") != text:
            write_text(path, text)
        board = trainer.loggers[0].experiment
        board.add_text("configuration", "\n".join("    " + line for line in text.splitlines()))
        chart = ["Multiline", ["train/loss", "val/loss"]]
        board.add_custom_scalars({"loss": {"training and validation": chart}})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The hyperparameters with the results of the best epoch."""
        run = run_directory(trainer)
        best = best_row(run) if trainer.is_global_zero and run else None
        if best:
            config, defaults = self.config.as_dict(), self.parser.get_defaults()
            keys = [f"{group}.{key}" for group in ("model", "data") for key in config[group]]
            # TensorBoard sorts by name and shows the first five: changed settings only
            keys = [key for key in keys if self.config[key] != defaults[key]]
            keys += ["seed_everything", "trainer.max_epochs"]
            settings = {key: self.config[key] for key in keys if key != "data.data_dir"}
            results = {"val/best_acc": best["val/acc"], "val/best_loss": best["val/loss"]}
            trainer.loggers[0].log_hyperparams(settings, results)
