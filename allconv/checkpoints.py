"""Lightning's checkpoints, exported files, bare weights: found, checked; nothing is executed."""

import inspect
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from allconv import cifar100, demo
from allconv.errors import UserError
from allconv.folder import ImageFolder, title
from allconv.model import AllCNN
from allconv.rundir import LOGS, read_config, read_metrics, runs

PRETRAINED = Path(__file__).with_name("pretrained.safetensors")  # written by `allconv export`
# what Lightning needs to resume, beside the weights
RESUMABLE = {
    **dict.fromkeys(("hyper_parameters", "loops", "callbacks"), dict),
    **dict.fromkeys(("epoch", "global_step"), int),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
    "pytorch-lightning_version": str,
}
# of the network's arguments, those that its weights do not tell, with their defaults
ARGUMENTS = {name: p.default for name, p in inspect.signature(AllCNN).parameters.items()}
NET = {*ARGUMENTS}
del ARGUMENTS["width"], ARGUMENTS["num_classes"]


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another network."""


@dataclass
class Checkpoint:
    """A checkpoint that was read and checked.

    Attributes:
        path: the file.
        hparams: arguments of the task; of a bare state dict, those of the network that it tells.
        weights: the network's state dict.
        epoch: whole epochs trained; None if the file does not say.
        step: optimizer steps taken.
        data: arguments of the data module that it was trained with, if known; and its `state_dict`.
        metadata: of an exported file, what it says of itself (see `allconv.commands.export`).
        resumable: whether training can go on from it.
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
        """The run directory it lies in, if it lies in one."""
        # the parents of a short relative path have no names
        path = self.path if len(self.path.parts) > 2 else self.path.absolute()
        folder = path.parent.parent
        return folder if (folder / "config.yaml").is_file() else None

    @property
    def folder(self) -> Path:
        """Where evaluations of it are written: its run directory, or the folder it lies in."""
        if self.path == PRETRAINED:  # nothing is written into an installed package
            return Path(LOGS, "pretrained")
        return self.run or self.path.parent

    @property
    def config(self) -> dict[str, object]:
        """The configuration it was trained with, without this machine's folders; {} if unknown."""
        return read_config(self.run) if self.run else self.metadata.get("recipe", {})

    @property
    def dataset(self) -> ModuleType | ImageFolder:
        """The data set it was trained on: `allconv.cifar100`, `allconv.demo`, or a folder's."""
        if "folder" in self.data:
            return ImageFolder(title(self.data["folder"]), tuple(self.data["classes"]))
        return demo if self.data.get("demo") else cifar100

    def net(self) -> AllCNN:
        """The network, on the CPU in eval mode, channels last."""
        with torch.device("meta"):  # the initialization would only be overwritten
            net = AllCNN(**{name: v for name, v in self.hparams.items() if name in NET})
        net.load_state_dict(self.weights, assign=True)
        return net.to(memory_format=torch.channels_last).eval()


def find(name: str, logs: Path = Path(LOGS), key: str = "ckpt_path") -> Path:
    """The file that `--ckpt_path` means.

    Args:
        name: "best" or "last" (of the newest run), "pretrained", a file, or a run directory.
        logs: folder of the runs.
        key: the argument, for the message.

    Raises:
        CheckpointError: there is none.
    """
    name = str(name)
    if name not in ("best", "last"):
        path = PRETRAINED if name == "pretrained" else Path(name)
        if name and path.is_dir():
            path = path / "checkpoints" / "best.ckpt"
        if not path.is_file():
            name = name or "empty"
            raise CheckpointError(f"{key} is {name}: no such file; or best, last, pretrained")
        return path
    for run in reversed(runs(logs)):
        path = run / "checkpoints" / f"{name}.ckpt"
        if path.is_file():
            return path
        # an older run is not meant
        if (last := path.with_name("last.ckpt")).is_file() and read_metrics(run):
            raise CheckpointError(f"{key} is {name}: {run} was not validated; name {last}")
    raise CheckpointError(
        f"{key} is {name}: no run with a {name}.ckpt in {logs.absolute()}; "
        "train one (python -m allconv fit) or name a file instead"
    )


def load(path: Path, resume: bool = False) -> Checkpoint:
    """Read and check a checkpoint.

    Args:
        path: the file.
        resume: whether training is to go on from it; else it has to be of a trained network.

    Raises:
        CheckpointError: it cannot be read, is of another network, or not fit for the purpose.
    """
    checkpoint = _load_exported(path) if path.suffix == ".safetensors" else _load_torch(path)
    _check_weights(checkpoint)
    if resume and not checkpoint.resumable:
        raise CheckpointError(f"{path}: weights alone cannot be resumed; use --init")
    if checkpoint.epoch == checkpoint.step == 0 and not resume:
        raise CheckpointError(f"{path}: stopped in its first epoch, so it is not trained yet")
    return checkpoint


