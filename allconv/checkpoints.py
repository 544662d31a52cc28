"""Find and read checkpoints: Lightning's, exported files, bare weights; no code is executed.

A file that is missing, damaged or of another network is a CheckpointError.
"""

import inspect
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from allconv import datasets
from allconv.errors import UserError, say
from allconv.model import AllCNN
from allconv.rundir import LOGS, read_config, read_metrics, runs

PRETRAINED = Path(__file__).with_name("pretrained.safetensors")  # written by `allconv export`
# what Lightning saves besides the weights, always and to resume
SAVED = {"hyper_parameters": dict, "loops": dict, "epoch": int, "global_step": int}
SAVED["pytorch-lightning_version"] = str
RESUMABLE = {"callbacks": dict, "optimizer_states": list, "lr_schedulers": list}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
ARGUMENTS = {name: p.default for name, p in inspect.signature(AllCNN).parameters.items()}
# arguments and state of the data module that tell on what a network was trained
DATA = {"data_dir": str, "demo": bool, "folder": str, "classes": list, "digest": str}
DATA |= {"val_size": int, "split_seed": int, "batch_size": int}


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another network."""


@dataclass
class Checkpoint:
    """A valid checkpoint.

    Attributes:
        path: the file.
        hparams: arguments of the task; of a bare state dict, the network's as far as it tells them.
        weights: the network's state dict.
        epoch: whole epochs trained; None if the file does not say.
        step: optimizer steps taken.
        data: arguments and `state_dict` of its data module, as far as they are known.
        metadata: the metadata of an exported file (see `allconv.commands.export`).
        resumable: whether training can be resumed from it.
    """

    path: Path
    hparams: dict[str, object]
    weights: dict[str, Tensor]
    epoch: int | None = None
    step: int = 0
    data: dict[str, object] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)
    resumable: bool = False

    @property
    def run(self) -> Path | None:
        """The run directory that holds it, if any."""
        # a short relative path has no parents with names
        path = self.path if len(self.path.parts) > 2 else self.path.absolute()
        folder = path.parent.parent
        return folder if (folder / "config.yaml").is_file() else None

    @property
    def folder(self) -> Path:
        """Where its evaluations are written: its run directory, or the folder that holds it."""
        if self.path == PRETRAINED:  # nothing is written into an installed package
            return Path(LOGS, "pretrained")
        return self.run or self.path.parent

    @property
    def config(self) -> dict[str, object]:
        """The configuration it was trained with, without a machine's paths; {} if unknown."""
        return read_config(self.run) if self.run else self.metadata.get("recipe", {})

    @property
    def dataset(self) -> datasets.Official | datasets.ImageFolder:
        """The data set it was trained on."""
        keys = {"data_dir", "demo", "folder", "classes"} & {*self.data}
        return datasets.choose(**{key: self.data[key] for key in keys})

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the logits, or numbers where nothing tells the names."""
        names, n = self.dataset.classes, self.hparams["num_classes"]
        return names if len(names) == n else tuple(f"class {i}" for i in range(n))

    def net(self) -> AllCNN:
        """The network in eval mode, in float32 on the CPU, channels last."""
        if self.epoch is None:
            say(f"{self.path} holds weights alone; other settings of the net are the defaults")
        return self._net()

    def _net(self) -> AllCNN:
        with torch.device("meta"):  # the weights are overwritten anyway
            net = AllCNN(**{name: self.hparams[name] for name in ARGUMENTS})
        net.load_state_dict(self.weights, assign=True)
        return net.float().to(memory_format=torch.channels_last).eval()


def find(name: str, logs: Path = Path(LOGS), key: str = "ckpt_path", inside: str = "best") -> Path:
    """The file that a value of `--ckpt_path` refers to.

    Args:
        name: "best" or "last" (of the newest run), "pretrained", a file, or a run directory.
        logs: folder of the runs.
        key: the argument's name, for the error.
        inside: which checkpoint of a run directory, "best" or "last".
    """
    name = os.path.expanduser(str(name))
    if name not in ("best", "last"):
        named = [Path(name), logs / name, logs / f"version_{name}"]  # as `runs` lists them
        path = PRETRAINED if name == "pretrained" else next(filter(Path.exists, named), named[0])
        if name and path.is_dir():
            path = path / ("" if path.name == "checkpoints" else "checkpoints") / f"{inside}.ckpt"
        if path.is_file():
            return path
        last, given = path.parent / "last.ckpt", path if name else "empty"
        hint = f"name {last}" if last.is_file() else "or best, last, pretrained"
        raise CheckpointError(f"{key} is {given}: no such file or run; {hint}")
    for run in reversed(runs(logs)):
        path = run / "checkpoints" / f"{name}.ckpt"
        if path.is_file():
            return path
        if (run / "config.yaml").is_file() and read_metrics(run):  # else another program's
            last = path.with_name("last.ckpt")
            hint = f"name {last}" if last.is_file() else "name another run"
            raise CheckpointError(f"{key} is {name}: {run}, the newest, has none; {hint}")
    raise CheckpointError(
        f"{key} is {name}: no run with a {name}.ckpt in {logs.absolute()}; "
        "train one (python -m allconv fit) or name a file instead"
    )


def load(path: Path, resume: bool = False) -> Checkpoint:
    """Read and check a checkpoint, to `resume` its training, or to use the trained network."""
    checkpoint = _load_exported(path) if path.suffix == ".safetensors" else _load_torch(path)
    _check(checkpoint)
    if resume and not checkpoint.resumable:
        raise CheckpointError(f"{path}: weights alone cannot be resumed; use --init")
    if checkpoint.epoch == checkpoint.step == 0 and not resume:
        raise CheckpointError(f"{path}: stopped in its first epoch, so it is not trained yet")
    return checkpoint


def _load_torch(path: Path) -> Checkpoint:
    """A Lightning checkpoint of ours, or a bare state dict."""
    content = _read_archive(path)
    state, prefix = content.get("state_dict", content), "net." if "state_dict" in content else ""
    weights = {
        key.removeprefix(prefix): value
        for key, value in _mapping(state).items()
        if isinstance(value, Tensor) and isinstance(key, str) and key.startswith(prefix)
    }
    if not _has(content, SAVED):
        return Checkpoint(path, {}, weights)
    loop = _mapping(content["loops"].get("fit_loop"))
    # saved by a validation in the last step, before Lightning counts the epoch as processed
    whole = _mapping(loop.get("epoch_loop.batch_progress")).get("is_last_batch") is True
    count = _mapping(_mapping(loop.get("epoch_progress")).get("current"))
    epoch = count.get("ready" if whole else "processed")
    if not isinstance(epoch, int):
        raise CheckpointError(f"{path}: does not say how long it was trained")
    hparams = {str(k): v for k, v in content["hyper_parameters"].items() if str(k)[:1] != "_"}
    data = _data(content.get("datamodule_hyper_parameters"), content.get("CIFAR100"))
    checkpoint = Checkpoint(path, hparams, weights, epoch, content["global_step"], data)
    schedules = content.get("lr_schedulers")  # Lightning would go on without, or with any
    if _has(content, RESUMABLE) and schedules and content["optimizer_states"]:
        if not all(isinstance(_mapping(state).get("last_epoch"), int) for state in schedules):
            raise CheckpointError(f"{path}: does not say where its learning rate schedule stands")
        checkpoint.resumable = True
    return checkpoint


def _read_archive(path: Path) -> dict:
    """A dict of tensors and plain Python values that torch.save wrote; {} for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch does not compress: if the content is larger than the file, it is no checkpoint
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                raise ValueError("compressed")
            if damaged := archive.testzip():  # torch.load checks no checksum
                raise ValueError(f"{damaged} is damaged")
        return _mapping(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged or malicious pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable .ckpt or .safetensors ({reason})") from None


def _load_exported(path: Path) -> Checkpoint:
    """A file that `python -m allconv export` wrote."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("allconv", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not weights that can be read ({error})") from None
    told = {"recipe": {}, **_mapping(metadata)}
    for key, kind in {"hparams": dict, "epoch": int, "recipe": dict}.items():
        if not isinstance(told.get(key), kind):
            raise CheckpointError(f"{path}: not written by python -m allconv export ({key})")
    data = _data(told["recipe"].get("data"), told)
    return Checkpoint(path, told["hparams"], weights, told["epoch"], 0, data, metadata)


def _has(content: dict, kinds: dict[str, type]) -> bool:
    return all(isinstance(content.get(key), kind) for key, kind in kinds.items())


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _data(*parts: object) -> dict[str, object]:
    found = {key: value for part in parts for key, value in _mapping(part).items()}
    return {key: found[key] for key, kind in DATA.items() if isinstance(found.get(key), kind)}


def _check(checkpoint: Checkpoint) -> None:
    """Complete the network's arguments from the weights, and check that they fit together."""
    path, weights, hparams = checkpoint.path, checkpoint.weights, checkpoint.hparams
    first, last = (weights.get(f"conv{i}.0.weight", torch.empty(0)) for i in (1, 9))
    if first.ndim != 4 or last.ndim != 4:
        raise CheckpointError(f"{path}: not a checkpoint of AllCNN")
    # an expanded or sparse tensor claims more than is in the file
    if sum(w.numel() * w.element_size() for w in weights.values()) > path.stat().st_size:
        raise CheckpointError(f"{path}: claims more weights than it holds")
    hparams |= {"width": len(first), "num_classes": len(last)}
    for name, default in ARGUMENTS.items():
        value = hparams.setdefault(name, default)
        if not isinstance(value, type(default)) and (type(value), type(default)) != (int, float):
            raise CheckpointError(f"{path}: {name} is {value!r}, not a {type(default).__name__}")
    names = checkpoint.data.get("classes", [])
    text = {name for name in names if isinstance(name, str) and name.isprintable()}
    if {"classes", "folder"} & {*checkpoint.data} and not len(text) == len(names) == len(last):
        raise CheckpointError(f"{path}: does not name its {len(last)} classes")
    for name, value in weights.items():
        plain = value.layout is torch.strided and not value.is_meta and value.dtype in DTYPES
        if not plain or not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds values that are not finite real numbers")
    try:
        checkpoint._net()
    except (ValueError, RuntimeError, IndexError) as error:  # torch may name many tensors
        raise CheckpointError(f"{path}: {str(error)[:300]}") from None
