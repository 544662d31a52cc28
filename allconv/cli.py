"""The one place where the parts meet: LightningCLI for fit, validate and test."""

import argparse
import difflib
import json
import logging
import re
import sys
import warnings
from pathlib import Path

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from allconv import callbacks, runs
from allconv.data import CIFAR100, DataError, normalize
from allconv.task import Classifier

USER_ERRORS = (DataError, runs.CheckpointError, callbacks.DivergedError)


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with errors of one line that name the nearest right key."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)  # keys are exact

    def error(self, message: str, ex: Exception | None = None):
        """Print one line and exit with 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        line = " ".join(message.split())
        keys = {key for a in parser._actions for key in (a.dest, *a.option_strings)}
        unknown = any(word in line for word in ("nrecognized", "not expected", "not accept"))
        for word in unknown * re.findall(r"--[\w.]+|[\"'][\w.]+[\"']", line):
            word = word.strip("\"'")
            if word in keys:
                continue
            near = difflib.get_close_matches(word, keys, 1)
            if near:
                line += f"; did you mean {near[0]}?"
                break
        fail(2, line)


def check_configs(args: list[str]) -> None:
    """Refuse a --config that is no YAML mapping; the parser would not say which file it was."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("-c", "--config", action="append", default=[])
    for name in finder.parse_known_args(args)[0].config:
        try:
            content = yaml.safe_load(Path(name).read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            fail(2, f"--config {name}: not a YAML file that can be read ({error})")
        if not isinstance(content, dict):
            fail(2, f"--config {name}: expected keys and values, found {type(content).__name__}")


def fail(code: int, message: object):
    """Print one line on the error stream and exit."""
    print("allconv:", " ".join(str(message).split()), file=sys.stderr, flush=True)
    sys.exit(code)


class CLI(LightningCLI):
    """fit, validate and test, each with its run folder and checkpoint found.

    `--ckpt_path` is resolved here (Lightning would test random weights without one), and the
    configuration of the checkpoint's run becomes the lowest layer: flags and files win over it.
    """

    checkpoint: runs.Checkpoint | None = None

    def __init__(self, args: list[str] | None):
        super().__init__(
            Classifier,
            CIFAR100,
            args=args,
            parser_class=Parser,
            seed_everything_default=43,  # the notebook's
            save_config_callback=callbacks.SaveConfig,
            save_config_kwargs={"overwrite": True},  # a resumed run keeps its folder
            trainer_defaults={
                "max_epochs": 100,
                "num_sanity_val_steps": 0,
                # the samplers of allconv.data share the pictures out without padding
                "use_distributed_sampler": False,
            },
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer methods that are commands, each with its arguments that are not flags."""
        skip = {"model", "dataloaders", "datamodule", "weights_only", "verbose"}
        return {
            "fit": {*skip, "train_dataloaders", "val_dataloaders"},
            "validate": skip,
            "test": skip,
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add --init; to every command, since a run's config.yaml is read by all of them."""
        parser.add_argument(
            "--init", type=str | None, default=None, help="Weights to start from (fit only)."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args) -> None:
        """Parse once to learn the checkpoint, and again with its run's configuration beneath."""
        check_configs(sys.argv[1:] if args is None else args)
        self.config = parser.parse_args(args)
        command = self.config.subcommand
        config = self.config[command]
        name = config.ckpt_path or (None if command == "fit" else "best")
        if name:
            self.checkpoint = runs.load(runs.find_checkpoint(str(name), self._logs(config)))
            if self.checkpoint.bare and command == "fit":
                raise runs.CheckpointError(
                    f"{self.checkpoint.path}: weights alone cannot be resumed; use --init"
                )
            hparams = self.checkpoint.hparams
            lowest = self._subcommand_parsers[command]
            lowest.set_defaults({f"model.{key}": value for key, value in hparams.items()})
            if self.checkpoint.run:
                lowest.default_config_files = [str(self.checkpoint.run / "config.yaml")]
            self.config = parser.parse_args(args)
            config = self.config[command]
            for key, value in hparams.items():
                if key != "compile" and json.dumps(config.model[key]) != json.dumps(value):
                    raise runs.CheckpointError(
                        f"model.{key} is {config.model[key]}, but {self.checkpoint.path} was made "
                        f"with {value}: leave the flag out, or train anew (--init takes weights)"
                    )
        if config.seed_everything is False:
            config.seed_everything = True  # a random seed, but one that is written down

    def _parse_ckpt_path(self) -> None:
        """Nothing: parse_arguments compares the hyperparameters; here they would silently win."""

    @staticmethod
    def _logs(config) -> Path:
        return Path(config.trainer.default_root_dir or ".") / runs.LOGS

    def instantiate_classes(self) -> None:
        """Make the model, the data and the trainer; what they refuse is a usage error."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            fail(2, error)

    def instantiate_trainer(self, **kwargs):
        """Add what belongs to the command; without a terminal, lines instead of a bar."""
        bar = sys.stdout.isatty() and self._get(self.config_init, "trainer").enable_progress_bar
        always = [RichProgressBar()] if bar else []
        if self.subcommand != "fit":
            self.save_config_callback = None
            kwargs["logger"] = False
            always.append(callbacks.Predictions(self.checkpoint))
        else:
            always += [
                callbacks.NetSummary(max_depth=2),
                callbacks.EpochSeed(),
                callbacks.StopWhenDiverged(),
                callbacks.Progress(bar),
            ]
            plugins = self._get(self.config_init, "trainer").plugins or []
            plugins = plugins if isinstance(plugins, list) else [plugins]
            kwargs["plugins"] = [*plugins, runs.DurableCheckpointIO()]
            if not self.config_init.fit.trainer.fast_dev_run:
                best = ModelCheckpoint(
                    monitor="val/acc", mode="max", filename="best", enable_version_counter=False
                )
                always += [callbacks.Curves(), callbacks.Predictions(), best]
                always.append(callbacks.LastCheckpoint())
        self.trainer_defaults["callbacks"] = always
        return super().instantiate_trainer(
            enable_progress_bar=bar, enable_model_summary=False, **kwargs
        )

    def before_fit(self) -> None:
        """Read the data, then make or find the run folder: what fails leaves no empty folder."""
        config = self.config.fit
        config.ckpt_path = None  # of this call, not of the run: config.yaml is the lowest layer
        if config.init:
            self._load_weights(runs.load(runs.find_checkpoint(config.init, self._logs(config))))
        done, epochs = self.checkpoint and self.checkpoint.epoch, self.trainer.max_epochs
        if done and 0 <= epochs <= done:
            fail(2, f"{done} epochs are done; for more, --trainer.max_epochs above {done}")
        if self.trainer.fast_dev_run:
            return
        run = Path(runs.LOGS, "version_0")
        if self.trainer.is_global_zero:
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
            resumed = self.checkpoint and self.checkpoint.run
            if not (self.checkpoint or config.init):  # the other processes get rank 0's weights
                self.model.whiten(normalize(self.datamodule.sets["train"].images[::10]))
            run = resumed or runs.claim(self._logs(config))
        self.trainer.loggers = runs.loggers(run, self.checkpoint and self.checkpoint.step)

    def fit(self, ckpt_path=None, **kwargs) -> None:
        """Train, or go on training exactly where the checkpoint stands."""
        path = self.checkpoint and self.checkpoint.path
        try:
            self.trainer.fit(ckpt_path=path, weights_only=True, **kwargs)
        except SystemExit:  # Lightning ends with 1 after Ctrl-C and with 0 after SIGTERM
            if self.trainer.received_sigterm:
                sys.exit(143)
            if self.trainer.interrupted:
                sys.exit(130)
            raise

    def validate(self, **kwargs) -> None:
        """Evaluate on the validation pictures."""
        self._evaluate(self.trainer.validate, **kwargs)

    def test(self, **kwargs) -> None:
        """Evaluate on the test pictures."""
        self._evaluate(self.trainer.test, **kwargs)

    def _evaluate(self, evaluate, ckpt_path=None, **kwargs) -> None:
        path = self.checkpoint.path
        if self.checkpoint.bare:
            self._load_weights(self.checkpoint)
            path = None
        evaluate(ckpt_path=path, weights_only=True, verbose=False, **kwargs)

    def _load_weights(self, checkpoint: runs.Checkpoint) -> None:
        """Put a checkpoint's weights into the net.

        Raises:
            CheckpointError: they are of another net.
        """
        try:
            self.model.net.load_state_dict(checkpoint.weights)
        except RuntimeError as error:
            raise runs.CheckpointError(f"{checkpoint.path}: {error}") from None


def _quieten() -> None:
    """Leave out what Lightning says and Progress says better, and warnings that are no news."""
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Experiment logs directory .* exists",  # the run's folder; runs.loggers keeps its rows
        "Checkpoint directory .* exists",  # of a run that goes on
        "The dirpath has changed",  # evaluating from where the run was not started
        ".*LeafSpec",  # between Lightning and torch
        "Be aware that when using `ckpt_path`",  # evaluating needs no ModelCheckpoint
        ".*smaller than the logging interval",  # one row an epoch, whatever the interval
        "The '.*_dataloader' does not have many workers",  # none are needed: one index a batch
    ):
        warnings.filterwarnings("ignore", message)


def main(args: list[str] | None = None) -> None:
    """Run a command; what the user can mend becomes one line, everything else a traceback."""
    _quieten()
    try:
        CLI(args)
    except USER_ERRORS as error:
        fail(1, error)
    except MisconfigurationException as error:  # Lightning's word for what it is asked in vain
        fail(2, error)
