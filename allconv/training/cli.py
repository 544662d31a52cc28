"""LightningCLI for fit, validate and test: where all parts meet."""

import contextlib
import inspect
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from allconv import checkpoints, datasets, evaluation, rundir
from allconv.data import CIFAR100
from allconv.errors import OUTPUT_ERRORS, StoppedError, UsageError, UserError, say
from allconv.task import Classifier
from allconv.training import callbacks, figures, runtime, settings
from allconv.training.loggers import SaveConfig, loggers
from allconv.training.progress import Progress, resume_with, run_directory
from allconv.training.settings import as_list

# what Lightning and our own classes raise for invalid settings
FLAG_ERRORS = (ValueError, TypeError, MisconfigurationException, ImportError)


class CLI(LightningCLI):
    """fit, validate and test, with their run directories and checkpoints.

    `--ckpt_path` is resolved here, since Lightning would test random weights without one. The
    configuration of the checkpoint's run comes before the arguments, which override it.
    """

    checkpoint: checkpoints.Checkpoint | None = None
    run_wanted = False  # whether the command has a run directory
    created: Path | None = None  # the one it made

    def __init__(self, args: list[str] | None, held: contextlib.ExitStack):
        self.held = held  # holds the lock of the run directory until the command ends
        super().__init__(
            Classifier,
            CIFAR100,
            args=args,
            parser_class=settings.Parser,
            parser_kwargs={"prog": "allconv"},
            seed_everything_default=43,  # the notebook's
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={
                "max_epochs": 100,
                "num_sanity_val_steps": 0,
                # allconv.data has its own samplers, which do not pad
                "use_distributed_sampler": False,
            },
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer methods that are commands, each with the arguments that are not flags."""
        table, own = LightningCLI.subcommands(), {"ckpt_path", "weights_only", "verbose"}
        return {k: table[k] | own for k in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own flags; to every command, since all of them read a run's config.yaml."""
        for name, text in (
            ("ckpt_path", "best, last (of the newest run), pretrained, a file or a run directory."),
            ("init", "Weights to start from (fit only); as ckpt_path."),
            ("recipe", "What `runs` calls the run (default: the names of the --config files)."),
        ):
            parser.add_argument(f"--{name}", type=str | None, default=None, help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args) -> None:
        """Find the checkpoint, put its run's configuration first, and parse."""
        command, *rest = sys.argv[1:] if args is None else args
        if {"-h", "--help"} & set(rest):
            parser.parse_args([command, "--help"])
        named, files, rest = settings.early(rest)
        root = str(named.get("trainer.default_root_dir") or ".")
        self.logs = Path(os.path.expanduser(root), rundir.LOGS)
        name = named.get("ckpt_path")
        name = "best" if name is None and command != "fit" else name
        if name is not None:
            if any(flag.startswith("--init=") for flag in rest):  # a recipe may have one
                raise UsageError("--init starts a new run and --ckpt_path resumes one: pass one")
            path = checkpoints.find(name, self.logs, inside="last" if command == "fit" else "best")
            self.checkpoint = checkpoints.load(path, resume=command == "fit")
            self.before = settings.run_settings(self.checkpoint, f"{named} {rest}", command)
            rest = [f"--config={json.dumps(self.before, default=str)}", *rest]
        self.config = parser.parse_args([command, *rest])
        config = self.config[command]
        settings.check(config, self.checkpoint, resumed=self.checkpoint and command == "fit")
        told = self.checkpoint or "model.num_classes" in named
        if config.data.folder is not None and not told:
            config.model.num_classes = len(datasets.choose(folder=config.data.folder).classes)
        config.recipe = config.recipe or "+".join(path.stem for path in files) or None
        settings.resolve(config, self.logs, command, resumed=bool(self.checkpoint))

    def instantiate_classes(self) -> None:
        """Instantiate model, data and trainer; what they raise is a usage error."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (*FLAG_ERRORS, RuntimeError) as error:  # RuntimeError: SLURM
            raise UsageError(error) from None
        data = self.datamodule.dataset
        names = self.checkpoint and self.checkpoint.data.get("classes")
        if names and (other := {*data.classes} - {*names}):
            raise UsageError(f"{self.checkpoint.path} has no class {min(other)} of {data.title}")

    def instantiate_trainer(self, **kwargs):
        """Add the command's callbacks and loggers, with a progress bar only at a terminal."""
        given, fit = self.config_init[self.subcommand].trainer, self.subcommand == "fit"
        own = as_list(given.callbacks)
        own_bar, wanted = _any(own, ProgressBar), given.enable_progress_bar is not False
        bar = sys.stdout.isatty() and wanted and not own_bar
        self.loggers = as_list(given.logger)
        kwargs |= {"logger": self.loggers or False, "enable_progress_bar": own_bar and wanted}
        if not fit:
            kwargs["enable_progress_bar"] = own_bar or bar
            base = evaluation.place(self.checkpoint, self.subcommand, self.datamodule.dataset)
            self.predictions = figures.Predictions(base)
            added = [self.predictions]
        elif given.barebones:
            added = [callbacks.EpochSeed(), callbacks.Limits()]
        else:
            added = [callbacks.EpochSeed(), callbacks.Limits(), callbacks.StepLoss(), Progress(bar)]
            if given.enable_model_summary is not False and not _any(own, ModelSummary):
                added.append(callbacks.NetSummary(max_depth=2))
            self.run_wanted = given.logger is not False and not given.fast_dev_run
            if self.run_wanted:
                added += [figures.Curves(), figures.Predictions()]
            if self.run_wanted and given.enable_checkpointing is not False:
                own.insert(0, callbacks.BestCheckpoint())  # what saves after it records its result
                added.append(callbacks.LastCheckpoint())
            if given.logger is False and not (given.enable_checkpointing or _any(own, Checkpoint)):
                kwargs["enable_checkpointing"] = False  # Lightning would save in the folder
            kwargs["plugins"] = callbacks.plugins(as_list(given.plugins))
        if not self.run_wanted:
            self.save_config_callback = None
        if given.max_time:  # by default it stops, validates and saves within an epoch
            added.append(Timer(given.max_time, interval="epoch"))
            kwargs["max_time"] = None
        return super().instantiate_trainer(callbacks=[*own, *added], **kwargs)

    def before_fit(self) -> None:
        """Read the data before creating the run directory, so a failure leaves no empty one."""
        config, trainer, begin, run, step = self.config.fit, self.trainer, self.checkpoint, None, 0
        done = begin and begin.epoch
        if config.init is not None and not begin:
            self._begin_with(checkpoints.load(checkpoints.find(config.init, self.logs, "init")))
        self.model.net.initialized = bool(begin or config.init)
        callbacks.check(trainer, self.model, self.datamodule, resumed=bool(begin))
        if done and 0 <= trainer.max_epochs <= done:
            raise UsageError(f"{done} epochs are done; set --trainer.max_epochs above {done}")
        if trainer.world_size > 1:  # Lightning's handler would wait for the other processes
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not self.run_wanted:
            return
        if trainer.is_global_zero:  # the other processes write nothing
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
            if begin:
                run, step = begin.run, begin.step
            if run and (changes := ", ".join(settings.changes(self.before, config))):
                print(f"changed: {changes}; this run will no longer match the original", flush=True)
            if why := begin and rundir.why_new_run(run, begin.path, step):
                say(f"{begin.path} is {why}: this is a new run from it")
            if why or not run:
                run = self.created = rundir.create(self.logs, begin and begin.path)
            self.held.enter_context(rundir.lock(run))
            now = begin and checkpoints.load(begin.path, resume=True)
            if now and now.step != step:
                raise rundir.RunError(f"{now.path}: another process has just resumed this run")
        trainer.loggers = [*loggers(run or Path(rundir.LOGS, "version_0"), step), *self.loggers]

    def _begin_with(self, initial: checkpoints.Checkpoint) -> None:
        """Load the weights of --init; if the classes differ, all but the last layer's."""
        net, path, weights = self.model.net, initial.path, initial.weights
        width, there = initial.hparams["width"], initial.hparams["num_classes"]
        if width != net.width:
            widths = f"made with width {width}, not {net.width}; --init null takes no weights"
            raise checkpoints.CheckpointError(f"{path}: {widths}")
        parts = "all weights"
        if there != net.num_classes:
            weights |= {k: v for k, v in net.state_dict().items() if k.startswith("conv9.")}
            parts += f" but the last layer's ({there} classes there, {net.num_classes} here)"
        if self.trainer.is_global_zero:
            print(f"from {path}: {parts}", flush=True)
        net.load_state_dict(weights)

    def fit(self, **kwargs) -> None:
        """Train, or resume training exactly from the checkpoint."""
        self._run(ckpt_path=self.checkpoint and self.checkpoint.path, **kwargs)

    def _run(self, **kwargs) -> None:
        """Run the trainer; invalid settings, unusable checkpoints and signals are one line each."""
        try:
            with runtime.stops():
                getattr(self.trainer, self.subcommand)(**kwargs)
        except Exception as error:
            started = self.model.rate is not None or self.model.metrics["n"].update_called
            if self.created and not started:
                shutil.rmtree(self.created)
            ours, launcher = isinstance(error, UserError), self.trainer.strategy.launcher
            if failed := runtime.first_failure(launcher, 0 if ours else 5):
                raise UserError(failed) from None  # the others only report that it is gone
            late_usage = "conditioned on metric", "find the monitored key", "to be installed"
            running = started and not any(part in str(error) for part in late_usage)
            as_is = running or ours or runtime.in_users_code(error)
            if as_is or getattr(error, "errno", 0) in OUTPUT_ERRORS:
                raise
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            message = kind + (str(error) or f"raised by {inspect.trace()[-1].function}")
            if self.checkpoint and not isinstance(error, FLAG_ERRORS):
                raise checkpoints.CheckpointError(f"{self.checkpoint.path}: {message}") from None
            raise UsageError(message) from None
        except SystemExit as stop:
            run, message = run_directory(self.trainer), "stopped"
            if run and (last := run / "checkpoints" / "last.ckpt").is_file():
                message += f"; {resume_with(last)}"
            if stop.code in (130, 143):
                told = message if self.trainer.is_global_zero else ""  # by rank 0
                raise StoppedError(told, stop.code) from None
            raise

    def test(self, **kwargs) -> None:
        """Evaluate the checkpoint, print the results and write them beside its run."""
        self.model.net.load_state_dict(self.checkpoint.weights)
        self._run(verbose=False, **kwargs)
        if self.trainer.is_global_zero:
            metrics, save = self.trainer.callback_metrics, self.predictions.save
            evaluation.write(self.checkpoint, self.datamodule, self.subcommand, metrics, save)

    validate = test


def _any(values: list, kind: type) -> bool:
    return any(isinstance(value, kind) for value in values)


def main(args: list[str] | None = None) -> None:
    """Run fit, validate or test."""
    runtime.prepare()
    sys.path.append(os.getcwd())  # for callbacks of the user's, as with python -m
    with contextlib.ExitStack() as held, runtime.rank_zero_first():
        CLI(args, held)
