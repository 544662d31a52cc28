"""The one place where the parts meet: LightningCLI for fit, validate and test."""

import argparse
import contextlib
import ctypes
import difflib
import errno
import json
import logging
import os
import random
import re
import signal
import sys
import threading
import warnings
from pathlib import Path

import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from allconv import callbacks, runs
from allconv.data import CIFAR100, DataError, normalize
from allconv.task import Classifier

USER_ERRORS = (DataError, runs.CheckpointError, callbacks.DivergedError)
print_thread_error = threading.excepthook
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# may be others when a run goes on, without a word
FREE = {
    *("config", "recipe", "ckpt_path", "init", "data.data_dir"),
    *("trainer.max_steps", "trainer.max_time"),
    *("trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.limit_test_batches"),
    *("trainer.log_every_n_steps", "trainer.profiler", "trainer.fast_dev_run"),
}


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


def check_yaml(path: Path) -> None:
    """Raise ValueError if a file is no YAML mapping; the parser would not say which file it was."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a YAML file that can be read ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(content).__name__}")


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
        """Add --init and --recipe; to every command, since all of them read a run's config.yaml."""
        parser.add_argument(
            "--init", type=str | None, default=None, help="Weights to start from (fit only)."
        )
        parser.add_argument(
            "--recipe",
            type=str | None,
            default=None,
            help="What `runs` calls the run (default: the names of the --config files).",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args) -> None:
        """Parse once to learn the checkpoint, and again with its run's configuration beneath."""
        args = sys.argv[1:] if args is None else args
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("-c", "--config", action="append", nargs="?", default=[])
        files = [Path(name) for name in finder.parse_known_args(args)[0].config if name]
        try:
            for path in files:
                check_yaml(path)
        except ValueError as error:
            fail(2, f"--config {error}")
        first = [arg for arg in args if not arg.startswith("--print_config")]
        self.config = parser.parse_args(first)
        command = self.config.subcommand
        config = self._checked(command)
        name = config.ckpt_path or (None if command == "fit" else "best")
        if name and config.init:
            fail(2, "--init starts a new run and --ckpt_path takes one up: give one of them")
        if name:
            self.checkpoint = runs.load(runs.find_checkpoint(str(name), self._logs(config)))
            self._put_beneath(self._subcommand_parsers[command], command)
        if name or len(first) < len(args):
            self.config = parser.parse_args(args)
            config = self._checked(command)
        for key, value in (self.checkpoint.hparams if name else {}).items():
            if key != "compile" and json.dumps(config.model[key]) != json.dumps(value):
                raise runs.CheckpointError(
                    f"model.{key} is {config.model[key]}, but {self.checkpoint.path} was made "
                    f"with {value}: leave the flag out, or train anew (--init takes weights)"
                )
        config.recipe = config.recipe or "+".join(path.stem for path in files) or None
        seed = config.seed_everything
        if isinstance(seed, bool):
            # a random seed, but one that is written down, and the same in all processes
            other = "LOCAL_RANK" in os.environ
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if other else random.getrandbits(32)
            config.seed_everything = seed
        if not 0 <= seed < 2**32:
            fail(2, f"seed_everything is {seed}: it must be from 0 to {2**32 - 1}")

    def _checked(self, command: str):
        """The command's configuration, with keys and values where the parser lets a scalar pass."""
        config = self.config[command]
        for group in ("trainer", "model", "data"):
            if not isinstance(config[group], Namespace):
                fail(2, f"{group} is {config[group]}: expected keys and values")
        return config

    def _put_beneath(self, parser: LightningArgumentParser, command: str) -> None:
        """Make the checkpoint's hyperparameters and its run's config.yaml the lowest layers."""
        checkpoint = self.checkpoint
        if checkpoint.bare and command == "fit":
            raise runs.CheckpointError(
                f"{checkpoint.path}: weights alone cannot be resumed; use --init"
            )
        parser.set_defaults({f"model.{key}": value for key, value in checkpoint.hparams.items()})
        if checkpoint.run:
            path = checkpoint.run / "config.yaml"
            try:
                check_yaml(path)
            except ValueError as error:
                raise runs.CheckpointError(str(error)) from None
            parser.default_config_files = [str(path)]

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
        wanted = self._get(self.config_init, "trainer").enable_progress_bar is not False
        bar = sys.stdout.isatty() and wanted
        always = [RichProgressBar()] if bar else []
        if self.subcommand != "fit":
            self.save_config_callback = None
            kwargs["logger"] = False
            always.append(callbacks.Predictions(self.checkpoint))
        else:
            always += [
                callbacks.NetSummary(max_depth=2),
                callbacks.EpochSeed(),
                callbacks.WholeEpochs(),
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
        if self.checkpoint:  # Lightning loads them again; what is wrong shows before the run begins
            runs.put_weights(self.checkpoint, self.model.net)
        elif config.init:
            path = runs.find_checkpoint(config.init, self._logs(config), "init")
            runs.put_weights(runs.load(path), self.model.net)
        done, epochs = self.checkpoint and self.checkpoint.epoch, self.trainer.max_epochs
        if done and 0 <= epochs <= done:
            fail(2, f"{done} epochs are done; for more, --trainer.max_epochs above {done}")
        scheduled = config.model.warmup is not None or config.data.sizes  # over max_epochs
        if epochs < 0 and scheduled:
            fail(2, "model.warmup and data.sizes are shares of trainer.max_epochs: give a number")
        if self.checkpoint and self.checkpoint.run and self.trainer.is_global_zero:
            self._say_what_changed(FREE if scheduled else {*FREE, "trainer.max_epochs"})
        if self.trainer.fast_dev_run:
            return
        run, step = Path(runs.LOGS, "version_0"), None  # the other processes write nothing
        if self.trainer.is_global_zero:
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
            resumed = self.checkpoint and self.checkpoint.run
            if not (self.checkpoint or config.init):  # the other processes get rank 0's weights
                self.model.whiten(normalize(self.datamodule.sets["train"].images[::10]))
            run = resumed or runs.claim(self._logs(config))
            step = self.checkpoint and self.checkpoint.step
        self.trainer.loggers = runs.loggers(run, step)

    def _say_what_changed(self, free: set[str]) -> None:
        """Name each key, but for free ones, that is not as in the config.yaml of the run."""
        before = self._subcommand_parsers["fit"].get_defaults()
        changes = ", ".join(
            f"{key} from {before.get(key)} to {value}"
            for key, value in self.config.fit.items()
            if key not in free and value != before.get(key)
        )
        if changes:
            print(f"changed: {changes}; it is no longer bitwise the run that began", flush=True)

    def fit(self, ckpt_path=None, **kwargs) -> None:
        """Train, or go on training exactly where the checkpoint stands."""
        path = self.checkpoint and self.checkpoint.path
        # Lightning's own handler lets the batch end first
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._run(self.trainer.fit, ckpt_path=path, **kwargs)

    def _run(self, method, **kwargs) -> None:
        """Run a method of the trainer; Lightning ends with 1 after Ctrl-C and 0 after SIGTERM."""
        try:
            method(weights_only=True, **kwargs)
        except SystemExit:
            if self.trainer.received_sigterm:
                sys.exit(143)
            if self.trainer.interrupted:
                sys.exit(130)
            raise

    def validate(self, **kwargs) -> None:
        """Evaluate on the validation pictures."""
        self._evaluate("validate", **kwargs)

    def test(self, **kwargs) -> None:
        """Evaluate on the test pictures."""
        self._evaluate("test", **kwargs)

    def _evaluate(self, command: str, ckpt_path=None, **kwargs) -> None:
        runs.put_weights(self.checkpoint, self.model.net)
        evaluate = getattr(self.trainer, command)
        if (
            self.checkpoint.bare and self.checkpoint.facts
        ):  # a run's Lightning tells the data itself
            self.datamodule.prepare_data()
            self.datamodule.setup(command)
            self.datamodule.compare(self.checkpoint.facts)
        path = None if self.checkpoint.bare else self.checkpoint.path
        self._run(evaluate, ckpt_path=path, verbose=False, **kwargs)


def _quieten() -> None:
    """Leave out what Lightning says and Progress says better, and warnings that are no news."""
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # says which process failed before it ends the others
    launcher = "lightning.fabric.strategies.launchers.subprocess_script"
    logging.getLogger(launcher).setLevel(logging.INFO)
    for message in (
        "Experiment logs directory .* exists",  # the run's folder; runs.loggers keeps its rows
        "Checkpoint directory .* exists",  # of a run that goes on
        "`ModelCheckpoint.* could not find the monitored key",  # no validation, no best
        "Precision .* is not supported by the model summary",  # its size in MB, no more
        "The dirpath has changed",  # evaluating from where the run was not started
        ".*LeafSpec",  # between Lightning and torch
        "Be aware that when using `ckpt_path`",  # evaluating needs no ModelCheckpoint
        ".*smaller than the logging interval",  # one row an epoch, whatever the interval
        "The '.*_dataloader' does not have many workers",  # none are needed: one index a batch
    ):
        warnings.filterwarnings("ignore", message)


def prepare() -> None:
    """What every command does first: less noise, and memory that is kept when it is freed.

    By itself glibc gets each tensor from 32 MiB on anew from the system: 98,000 page faults a
    training step (width 64, batch 128, 2 cores). Without, 1.24 times its speed, and 3 times that of
    an evaluation in batches of 500.
    """
    _quieten()
    # TensorBoard's thread hands a disk's error on to the next call, and prints it as well
    threading.excepthook = lambda thread: thread.exc_type is OSError or print_thread_error(thread)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no giving back


@contextlib.contextmanager
def command(*failures: type[Exception], usage: type[Exception] | tuple = ValueError):
    """What a command runs in: what the user can mend becomes one line; the rest, a traceback.

    Args:
        failures: errors of this command alone that end it with exit code 1.
        usage: errors that end it with 2.
    """
    prepare()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
        sys.stdout.flush()
    except (*USER_ERRORS, *failures) as error:
        fail(1, error)
    except usage as error:
        fail(2, error)
    except BrokenPipeError:  # the reader, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, ValueError) as error:
        cause = error.__cause__ or error  # Lightning's logger makes any error a ValueError
        if getattr(cause, "filename", None):
            fail(1, f"{cause.filename}: {cause.strerror}")
        if getattr(cause, "errno", None) in DISK_ERRORS:
            fail(1, f"{cause.strerror}: make room; a run goes on with fit --ckpt_path last")
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def main(args: list[str] | None = None) -> None:
    """Run fit, validate or test."""
    with command(usage=MisconfigurationException):  # Lightning's word for what it cannot do
        CLI(args)
