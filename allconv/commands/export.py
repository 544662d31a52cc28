"""`python -m allconv export --out FILE`: a trained network as .onnx or .safetensors.

Both have metadata, a JSON object under "allconv", see `describe`. The package's own
`pretrained.safetensors` was written by this command.
"""

import copy
import inspect
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console

from allconv import evaluation, rundir
from allconv.errors import Parser, UsageError, UserError

if TYPE_CHECKING:
    from allconv.checkpoints import Checkpoint
    from allconv.model import AllCNN

TOLERANCE = 1e-4  # between ONNX Runtime's logits and torch's, as a share of the largest


def export(out: str, ckpt_path: str = "best", calibrate: bool = False) -> None:
    """Write a trained network as .onnx or .safetensors, with its metadata.

    Args:
        out: file to write; its ending decides: .onnx (images in, logits out, for ONNX Runtime) or
            .safetensors (the weights).
        ckpt_path: best or last (of the newest run that has it), pretrained, a run directory, or a
            file.
        calibrate: divide the logits by the temperature that fits the validation images best.
    """
    path, writers = Path(out), {".onnx": _onnx, ".safetensors": _safetensors}
    if path.suffix not in writers:
        raise UsageError(f"out is {out}: its ending must be {' or '.join(writers)}")
    from allconv import checkpoints

    checkpoint = checkpoints.load(checkpoints.find(ckpt_path))
    metadata, net = describe(checkpoint), checkpoint.net()
    if calibrate:
        _calibrate(net, checkpoint, metadata)
    content, remark = writers[path.suffix](net, metadata)
    rundir.write_atomic(path, lambda file: file.write(content))
    results = [f"{k}/acc {metadata[k]['acc']:.4f}" for k in ("val", "test") if k in metadata]
    print(f"{checkpoint.path}, epoch {metadata['epoch']}: {', '.join(results) or 'not evaluated'}")
    print(f"written: {path} ({len(content) / 1e6:.2f} MB)\n{remark.format(quote(str(path)))}")


def describe(checkpoint: "Checkpoint") -> dict[str, object]:
    """The metadata: arguments, classes, recipe, data settings, and results.

    The results are those that `validate` and `test` last wrote for this checkpoint.
    """
    from allconv.datasets.cifar100 import MEAN, STD
    from allconv.model import AllCNN

    data, of = checkpoint.data, (checkpoint.path.name, checkpoint.epoch, checkpoint.step)
    if checkpoint.metadata:
        return checkpoint.metadata
    if not data:
        raise UserError(f"{checkpoint.path}: does not say on what it was trained; a run's does")
    metadata = {
        "hparams": {k: checkpoint.hparams[k] for k in inspect.signature(AllCNN).parameters},
        "classes": checkpoint.dataset.classes,
        "mean": MEAN,
        "std": STD,
        "epoch": checkpoint.epoch,
        "recipe": checkpoint.config,
        **{key: data.get(key) for key in ("demo", "val_size", "split_seed")},
        "version": version("allconv"),
    }
    if "folder" in data:
        metadata |= {"folder": checkpoint.dataset.title, "digest": data.get("digest")}
    for split, command in (("val", "validate"), ("test", "test")):
        if found := evaluation.read(evaluation.place(checkpoint, command, checkpoint.dataset), *of):
            metadata[split] = {k: found[f"{split}/{k}"] for k in ("acc", "top5", "loss", "n")}
    return metadata


def _calibrate(net: "AllCNN", checkpoint: "Checkpoint", metadata: dict[str, object]) -> None:
    """Divide the net's logits by a fitted temperature, and add it to the metadata."""
    from allconv import calibration

    split = {k: v for k, v in checkpoint.data.items() if k in ("val_size", "split_seed")}
    checkpoint.dataset.prepare()
    held_out = checkpoint.dataset.load("train", **split)["val"]
    if not len(held_out):
        raise UserError("there are no validation images to calibrate on: data.val_size was 0")
    logits = calibration.logits(net, held_out.images, f"{len(held_out):,} validation images")
    temperature = calibration.fit_temperature(logits, held_out.labels)
    calibration.divide_logits_(net, temperature)
    metadata["temperature"] = temperature * metadata.get("temperature", 1)
    for name in {"val", "test"} & {*metadata}:
        metadata[name].pop("loss", None)  # it was that of other probabilities
    print(f"logits divided by the temperature {temperature:.4f}")


def _safetensors(net: "AllCNN", metadata: dict[str, object]) -> tuple[bytes, str]:
    """The state dict in float32; equal bytes for equal weights and metadata."""
    import safetensors.torch

    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    flag = " --data.folder DIR" if "folder" in metadata else ""
    content = safetensors.torch.save(weights, {"allconv": json.dumps(metadata)})
    return content, f"next: python -m allconv test --ckpt_path {{}}{flag}"


def _onnx(net: "AllCNN", metadata: dict[str, object]) -> tuple[bytes, str]:
    """The network with its normalization, for any number of images; checked in ONNX Runtime."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if missing:
        raise UserError(f".onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    import onnxruntime
    import torch

    from allconv.augment import normalize
    from allconv.datasets.cifar100 import MEAN, STD

    class FromBytes(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:  # (B, 3, 32, 32) uint8
            return self.net((images - self.mean) / self.std)

    module = FromBytes().eval()
    module.net = copy.deepcopy(net)
    for layer in list(module.net.children())[:-1]:  # torch 2.6 cannot export a batch norm
        layer[0], layer[1] = torch.nn.utils.fuse_conv_bn_eval(*layer[:2]), torch.nn.Identity()
    for name, values in (("mean", MEAN), ("std", STD)):
        module.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1))
    images = torch.randint(256, (33, 3, 32, 32), generator=torch.Generator(), dtype=torch.uint8)
    options = {"input_names": ["images"], "output_names": ["logits"], "verbose": False}
    options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    with Console(stderr=True).status("exporting to ONNX"):
        program = torch.onnx.export(module, (images,), dynamo=True, **options)
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with the folders of this machine
    names = (name.replace(",", ";") for name in metadata["classes"])
    texts = {"classes": ",".join(names), "allconv": json.dumps(metadata)}
    program.model.metadata_props.update(texts)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = [session.run(None, {"images": part.numpy()})[0] for part in images.split((1, 32))]
    with torch.inference_mode():
        expected = net(normalize(images, MEAN, STD))
    off = (torch.cat([torch.tensor(logits) for logits in found]) - expected).abs().max()
    off = (off / expected.abs().max().clip(1)).item()  # rectified logits may all be zero
    if not off <= TOLERANCE:  # NaN is refused as well
        raise UserError(f"ONNX Runtime's logits differ from torch's by {off:.1e}")
    return content, f"in ONNX Runtime its logits are torch's within {off:.1e} of the largest"


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="allconv export")
    parser.add_function_arguments(export, skip={"calibrate"})
    text = "Fit the probabilities to the validation images (temperature scaling)."
    parser.add_argument("--calibrate", action="store_true", help=text)
    export(**parser.parse_args(args).as_dict())
