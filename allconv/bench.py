"""`python -m allconv bench`: how near the training is to the limit of this machine.

Contenders take turns in one process; the figures are medians over the rounds and the ratios are
medians of each round's ratio, since a busy machine's speed changes by the minute.
"""

import contextlib
import copy
import io
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import lightning
import torch
import torchvision
from lightning.pytorch import Callback
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose, Normalize, ToTensor

from allconv import cli
from allconv.data import CIFAR100, MEAN, STD, Pictures, normalize
from allconv.model import AllCNN
from allconv.task import Classifier

# The net as the recipes train it: without the notebook's dropout and ReLU on the logits.
RECIPE = {"dropout": 0.0, "rectify_logits": False, "nesterov": True, "decay_norms": False}
FIT = {**{f"model.{key}": value for key, value in RECIPE.items()}, "data.crop": 4, "data.flip": True}
STEPS, EVAL_STEPS = 6, 4  # batches in a round of `fit`

# Every figure: its unit (that it is printed in, and how many of its own make one) and meaning.
FIGURES = {
    "fraction_of_matmul": ("", 1, "training step's FLOP/s / matrix product's"),
    "step_vs_notebook": ("x", 1, "training step's pictures/s / the notebook's way"),
    "fit_vs_step": ("", 1, "`fit` with data, augmentation, metrics / the bare step"),
    "pipeline_vs_torchvision": ("x", 1, "input pipeline / torchvision's better one"),
    "step_pictures_s": ("pictures/s", 1, "training step: forward, loss, backward, SGD"),
    "step_flop_s": ("GFLOP/s", 1e9, "the same"),
    "matmul_flop_s": ("GFLOP/s", 1e9, "matrix product 2048 x 2048 x 2048"),
    "notebook_pictures_s": ("pictures/s", 1, "step of AllCNN's defaults, NCHW, batch 64"),
    "fit_pictures_s": ("pictures/s", 1, "training part of `fit`"),
    "bare_pictures_s": ("pictures/s", 1, "bare step on the batches of `fit`, in turns with it"),
    "eval_pictures_s": ("pictures/s", 1, "validation in `fit`"),
    "epoch_end_s": ("s", 1, "`fit` between two epochs: checkpoints, curves, logs"),
    "pipeline_pictures_s": ("pictures/s", 1, "our loader, normalized"),
    "torchvision_0_pictures_s": ("pictures/s", 1, "torchvision, no workers"),
    "torchvision_2_pictures_s": ("pictures/s", 1, "torchvision, 2 workers"),
    "help_s": ("s", 1, "python -m allconv --help"),
    "imports_s": ("s", 1, "command to the end of the imports"),
    "data_s": ("s", 1, "reading, sorting and splitting the pictures"),
    "setup_s": ("s", 1, "all else before the first training step"),
    "first_step_after_imports_s": ("s", 1, "data and set-up"),
    "peak_rss_gib": ("GiB", 1, "resident memory of `fit` at its peak"),
}


