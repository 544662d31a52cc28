"""`python -m allconv bench`: how near the training is to the limit of this machine.

Contenders take turns in one process; a figure is the median over the rounds, and a ratio is the
median of each round's ratio, since a busy machine's speed changes by the minute.
"""

import contextlib
import copy
import io
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from statistics import median

import lightning
import torch
import torchvision
from lightning.pytorch import Callback
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose, Normalize, ToTensor

from allconv import cli
from allconv.data import CIFAR100, MEAN, STD, Pictures, normalize
from allconv.model import AllCNN
from allconv.task import Classifier

Samples = dict[str, list[float]]  # of each figure, one a round

# The net as the recipes train it: without the notebook's dropout and ReLU on the logits.
RECIPE = {"dropout": 0.0, "rectify_logits": False, "nesterov": True, "decay_norms": False}

FIGURES = {
    "fraction_of_matmul": "training step's FLOP/s / matrix product's",
    "step_vs_notebook": "training step's pictures/s / the notebook's way",
    "fit_vs_step": "fit with data, augmentation, metrics, logs / bare step",
    "pipeline_vs_torchvision": "input pipeline / the better of torchvision's",
    "step_pictures_s": "training step: forward, loss, backward, SGD",
    "step_gflop_s": "the same in GFLOP/s",
    "matmul_gflop_s": "product of two 2048 x 2048 matrices, by BLAS or as a 1x1 convolution",
    "notebook_pictures_s": "step of AllCNN's defaults, NCHW, batch 64, plain SGD",
    "fit_pictures_s": "training part of fit",
    "bare_pictures_s": "bare step on fit's batches, in turns with it",
    "eval_pictures_s": "validation in fit",
    "pipeline_pictures_s": "our loader, normalized",
    "torchvision_0_pictures_s": "torchvision, ToTensor, Normalize, no workers",
    "torchvision_2_pictures_s": "the same with 2 workers",
    "help_s": "python -m allconv --help",
    "imports_s": "from the command to the end of the imports",
    "data_s": "reading, sorting and splitting the pictures",
    "setup_s": "all else before the first training step",
    "first_step_after_imports_s": "data and set-up",
    "peak_rss_gib": "resident memory of fit at its peak",
}


def bench(
    data_dir: str = "data",
    width: int = 64,
    batch_size: int = 128,
    repeats: int = 7,
    demo: bool = False,
) -> dict[str, object]:
    """Measure training, evaluation, input, memory and start-up; let nothing else run meanwhile.

    Takes about two minutes on two CPU cores.

    Args:
        data_dir: folder with the data set, as in fit.
        width: channels after the first convolution.
        batch_size: pictures in a training batch.
        repeats: rounds in which the contenders take turns.
        demo: use the small drawn data set instead.

    Returns:
        The median of each of FIGURES, `spread` (lowest and highest), and what was measured.

    Raises:
        ValueError: an argument is out of its range.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: it must be at least 1")
    data = CIFAR100(os.path.abspath(data_dir), batch_size, demo=demo)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    gpu = device.type == "cuda"  # as configs/gpu.yaml has it
    flags = {
        **{f"model.{key}": value for key, value in {**RECIPE, "width": width}.items()},
        **{f"data.{key}": data.hparams[key] for key in ("data_dir", "batch_size", "demo")},
        **{"data.crop": 4, "data.flip": True, "model.compile": gpu, "trainer.devices": 1},
        **{"trainer.limit_train_batches": 6, "trainer.limit_val_batches": 4},
        **({"trainer.precision": "bf16-mixed"} if gpu else {}),
    }
    data.prepare_data()
    samples: Samples = defaultdict(list)
    # first: Linux counts the size of the process that starts a child into the child's peak
    _starts(samples, flags, min(repeats, 3))
    _steps(samples, width, batch_size, repeats, device)
    _fits(samples, flags, repeats, device)
    _pipelines(samples, data, repeats, device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else [f":{platform.machine()}"]
    name = next((line for line in lines if line.startswith("model name")), lines[0])
    return {
        **{name: median(samples[name]) for name in FIGURES},
        "spread": {name: [min(samples[name]), max(samples[name])] for name in FIGURES},
        "rounds": {name: len(samples[name]) for name in FIGURES},
        **{"width": width, "batch_size": batch_size, "data": data.title},
        "device": torch.cuda.get_device_name() if gpu else name.split(":")[1].strip(),
        "dtype": "bfloat16" if gpu else "float32",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, torchvision, lightning)},
        },
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _rounds(repeats: int, what: str):
    """Number the rounds, and say on the error stream which it is."""
    for i in range(repeats):
        print(f"{what}: round {i + 1} of {repeats}", file=sys.stderr, flush=True)
        yield i


def _add(samples: Samples, **figures: float) -> None:
    for name, value in figures.items():
        samples[name].append(value)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _seconds(run, device: torch.device, times: int = 1) -> float:
    start = _now(device)
    for _ in range(times):
        run()
    return (_now(device) - start) / times


def _stepper(net: nn.Module, optimizer: torch.optim.Optimizer):
    """A function that trains with pictures (B, 3, 32, 32), normalized, and labels (B,)."""

    def step(images: Tensor, labels: Tensor) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss = cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _bare(task: Classifier):
    """The step of the task's net, and nothing around it."""
    groups = task.parameter_groups()
    return _stepper(task.net, torch.optim.SGD(groups, 0.01, 0.9, nesterov=True, fused=True))


