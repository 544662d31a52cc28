"""`python -m allconv export --out FILE`: a trained net as a file for others.

Both kinds say in their metadata, under "allconv" as a JSON object, what they are: see `describe`.
The package's own `pretrained.safetensors` is made by this command.
"""

import inspect
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor, nn

from allconv import cli, demo, runs
from allconv.data import CLASSES, MEAN, STD, normalize
from allconv.model import AllCNN

FIGURES = ("acc", "top5", "loss", "n")


class ExportError(ValueError):
    """The file cannot be made, or does not do what the net does."""


def export(out: str, ckpt_path: str = "best") -> None:
    """Write a trained net as a file for others.

    Args:
        out: file to write; its ending decides: .onnx (pictures in, logits out, for ONNX Runtime) or
            .safetensors (the weights).
        ckpt_path: best or last (of the newest run that has it), pretrained, or a file.

    Raises:
        ValueError: the ending is another.
        CheckpointError: there is no such checkpoint, or it does not tell what net it is of.
        ExportError: packages are missing, or the file's logits are not the net's.
    """
    path, writers = Path(out), {".onnx": _write_onnx, ".safetensors": _write_safetensors}
    if path.suffix not in writers:
        raise ValueError(f"out is {out}: its ending must be {' or '.join(writers)}")
    checkpoint = runs.load(runs.find_checkpoint(ckpt_path, Path(runs.LOGS)))
    facts = describe(checkpoint)
    net = runs.net_of(checkpoint)
    beside = path.with_name(path.name + ".writing")
    try:
        after = writers[path.suffix](net, facts, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    said = [f"{name}/acc {facts[name]['acc']:.4f}" for name in ("val", "test") if name in facts]
    print(
        f"{checkpoint.path}, epoch {facts['epoch']}: {', '.join(said) or 'no figures known'}\n"
        f"written: {path} ({path.stat().st_size / 1e6:.2f} MB)\n"
        f"{after.format(path)}",
        flush=True,
    )


def describe(checkpoint: runs.Checkpoint) -> dict[str, object]:
    """What a net's file says of it: its arguments, classes, recipe, split and figures.

    Figures are those that the run's files hold for this very checkpoint; others are left out.

    Raises:
        CheckpointError: it does not tell of what net and data it is, as weights alone.
    """
    if checkpoint.bare and checkpoint.facts:
        return checkpoint.facts
    if not checkpoint.facts:
        raise runs.CheckpointError(
            f"{checkpoint.path}: does not tell of what net and data it is; "
            "export the checkpoint of a run"
        )
    arguments = inspect.signature(AllCNN).parameters.items()
    data, run = checkpoint.facts, checkpoint.run
    rows = runs.read_metrics(run) if run else []
    # written by training when it saved this checkpoint
    row = next((r for r in rows if "val/acc" in r and r["step"] == checkpoint.step - 1), {})
    key = checkpoint.path.name, checkpoint.epoch
    facts = {
        "hparams": {name: checkpoint.hparams.get(name, p.default) for name, p in arguments},
        "classes": demo.CLASSES if data["demo"] else CLASSES,
        **{"mean": MEAN, "std": STD, "epoch": checkpoint.epoch},
        "recipe": runs.read_config(run) if run else {},
        **data,
        "val": _figures(row or runs.evaluation(checkpoint.folder, "validate", *key), "val"),
        "test": _figures(runs.evaluation(checkpoint.folder, "test", *key), "test"),
        "version": version("allconv"),
    }
    return {name: value for name, value in facts.items() if value != {}}


def _figures(found: dict[str, float], split: str) -> dict[str, float]:
    # n is a count
    return {k: round(found[f"{split}/{k}"], None if k == "n" else 7) for k in FIGURES if found}


def _write_safetensors(net: AllCNN, facts: dict[str, object], path: Path) -> str:
    """The net's state dict in float32; the same bytes for the same net and facts."""
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    path.write_bytes(safetensors.torch.save(weights, {"allconv": json.dumps(facts)}))
    return "next: python -m allconv test --ckpt_path {}" + " --data.demo true" * facts["demo"]


class _FromBytes(nn.Module):
    """The net with its normalization: uint8 pictures (B, 3, 32, 32) to logits (B, classes)."""

    def __init__(self, net: AllCNN):
        super().__init__()
        self.net = net
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.net((pictures - self.mean) / self.std)


def _write_onnx(net: AllCNN, facts: dict[str, object], path: Path) -> str:
    """The net for any number of pictures, compared with torch in ONNX Runtime."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if missing:
        raise ExportError(f'.onnx needs {", ".join(missing)}: pip install ".[export]"')
    with Console(stderr=True).status("exporting to ONNX"):
        program = torch.onnx.export(
            _FromBytes(net).eval(),
            (torch.zeros(2, 3, 32, 32, dtype=torch.uint8),),
            input_names=["pictures"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with the folders of this machine
    program.model.doc_string = (
        f"AllCNN: pictures (batch, 3, 32, 32) uint8, RGB, 0..255, to logits (batch, "
        f"{len(facts['classes'])}) float32; the classes in order are in the metadata"
    )
    facts = {"classes": ",".join(facts["classes"]), "allconv": json.dumps(facts)}
    program.model.metadata_props.update(facts)
    program.save(path)
    off = max(_difference(net, path, batch) for batch in (1, 7))
    if not off <= 1e-4:  # NaN is refused as well
        raise ExportError(f"ONNX Runtime gives other logits than torch: they differ by {off:.1e}")
    return (
        f"in ONNX Runtime its logits are torch's within {off:.1e} of the largest\n"
        "next: the README's example (Export) runs it on a picture"
    )


@torch.inference_mode()
def _difference(net: AllCNN, path: Path, batch: int) -> float:
    """By how much a file's logits differ at most from the net's, as a share of the largest."""
    import onnxruntime  # an extra

    noise = torch.Generator().manual_seed(batch)
    pictures = torch.randint(0, 256, (batch, 3, 32, 32), generator=noise, dtype=torch.uint8)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pictures": pictures.numpy()})
    expected = net(normalize(pictures))
    # rectified logits may all be zero
    return ((torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clip(1)).item()


def main(args: list[str]) -> None:
    """Run the command."""
    parser = cli.Parser(prog="allconv export", description=export.__doc__.splitlines()[0])
    parser.add_function_arguments(export)
    with cli.command(ExportError):
        export(**parser.parse_args(args).as_dict())