def bench(
    data_dir: str = "data",
    width: int = 64,
    batch_size: int = 128,
    repeats: int = 7,
    demo: bool = False,
) -> dict[str, object]:
    """Measure training, evaluation, input pipeline, memory and start-up on this machine.

    Takes about five minutes on two CPU cores. Nothing else should run meanwhile.

    Args:
        data_dir: folder with the data set, as in fit.
        width: channels after the first convolution.
        batch_size: pictures in a training batch.
        repeats: rounds in which the contenders take turns.
        demo: use the small drawn data set instead.

    Returns:
        The median of each of FIGURES, their `spread` (lowest and highest), and what was measured.

    Raises:
        ValueError: an argument is out of its range.
    """
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    mixed = device.type == "cuda"  # as in configs/gpu.yaml: bf16 and compiled
    flags = FIT | {
        "model.width": width, "data.batch_size": batch_size, "data.demo": demo,
        "data.data_dir": os.path.abspath(data_dir), "model.compile": mixed,
        "trainer.precision": "bf16-mixed" if mixed else "32-true", "trainer.max_epochs": 1,
        "trainer.limit_train_batches": STEPS, "trainer.limit_val_batches": EVAL_STEPS,
        "trainer.devices": 1,
    }  # fmt: skip
    data = CIFAR100(data_dir, batch_size, demo=demo)
    data.prepare_data()
    data.setup("fit")
    samples: dict[str, list[float]] = defaultdict(list)
    # the children first: the peak that Linux tells of a child begins with its parent's size
    _starts(samples, flags, min(repeats, 3))
    _steps(samples, width, batch_size, repeats, device)
    _fits(samples, flags, repeats, device)
    _pipelines(samples, data, repeats, device)
    return {
        **{name: statistics.median(samples[name]) for name in FIGURES},
        "spread": {name: [min(samples[name]), max(samples[name])] for name in FIGURES},
        "rounds": {name: len(samples[name]) for name in FIGURES},
        "width": width,
        "batch_size": batch_size,
        "data": data.title,
        "dtype": "bfloat16 mixed" if mixed else "float32",
        "device": torch.cuda.get_device_name() if mixed else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (torch, torchvision, lightning)},
        },
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _rounds(repeats: int, what: str):
    """Number the rounds, and say on the error stream where it stands."""
    for i in range(repeats):
        print(f"\r{what}: round {i + 1} of {repeats} ", end="", file=sys.stderr, flush=True)
        yield i
    print(file=sys.stderr)


def _seconds(run, device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _stepper(net: nn.Module, optimizer: torch.optim.Optimizer):
    """A function that takes a training step, of pictures (B, 3, 32, 32) and labels (B,)."""

    def step(images: Tensor, labels: Tensor) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, images.is_cuda):
            loss = cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _recipe_optimizer(task: Classifier) -> torch.optim.Optimizer:
    return torch.optim.SGD(task._parameter_groups(), 0.01, 0.9, nesterov=True, fused=True)


def _steps(samples, width: int, batch_size: int, repeats: int, device: torch.device) -> None:
    """Matrix product, training step, and the step in the notebook's way.

    All on normalized pictures that are on the device: the loader's work is not in it.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, 2048, 2048, device=device, dtype=dtype)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(100, (batch_size,), device=device)
    task = Classifier(width=width, **RECIPE).to(device)
    step = _stepper(task.net, _recipe_optimizer(task))
    last = images.to(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        step(last, labels)
    flop = counter.get_total_flops()
    if device.type == "cuda":
        task.net.compile()
    net = AllCNN(width).to(device)
    notebook = _stepper(net, torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=2e-5))
    small, few = torch.randn(64, 3, 32, 32, device=device), labels[:1].expand(64)
    contenders = {
        "matmul": (8, lambda: a @ b),
        "step": (3, lambda: step(last, labels)),
        "notebook": (-(-3 * batch_size // 64), lambda: notebook(small, few)),
    }
    for _, run in contenders.values():
        run()
    for i in _rounds(repeats, "training step"):
        took = {}
        for name in sorted(contenders, reverse=i % 2 == 1):
            n, run = contenders[name]
            took[name] = _seconds(lambda n=n, run=run: [run() for _ in range(n)], device) / n
        samples["matmul_flop_s"].append(2 * 2048**3 / took["matmul"])
        samples["step_flop_s"].append(flop / took["step"])
        samples["step_pictures_s"].append(batch_size / took["step"])
        samples["notebook_pictures_s"].append(64 / took["notebook"])
        for ratio, x, y in (
            ("fraction_of_matmul", "step_flop_s", "matmul_flop_s"),
            ("step_vs_notebook", "step_pictures_s", "notebook_pictures_s"),
        ):
            samples[ratio].append(samples[x][-1] / samples[y][-1])


class Bench(cli.CLI):
    """The command line's own fit, with one more callback, and its data timed.

    Args:
        args: as for `python -m allconv`.
        callback: comes before all others.
    """

    def __init__(self, args: list[str], callback: Callback):
        self.callback = callback
        super().__init__(args)

    def instantiate_trainer(self, **kwargs):
        """Add the callback."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(0, self.callback)
        return trainer

    def before_fit(self) -> None:
        """Read the data at once; it is not read twice."""
        start = time.time()
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        self.data_s = time.time() - start
        super().before_fit()