def _steps(
    samples: Samples, width: int, batch_size: int, repeats: int, device: torch.device
) -> None:
    """Matrix product, our step and the notebook's, of normalized pictures on the device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, 2048, 2048, device=device, dtype=dtype)
    # the same product by the kernels of the convolutions: MKL's takes twice as long on an AMD
    pixels = a.view(1, 2048, 1, 2048).permute(0, 3, 1, 2)  # (1, 2048, 2048, 1), channels last
    kernels = b.view(2048, 1, 1, 2048).permute(0, 3, 1, 2)  # (2048, 2048, 1, 1), channels last
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    batch = images.to(memory_format=torch.channels_last), torch.arange(batch_size).to(device) % 100
    small = torch.randn(64, 3, 32, 32, device=device), torch.arange(64, device=device)
    task, net = Classifier(width=width, **RECIPE).to(device), AllCNN(width).to(device)
    ours = _bare(task)
    with FlopCounterMode(display=False) as counter:
        ours(*batch)
    if device.type == "cuda":
        task.net.compile()
    notebook = _stepper(net, torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=2e-5))
    contenders = [  # each with how often in a round
        (lambda: a @ b, 4),
        (lambda: conv2d(pixels, kernels), 4),
        (lambda: ours(*batch), 3),
        (lambda: notebook(*small), -(-3 * batch_size // 64)),
    ]
    for run, _ in contenders:
        run()
    for _ in _rounds(repeats, "training step"):
        *products, step, theirs = (_seconds(run, device, times) for run, times in contenders)
        matmul, product, flop = min(products), 2 * 2048**3, counter.get_total_flops()
        _add(
            samples,
            matmul_gflop_s=product / matmul / 1e9,
            step_gflop_s=flop / step / 1e9,
            fraction_of_matmul=flop / step / (product / matmul),
            step_pictures_s=batch_size / step,
            notebook_pictures_s=64 / theirs,
            step_vs_notebook=batch_size / step / (64 / theirs),
        )


class _Bench(cli.CLI):
    """The command line's own fit with one callback more; its `data_s` is what reading took."""

    def __init__(self, args: list[str], callback: Callback):
        self.callback = callback
        super().__init__(args)

    def instantiate_trainer(self, **kwargs):
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(0, self.callback)
        return trainer

    def before_fit(self) -> None:
        start = time.time()
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")  # it is not read twice
        self.data_s = time.time() - start
        super().before_fit()


