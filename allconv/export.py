"""`python -m allconv export --out FILE`: a trained net as a file for others.

`.safetensors`: the weights, and in its metadata under "allconv" what they are as a JSON object;
the package's own `pretrained.safetensors` is made like this.
"""

import inspect
import json
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
import yaml
from torch import Tensor

from allconv import cli, demo, runs
from allconv.data import CLASSES, MEAN, STD
from allconv.model import AllCNN

FIGURES = ("acc", "top5", "loss", "n")
# keys of a config.yaml that name places on one machine
PLACES = {"data_dir", "default_root_dir", "dirpath", "save_dir", "ckpt_path"}


def export(out: str, ckpt_path: str = "best") -> None:
    """Write a trained net as a file for others.

    Args:
        out: file to write; its ending decides: .safetensors (the weights).
        ckpt_path: best or last (of the newest run that has it), pretrained, or a file.

    Raises:
        ValueError: the ending is another.
        CheckpointError: there is no such checkpoint, or it does not tell what net it is of.
    """
    path = Path(out)
    if path.suffix != ".safetensors":
        raise ValueError(f"out is {out}: its ending must be .safetensors")
    checkpoint = runs.load(runs.find_checkpoint(ckpt_path, Path(runs.LOGS)))
    facts = describe(checkpoint)
    net = AllCNN(**facts["hparams"]).eval()
    try:
        net.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise runs.CheckpointError(f"{checkpoint.path}: {error}") from None
    beside = path.with_name(path.name + ".writing")
    try:
        _write_safetensors(net, facts, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    print(
        f"{checkpoint.path}, epoch {facts['epoch']}, {_said(facts)}\n"
        f"written: {path} ({path.stat().st_size / 1e6:.2f} MB)\n"
        f"next: python -m allconv test --ckpt_path {path}",
        flush=True,
    )


def describe(checkpoint: runs.Checkpoint) -> dict[str, object]:
    """What a net's file says of it: its arguments, classes, recipe, split and figures.

    Figures are those that the run's files hold for this very checkpoint; others are left out.

    Raises:
        CheckpointError: it is weights alone, which do not tell what net they are of.
    """
    if checkpoint.facts:
        return checkpoint.facts
    if checkpoint.bare:
        raise runs.CheckpointError(
            f"{checkpoint.path}: weights alone do not tell what net they are of; "
            "export the checkpoint of a run"
        )
    arguments = inspect.signature(AllCNN).parameters.items()
    saved = torch.load(checkpoint.path, map_location="cpu", weights_only=True, mmap=True)
    data, run = saved["CIFAR100"], checkpoint.run
    facts = {
        "hparams": {key: checkpoint.hparams.get(key, p.default) for key, p in arguments},
        "classes": demo.CLASSES if data["demo"] else CLASSES,
        **{"mean": MEAN, "std": STD, "epoch": checkpoint.epoch},
        "recipe": run and _portable(yaml.safe_load((run / "config.yaml").read_text("utf-8"))),
        "split_seed": saved["datamodule_hyper_parameters"]["split_seed"],
        **data,
        "val": _trained(checkpoint) or _evaluated(checkpoint, "validate", "val"),
        "test": _evaluated(checkpoint, "test", "test"),
        "version": version("allconv"),
    }
    return {key: value for key, value in facts.items() if value not in ({}, None)}


def _portable(config: object) -> object:
    """A configuration without nulls and without this machine's folders."""
    if isinstance(config, list):
        return [_portable(value) for value in config]
    if not isinstance(config, dict):
        return config
    kept = {k: v for k, v in config.items() if v is not None and k not in PLACES}
    return {k: Path(v).name if k == "init" else _portable(v) for k, v in kept.items()}


def _trained(checkpoint: runs.Checkpoint) -> dict[str, float]:
    """The validation figures that training wrote down when it saved the checkpoint."""
    rows = runs.read_metrics(checkpoint.run) if checkpoint.run else []
    row = next((r for r in rows if r["step"] == checkpoint.step - 1 and "val/acc" in r), {})
    return _figures(row, "val")


def _evaluated(checkpoint: runs.Checkpoint, command: str, split: str) -> dict[str, float]:
    """The figures of the last evaluation beside the checkpoint, if it was of this one."""
    path = checkpoint.folder / f"{command}.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    same = found and Path(found["checkpoint"]).name == checkpoint.path.name
    if not (same and found["epoch"] == checkpoint.epoch and found["remark"] is None):
        return {}
    return _figures(found, split)


def _figures(found: dict[str, float], split: str) -> dict[str, float]:
    # n is a count
    return {k: round(found[f"{split}/{k}"], None if k == "n" else 7) for k in FIGURES if found}


def _said(facts: dict[str, object]) -> str:
    """The net's accuracies in a line."""
    known = [split for split in ("val", "test") if split in facts]
    return ", ".join(f"{split}/acc {facts[split]['acc']:.4f}" for split in known) or "no figures"


def _write_safetensors(net: AllCNN, facts: dict[str, object], path: Path) -> None:
    """The net's state dict in float32; the same bytes for the same net and facts."""
    weights: dict[str, Tensor] = {
        name: value.contiguous() for name, value in net.state_dict().items()
    }
    path.write_bytes(safetensors.torch.save(weights, {"allconv": json.dumps(facts)}))


def main(args: list[str]) -> None:
    """Run the command."""
    cli.prepare()
    parser = cli.Parser(prog="allconv export", description=export.__doc__.splitlines()[0])
    parser.add_function_arguments(export)
    try:
        export(**parser.parse_args(args).as_dict())
    except cli.USER_ERRORS as error:
        cli.fail(1, error)
    except ValueError as error:
        cli.fail(2, error)
    except OSError as error:
        cli.fail(1, f"{error.filename}: {error.strerror}")
