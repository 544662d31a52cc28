"""Settings: recipes, a run's config.yaml as defaults for the arguments, and what is refused."""

import argparse
import difflib
import json
import os
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import callbacks, cli, loggers

from allconv.checkpoints import Checkpoint, CheckpointError, find
from allconv.errors import OneLineErrors, UsageError, UserError, say
from allconv.rundir import CONFIGS, RunError, flat, read_yaml
from allconv.task import Classifier

RECIPES = {path.stem: path for path in CONFIGS.glob("*.yaml") if path.stem != "claims"}
# arguments of the task that do not change what its weights compute
NEUTRAL = {"compile", "flip_test"}
# data settings that determine the validation images
SPLIT = {"demo", "folder", "val_size", "split_seed"}
# settings that may silently differ when a run is resumed
FREE = re.compile(
    r"(config|recipe|ckpt_path|init|model\.teacher|data\.(data_dir|folder)|trainer\.(max_steps|"
    r"max_time|default_root_dir|logger|enable_progress_bar|limit_test_batches|log_every_n_steps|profiler))\b"
)
# trainer settings that Lightning divides by
DIVISORS = {"accumulate_grad_batches", "check_val_every_n_epoch", "limit_train_batches"}
DIVISORS |= {"val_check_interval"}
STEPS = ("data.batch_size", "trainer.accumulate_grad_batches", "trainer.limit_train_batches")
REMARKS = dict.fromkeys(STEPS, " (the learning rate goes by steps)")
# flags that are read before the others are parsed
EARLY = ("ckpt_path", "init", "trainer.default_root_dir", "model.num_classes")
# packages whose classes a run's config.yaml may name
TRUSTED = ("lightning.", "torch.", "allconv.")
# trainer settings whose values may name classes and functions
CODE = {"accelerator", "callbacks", "logger", "plugins", "profiler", "strategy"}


class Parser(OneLineErrors, cli.LightningArgumentParser):
    """LightningCLI's parser, with one-line errors."""

    classes = (*callbacks.__all__, *loggers.__all__)
    recipes = tuple(RECIPES)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Point to the settings that other LightningCLI projects have under other names."""
        if re.search(r"(--|')(model\.)?(optimizer|lr_scheduler|learning_rate)\b", message):
            message = (
                "optimizer and schedule are settings of the model here: --model.lr, "
                "--model.momentum, --model.milestones, --model.warmup, --model.muon_lr"
            )
        elif "num_workers" in message:
            message += "; none are needed: the images are in memory, and a batch is one indexing"
        elif "arguments are required" in message:  # by a class that a value names
            name = message.split()[-1]
            message += f" (after the class: --trainer.callbacks.{name}=VALUE, or trainer.logger)"
        super().error(message, ex)


class Early(OneLineErrors, argparse.ArgumentParser):
    """Parser of the flags that are read first."""


def early(args: list[str]) -> tuple[dict[str, object], list[Path], list[str]]:
    """Read what the parsing of the other arguments depends on.

    Returns:
        The settings of the --config files and the EARLY flags, by dotted key; the files; and the
        arguments, with these first and recipe names replaced by their files.
    """
    parser = Early(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-c", "--config", action="append", default=[])
    for key in EARLY:
        parser.add_argument(f"--{key}")
    found, rest = parser.parse_known_args(args)
    flags, named, files = vars(found), {}, []
    for name in flags.pop("config"):
        path = Path(name) if Path(name).is_file() else RECIPES.get(name)
        if path is None:
            near = difflib.get_close_matches(Path(name).stem, RECIPES, 1)
            hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(sorted(RECIPES))}"
            raise UsageError(f"--config {name}: no such file; {hint}")
        try:
            named |= flat(read_yaml(path))
        except RunError as error:
            raise UsageError(f"--config {error}") from None
        files.append(path)
    for group in {"trainer", "model", "data"} & named.keys():
        raise UsageError(f"{group} is {named[group]}: expected keys and values")
    front = [("config", path) for path in files] + list(flags.items())
    return named | flags, files, [*(f"--{key}={value}" for key, value in front), *rest]


def as_list(value: object) -> list:
    """A value or a list of values as a list, without None and booleans."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if not isinstance(v, bool | None)]


def run_settings(checkpoint: Checkpoint, named: str, command: str) -> dict[str, object]:
    """The settings of a checkpoint's run: its config.yaml, completed by the checkpoint itself.

    Args:
        checkpoint: of the run.
        named: the user's own arguments; code named neither there nor in TRUSTED is left out.
        command: fit, validate or test; an evaluation logs only where its own arguments say so.

    Raises:
        CheckpointError: its hyperparameters are not those of a task.
    """
    settings = read_yaml(checkpoint.run / "config.yaml") if checkpoint.run else {}
    groups = {key: settings.get(key) for key in ("trainer", "model", "data")}
    trainer, model, data = ({} if not isinstance(v, dict) else v for v in groups.values())
    untrusted: list[str] = []
    trainer |= {key: _trusted(trainer[key], named, untrusted) for key in CODE & trainer.keys()}
    if untrusted and command == "fit":
        raise CheckpointError(
            f"{checkpoint.path}: its run has {untrusted[0]}, code that only config.yaml names: "
            "repeat the flag or the --config that added it, or delete it from config.yaml"
        )
    say(*(f"left out: {name}, code that only the run's config.yaml names" for name in untrusted))
    if command != "fit":
        trainer |= {"logger": None, "profiler": None}
    if isinstance(own := trainer.get("callbacks"), list):  # what one found is in the checkpoint
        trainer["callbacks"] = [c for c in own if not re.search("Finder'", str(c))] or None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Classifier, "model")
    try:  # here, where an error is the file's and not of a flag
        parser.instantiate(parser.parse_object({"model": checkpoint.hparams}))
    except (argparse.ArgumentError, ValueError) as error:
        hint = "; of a subclass? trainer.test in Python takes it" if "accept" in str(error) else ""
        raise CheckpointError(f"{checkpoint.path}: {error}{hint}") from None
    model = checkpoint.hparams | model
    known = (SPLIT | {"batch_size"}) & {*checkpoint.data}
    data = data if checkpoint.run else {k: checkpoint.data[k] for k in known}
    settings |= {"trainer": trainer, "model": model, "data": data}
    return {k: v for k, v in settings.items() if k != "ckpt_path" and v is not None}