class FirstStep(Callback):
    """Notes when the first training step begins."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Only the first counts."""
        self.__dict__.setdefault("time", time.time())


class Laps(Callback):
    """Times the parts of each epoch, and takes bare steps with a copy of the net in turns with it.

    The first epoch warms up and does not count.
    """

    def __init__(self, samples, device: torch.device, rounds):
        self.samples, self.device, self.rounds = samples, device, rounds
        self.batches, self.step = [], None

    def _now(self) -> float:
        return time.perf_counter() + 0 * _seconds(lambda: None, self.device)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        """What came after the last validation has ended; the training part begins."""
        now = self._now()
        if self.step is None:
            bare = copy.deepcopy(pl_module)
            bare.configure_model()
            self.step = _stepper(bare.net, _recipe_optimizer(bare))
        else:
            self.samples["epoch_end_s"].append(now - self.validated - self.bare)
        next(self.rounds)
        self.batches.clear()
        self.start = self._now()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Keep the normalized batch for the bare step."""
        self.batches.append(batch)

    def on_validation_start(self, trainer, pl_module) -> None:
        """The training part has ended; the validation begins."""
        self.middle = self._now()

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        """The validation has ended."""
        self.validated = self._now()
        self.evaluated = pl_module.split_figures["n"].compute().item()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        """The same batches by the bare step."""
        self.bare = _seconds(lambda: [self.step(*batch) for batch in self.batches], self.device)
        if trainer.current_epoch == 0:
            return
        fit, pictures = self.middle - self.start, sum(len(labels) for _, labels in self.batches)
        self.samples["fit_pictures_s"].append(pictures / fit)
        self.samples["bare_pictures_s"].append(pictures / self.bare)
        self.samples["fit_vs_step"].append(self.bare / fit)
        self.samples["eval_pictures_s"].append(self.evaluated / (self.validated - self.middle))


def _fits(samples, flags: dict[str, object], repeats: int, device: torch.device) -> None:
    """Epochs of a real fit in turns with bare steps on their batches."""
    rounds = itertools.chain([0], _rounds(repeats, "fit"))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        extra = {"trainer.max_epochs": repeats + 1, "trainer.default_root_dir": folder}
        Bench(_command(flags | extra), Laps(samples, device, rounds))


def _command(flags: dict[str, object]) -> list[str]:
    return ["fit", *(f"--{key}={json.dumps(v).strip(chr(34))}" for key, v in flags.items())]


CHILD = """import sys, time
from allconv import cli
done = time.time()
from allconv import bench
bench.child(done, sys.argv[1:])
"""


def child(imported: float, args: list[str]) -> None:
    """Run the command of `args` and print when it came how far, and its greatest size.

    Args:
        imported: when the imports had ended.
        args: as for `python -m allconv`.
    """
    first = FirstStep()
    with contextlib.redirect_stdout(io.StringIO()):
        data_s = Bench(args, first).data_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**30 if sys.platform == "darwin" else 2**20  # Linux counts in KiB
    print(json.dumps([imported, data_s, first.time, peak / unit]))


def _starts(samples, flags: dict[str, object], repeats: int) -> None:
    """New processes: the help, and a fit of few steps with validation, end of epoch and all."""
    for _ in _rounds(repeats, "start"):
        help_only = [sys.executable, "-m", "allconv", "--help"]
        start = time.time()
        subprocess.run(help_only, check=True, stdout=subprocess.DEVNULL)
        samples["help_s"].append(time.time() - start)
        with tempfile.TemporaryDirectory() as folder:
            args = _command(flags | {"trainer.default_root_dir": folder})
            start = time.time()
            out = subprocess.run(
                [sys.executable, "-c", CHILD, *args], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
        imported, data_s, first, peak = json.loads(out.splitlines()[-1])
        samples["imports_s"].append(imported - start)
        samples["data_s"].append(data_s)
        samples["setup_s"].append(first - imported - data_s)
        samples["first_step_after_imports_s"].append(first - imported)
        samples["peak_rss_gib"].append(peak)


class OneByOne(Dataset):
    """Picture by picture, as torchvision.datasets.CIFAR100 with ToTensor and Normalize does it."""

    transform = Compose([ToTensor(), Normalize(MEAN, STD)])

    def __init__(self, pictures: Pictures):
        self.data = pictures.images.permute(0, 2, 3, 1).numpy()  # (N, 32, 32, 3)
        self.targets = pictures.labels.tolist()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """A picture (3, 32, 32), normalized, and its label."""
        return self.transform(Image.fromarray(self.data[i])), self.targets[i]


def _pipelines(samples, data: CIFAR100, repeats: int, device: torch.device) -> None:
    """Shuffled, normalized batches on the device, by our loader and by torchvision's way."""
    ours = data.train_dataloader()
    single = OneByOne(data.sets["train"])
    # a share is enough: it is some hundred times slower
    share = torch.utils.data.Subset(single, range(min(4000, len(single))))
    theirs = [
        DataLoader(share, ours.batch_size, True, num_workers=n, persistent_workers=n > 0)
        for n in (0, 2)
    ]

    def run(loader: DataLoader) -> None:
        for images, _ in loader:
            images = images.to(device)
            if loader is ours:
                normalize(images)

    for loader in (ours, *theirs):  # starts the workers, which the figure leaves out
        run(loader)
    for _ in _rounds(repeats, "input pipeline"):
        rates = [len(x.dataset) / _seconds(lambda x=x: run(x), device) for x in (ours, *theirs)]
        names = ("pipeline_pictures_s", "torchvision_0_pictures_s", "torchvision_2_pictures_s")
        for name, rate in zip(names, rates, strict=True):
            samples[name].append(rate)
        samples["pipeline_vs_torchvision"].append(rates[0] / max(rates[1:]))