def _fit(flags: dict[str, object], callback: Callback) -> _Bench:
    """Fit in a folder that is thrown away, saying nothing."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = [f"--{key}={value}" for key, value in flags.items()]
        return _Bench(["fit", *args, f"--trainer.default_root_dir={folder}"], callback)


class _Laps(Callback):
    """Times the parts of an epoch, and a copy of the net on the same batches in turns with it."""

    def __init__(self, samples: Samples, rounds, device: torch.device):
        self.samples, self.rounds, self.device = samples, rounds, device

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 0:
            bare = copy.deepcopy(pl_module)
            bare.configure_model()
            self.step = _bare(bare)
        next(self.rounds)
        self.batches, self.start = [], _now(self.device)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(batch)  # augmented and normalized: that is not in the bare step

    def on_validation_start(self, trainer, pl_module) -> None:
        self.middle = _now(self.device)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.end = _now(self.device)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.step(*self.batches[0])  # after the validation the caches are cold
        bare = _seconds(lambda: [self.step(*batch) for batch in self.batches], self.device)
        fit, n = self.middle - self.start, sum(len(labels) for _, labels in self.batches)
        if trainer.current_epoch:  # the first warms up
            _add(
                self.samples,
                fit_pictures_s=n / fit,
                bare_pictures_s=n / bare,
                fit_vs_step=bare / fit,
                eval_pictures_s=trainer.callback_metrics["val/n"].item() / (self.end - self.middle),
            )


def _fits(samples: Samples, flags: dict[str, object], repeats: int, device: torch.device) -> None:
    rounds = itertools.chain([0], _rounds(repeats, "fit"))
    _fit({**flags, "trainer.max_epochs": repeats + 1}, _Laps(samples, rounds, device))


def _child(imported: float, flags: dict[str, object]) -> None:
    """Fit, and print when the imports had ended, what reading took, the first step, the peak."""
    cli.prepare()
    first, times = Callback(), []
    first.on_train_batch_start = lambda *_: times.append(time.time())
    fit = _fit(flags, first)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**30 if sys.platform == "darwin" else 2**20  # Linux counts in KiB
    print(json.dumps([imported, fit.data_s, times[0], peak / unit]))


def _starts(samples: Samples, flags: dict[str, object], repeats: int) -> None:
    """In new processes: the help, and a fit of few steps with validation and end of epoch."""
    code = (
        "import json, sys, time; from allconv import cli; imported = time.time()\n"
        "from allconv import bench; bench._child(imported, json.loads(sys.argv[1]))"
    )
    given = json.dumps({**flags, "trainer.max_epochs": 1})
    options = {"check": True, "stdout": subprocess.PIPE, "text": True}
    for _ in _rounds(repeats, "start"):
        begin = time.time()
        subprocess.run([sys.executable, "-m", "allconv", "--help"], **options)
        start = time.time()
        out = subprocess.run([sys.executable, "-c", code, given], **options).stdout
        imported, data_s, first, peak = json.loads(out.splitlines()[-1])
        _add(
            samples,
            help_s=start - begin,
            imports_s=imported - start,
            data_s=data_s,
            setup_s=first - imported - data_s,
            first_step_after_imports_s=first - imported,
            peak_rss_gib=peak,
        )


class _OneByOne(Dataset):
    """What torchvision.datasets.CIFAR100 does for a picture, with ToTensor and Normalize."""

    transform = Compose([ToTensor(), Normalize(MEAN, STD)])

    def __init__(self, pictures: Pictures):
        some = pictures.images[::10]  # enough, being so much slower
        self.data = some.permute(0, 2, 3, 1).contiguous().numpy()  # (N, 32, 32, 3)
        self.targets = pictures.labels[::10].tolist()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[i])), self.targets[i]


def _pipelines(samples: Samples, data: CIFAR100, repeats: int, device: torch.device) -> None:
    """Shuffled, normalized batches on the device."""
    data.setup("fit")
    single, size = _OneByOne(data.sets["train"]), data.hparams.batch_size
    workers = {"num_workers": 2, "persistent_workers": True}
    ours, *theirs = loaders = [
        data.train_dataloader(),
        DataLoader(single, size, shuffle=True),
        DataLoader(single, size, shuffle=True, **workers),
    ]

    def run(loader: DataLoader) -> float:
        start = _now(device)
        for images, _ in loader:
            images = images.to(device)
            if loader is ours:
                normalize(images)
        return len(loader.dataset) / (_now(device) - start)

    for loader in theirs:  # the workers start here
        run(loader)
    for _ in _rounds(repeats, "input"):
        rate, alone, two = map(run, loaders)
        _add(
            samples,
            pipeline_pictures_s=rate,
            torchvision_0_pictures_s=alone,
            torchvision_2_pictures_s=two,
            pipeline_vs_torchvision=rate / max(alone, two),
        )


def main(args: list[str]) -> None:
    """Run the command: prints a table, or with `--json` the figures, or writes them to a file."""
    parser = cli.Parser(prog="allconv bench", description=bench.__doc__.splitlines()[0])
    parser.add_function_arguments(bench)
    parser.add_argument("--json", nargs="?", const="-", help="File for the figures; - prints them.")
    given = parser.parse_args(args).as_dict()
    path = given.pop("json")
    with cli.command():
        result = bench(**given)
    if path:
        text = json.dumps(result, indent=2)
        print(text) if path == "-" else Path(path).write_text(text + "\n")
    if path != "-":
        title = "width {width}, batch {batch_size}, {dtype}, {device}, {threads} threads, {date}"
        table = Table("figure", "median", "lowest - highest", "", title=title.format(**result))
        for name, meaning in FIGURES.items():
            values = [f"{x:,.{2 * (x < 1000)}f}" for x in (result[name], *result["spread"][name])]
            table.add_row(name, values[0], " - ".join(values[1:]), meaning)
        Console().print(table)