def _trusted(value: object, named: str, untrusted: list[str]) -> object:
    """The value without code that only a file names; the names are added to `untrusted`."""
    if isinstance(value, list):
        kept = [_trusted(v, named, untrusted) for v in value]
        return [new for old, new in zip(value, kept, strict=True) if new is not None or old is None]
    of_class = isinstance(value, dict)
    name = str(value.get("class_path", "") if of_class else value)
    path = re.fullmatch(r"(\w+)(\.\w+)+", name)
    strange = path and not name.startswith(TRUSTED) and name not in named
    if strange and (of_class or find_spec(path[1])):  # other text may have dots too
        untrusted.append(name)
        return None
    if not of_class:
        return value
    return {k: _trusted(v, named, untrusted) for k, v in value.items()}


def check(config: Namespace, checkpoint: Checkpoint | None, resumed: bool) -> None:
    """Refuse settings that cannot work, before anything is instantiated.

    Raises:
        UsageError: they never work.
        CheckpointError: the checkpoint was made with others.
    """
    if resumed and 0 < config.trainer.max_steps <= (done := checkpoint.step):
        raise UsageError(f"{done} steps are done; set --trainer.max_steps above {done}, or to -1")
    if resumed and config.trainer.fast_dev_run:
        raise UsageError("trainer.fast_dev_run tries a new run: leave --ckpt_path out")
    for key in sorted({"max_epochs", "max_steps", *DIVISORS}):
        value = config.trainer[key]
        if value == 0 or (key in DIVISORS and isinstance(value, int | float) and value < 0):
            raise UsageError(f"trainer.{key} is {value}: it must be above 0")
    devices, cores = str(config.trainer.devices), os.cpu_count() or 1
    if devices.isdigit() and int(devices) > 8 * cores:  # one process each
        raise UsageError(f"trainer.devices is {devices}: too many for {cores} CPU cores")
    if re.search("fork|notebook|spawn", str(config.trainer.strategy)):  # none works
        raise UsageError(f"trainer.strategy is {config.trainer.strategy}: use ddp")
    if not 0 <= config.seed_everything < 2**32:
        raise UsageError(
            f"seed_everything is {config.seed_everything}: it must be from 0 to {2**32 - 1}"
        )
    if checkpoint:
        _refuse_contradictions(checkpoint, config.model, resumed)


def resolve(config: Namespace, logs: Path, command: str, resumed: bool) -> None:
    """Replace settings by what they mean now, as config.yaml is to record it."""
    config.ckpt_path = None  # it belongs to this call, not to the run
    if isinstance(config.seed_everything, bool):  # random, and the same in all processes
        seed = os.environ.get("PL_GLOBAL_SEED", "")
        config.seed_everything = int(seed) if seed.isdigit() else random.getrandbits(32)
    for key in ("model.teacher",) if resumed else ("model.teacher", "init"):
        if command == "fit" and config[key] not in (None, "pretrained"):  # best changes with time
            config[key] = str(find(config[key], logs, key))
    for key in ("callbacks", "logger", "plugins"):  # flags may add what a resumed run has already
        if isinstance(values := config.trainer[key], list):
            config.trainer[key] = [v for i, v in enumerate(values) if v not in values[:i]]


def _refuse_contradictions(checkpoint: Checkpoint, model: Namespace, resumed: bool) -> None:
    """Refuse settings of the model that differ from the checkpoint's."""
    told = checkpoint.hparams.keys() - NEUTRAL
    if checkpoint.epoch is None:
        told = {"width", "num_classes"}
        say(
            f"{checkpoint.path} holds weights alone, which do not tell model.residuals (taken as "
            f"{model.residuals}) and model.rectify_logits ({model.rectify_logits})"
        )
    if checkpoint.hparams.get("teacher") and model.teacher:
        told -= {"teacher"}  # whose weights are compared, wherever they are now
    for key in sorted(told):
        value = checkpoint.hparams[key]
        if json.dumps(model[key]) != json.dumps(value):
            hint = ", or start a new run" if resumed else ""
            raise CheckpointError(
                f"model.{key} is {model[key]}, but {checkpoint.path} was made with {value}: leave "
                f"it out{hint}"
            )


def changes(before: dict[str, object], config: Namespace) -> list[str]:
    """The changed settings that make a resumed run differ from `before`, a file's, as text.

    Raises:
        UserError: the run was trained with other data.
    """
    before, now = flat(before), flat(json.loads(json.dumps(config.as_dict(), default=str)))
    changed = {k for k in before if now.get(k) != before[k] and not FREE.match(k)}
    for key in sorted({f"data.{key}" for key in SPLIT} & changed):
        raise UserError(
            f"{key} is {now[key]}, but the run was trained with {before[key]}: resume with the "
            "same data, or start a new run with --init"
        )
    if config.model.warmup is None and not config.data.sizes:  # nothing depends on it
        changed.discard("trainer.max_epochs")
    told = {k: f"{k} from {before[k]} to {now.get(k)}{REMARKS.get(k, '')}" for k in sorted(changed)}
    return [text if len(text) < 100 else key for key, text in told.items()]  # of callbacks