def table(result: dict[str, object]) -> Table:
    """The figures as a table."""
    title = "AllCNN, width {width}, batch {batch_size}, {dtype}, {device}, {threads} threads"
    made = Table(title=title.format(**result), title_justify="left")
    for name, justify in (("figure", "left"), ("median", "right"), ("spread", "right")):
        made.add_column(name, justify=justify, no_wrap=True)
    made.add_column("meaning")
    for name, (unit, size, meaning) in FIGURES.items():
        values = [x / size for x in (result[name], *result["spread"][name])]
        cells = [f"{x:,.{0 if x >= 1000 else 3 if x < 10 else 1}f}" for x in values]
        made.add_row(name, f"{cells[0]} {unit}".strip(), f"{cells[1]} - {cells[2]}", meaning)
    return made


def main(args: list[str]) -> None:
    """Run the command: a table, or with `--json` the figures, into a file or onto the output."""
    parser = cli.Parser(prog="allconv bench", description=bench.__doc__.splitlines()[0])
    parser.add_function_arguments(bench)
    parser.add_argument(
        "--json", nargs="?", const="-", help="Write JSON to this file; without one, print it."
    )
    given = parser.parse_args(args).as_dict()
    path = given.pop("json")
    cli._quieten()
    try:
        result = bench(**given)
    except cli.USER_ERRORS as error:
        cli.fail(1, error)
    except ValueError as error:
        cli.fail(2, error)
    text = json.dumps(result, indent=2)
    if path == "-":
        print(text)
        return
    if path:
        Path(path).write_text(text + "\n")
    Console(width=None if sys.stdout.isatty() else 110).print(table(result))