def _load_torch(path: Path) -> Checkpoint:
    """A Lightning checkpoint of ours, or a bare state dict."""
    content = _read_archive(path)
    state = content.get("state_dict", content)
    prefix = "net." if "state_dict" in content else ""
    weights = {
        key.removeprefix(prefix): value
        for key, value in (state if isinstance(state, dict) else {}).items()
        if isinstance(value, Tensor) and isinstance(key, str) and key.startswith(prefix)
    }
    checkpoint = Checkpoint(path, {}, weights)
    if all(isinstance(content.get(key), kind) for key, kind in RESUMABLE.items()):
        checkpoint.resumable = bool(content["optimizer_states"])
        saved = content["hyper_parameters"].items()
        checkpoint.hparams = {str(k): v for k, v in saved if not str(k).startswith("_")}
        checkpoint.step = content["global_step"]
        try:
            progress = content["loops"]["fit_loop"]["epoch_progress"]["current"]
            checkpoint.epoch = int(progress["processed"])
        except (LookupError, TypeError, ValueError, OverflowError, RuntimeError):  # any shape
            raise CheckpointError(f"{path}: does not say how long it was trained") from None
        checkpoint.data = _data(*map(content.get, ("datamodule_hyper_parameters", "CIFAR100")))
    return checkpoint


def _read_archive(path: Path) -> dict:
    """The dict that torch.save wrote, of tensors and plain Python values only; {} if no dict."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch stores and does not compress: what unpacks to more is no checkpoint
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                raise ValueError("compressed")
            if damaged := archive.testzip():  # torch.load checks no checksum
                raise ValueError(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content if isinstance(content, dict) else {}
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a checkpoint that can be read ({reason})") from None


def _load_exported(path: Path) -> Checkpoint:
    """A file that `python -m allconv export` wrote."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("allconv", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not weights that can be read ({error})") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("hparams"), dict):
        raise CheckpointError(f"{path}: not written by python -m allconv export")
    for key, kind in (("epoch", int), ("recipe", dict)):
        if not isinstance(metadata.get(key, kind()), kind):
            raise CheckpointError(f"{path}: {key} in its metadata is no {kind.__name__}")
    data, epoch = _data(metadata.get("recipe", {}).get("data"), metadata), metadata.get("epoch")
    return Checkpoint(path, metadata["hparams"], weights, epoch, data=data, metadata=metadata)


def _data(*parts: object) -> dict[str, object]:
    """Of the data module's arguments and state, those that tell on what a network was trained."""
    kinds = {"data_dir": str, "demo": bool, "val_size": int, "split_seed": int, "batch_size": int}
    kinds |= {"folder": str, "digest": str, "classes": list}
    found = {k: v for part in parts if isinstance(part, dict) for k, v in part.items()}
    return {k: found[k] for k, kind in kinds.items() if isinstance(found.get(k), kind)}


def _check_weights(checkpoint: Checkpoint) -> None:
    """Complete the network's arguments from the weights, and compare all names and shapes."""
    path, weights, hparams = checkpoint.path, checkpoint.weights, checkpoint.hparams
    first, last = weights.get("conv1.0.weight"), weights.get("conv9.0.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise CheckpointError(f"{path}: not a checkpoint of AllCNN")
    # an expanded or sparse tensor claims more than is in the file
    if sum(w.numel() * w.element_size() for w in weights.values()) > path.stat().st_size:
        raise CheckpointError(f"{path}: claims more weights than it holds")
    for name, default in ARGUMENTS.items():
        value = hparams.setdefault(name, default)
        if not isinstance(value, type(default)) and (type(value), type(default)) != (int, float):
            raise CheckpointError(f"{path}: {name} is {value!r}, not a {type(default).__name__}")
    hparams |= {"width": len(first), "num_classes": len(last)}
    names = checkpoint.data.get("classes", [])
    text = {name for name in names if isinstance(name, str) and name.isprintable()}
    if {"classes", "folder"} & {*checkpoint.data} and not len(text) == len(names) == len(last):
        raise CheckpointError(f"{path}: does not name its {len(last)} classes")
    try:
        with torch.device("meta"):
            net = AllCNN(**{name: hparams[name] for name in NET})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: {name} is {found.get(name, 'missing')}, but AllCNN of width {len(first)} "
                f"has {expected.get(name, 'no such tensor')}"
            )
        value = weights[name]
        plain = value.layout is torch.strided and not value.is_quantized
        if not plain or value.is_complex() or not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds values that are not finite real numbers")
