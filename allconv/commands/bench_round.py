"""One round of `python -m allconv bench`: a real `fit`, then what it is compared with."""

import json
import resource
import sys
import time
from collections.abc import Callable

import torch
from lightning.pytorch import Callback
from torch.nn.functional import conv2d, cross_entropy
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.transforms import Compose, Normalize, ToTensor

from allconv import errors
from allconv.augment import normalize
from allconv.data import CIFAR100
from allconv.datasets.cifar100 import MEAN, STD
from allconv.model import AllCNN
from allconv.optim import parameter_groups
from allconv.task import Classifier
from allconv.training import cli

IMPORTED = time.time()
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
BATCHES = 6  # in an epoch; the first of two epochs warms up
# as in the recipes, and on a GPU as in configs/gpu.yaml
FIT = f"""fit --model.dropout=0 --model.rectify_logits=false --model.nesterov=true
    --model.decay_norms=false --model.compile={GPU} --data.crop=4 --data.flip=true
    --trainer.precision={"bf16-mixed" if GPU else "32-true"} --trainer.devices=1
    --trainer.limit_train_batches={BATCHES} --trainer.limit_val_batches=4 --trainer.max_epochs=2
    --trainer.enable_model_summary=false --trainer.callbacks+=allconv.commands.bench_round.Laps"""


def main() -> None:
    """Fit with the flags of the command line, measure the rest, and print all figures as JSON."""
    with errors.command():
        cli.main(FIT.split() + sys.argv[1:])  # first: fit also sets how memory is handled
    task, data = Laps.trainer.lightning_module, Laps.trainer.datamodule
    found = Laps.found | _steps(task, data.hparams.batch_size) | _pipelines(data)
    best = max(found["torchvision_0_images_s"], found["torchvision_2_images_s"])
    ratios = {
        "fraction_of_matmul": found["step_gflop_s"] / found["matmul_gflop_s"],
        "step_vs_notebook": found["step_images_s"] / found["notebook_images_s"],
        "fit_vs_step": found["fit_images_s"] / found["step_images_s"],
        "pipeline_vs_torchvision": found["pipeline_images_s"] / best,
        "device": torch.cuda.get_device_name() if GPU else "CPU",
    }
    print(json.dumps(ratios | found))


class Laps(Callback):
    """Times the start-up, and the training part of the last epoch."""

    trainer, found = None, {}

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        """Start timing."""
        Laps.found.setdefault("first_step_after_imports_s", time.time() - IMPORTED)
        Laps.trainer, self.start = trainer, _now()

    def on_validation_start(self, trainer, pl_module) -> None:
        """Stop timing: the training part is over."""
        images, seconds = BATCHES * trainer.datamodule.hparams.batch_size, _now() - self.start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Laps.found["fit_images_s"] = images / seconds
        Laps.found["peak_rss_gib"] = peak / (2**30 if sys.platform == "darwin" else 2**20)


def _now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(run: Callable[[], object], times: int) -> float:
    run()  # warms up
    start = _now()
    for _ in range(times):
        run()
    return (_now() - start) / times


def _step(net: AllCNN, optimizer: torch.optim.Optimizer, images: torch.Tensor):
    """A bare training step on normalized images (B, 3, 32, 32), as a function."""
    images, labels = images.to(DEVICE), torch.arange(len(images), device=DEVICE) % 100

    def step() -> None:
        with torch.autocast(DEVICE, DTYPE, enabled=GPU):
            loss = cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _steps(task: Classifier, size: int) -> dict[str, float]:
    """The bare step of our net, a matrix product, and the notebook's step."""
    images = torch.randn(size, 3, 32, 32).to(memory_format=torch.channels_last)
    groups = parameter_groups(task.train().net.to(DEVICE), task.hparams)
    ours = _step(task.net, torch.optim.SGD(groups, 0.01, 0.9, nesterov=True, fused=True), images)
    net = AllCNN(task.hparams.width).to(DEVICE)
    sgd = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=2e-5)
    notebook = _step(net, sgd, torch.randn(64, 3, 32, 32))
    a, b = torch.randn(2, 2048, 2048, device=DEVICE, dtype=DTYPE)
    # the same product with the convolution kernels: MKL's takes twice as long on an AMD CPU
    pixels = a.view(1, 2048, 1, 2048).permute(0, 3, 1, 2)  # (1, 2048, 2048, 1), channels last
    kernels = b.view(2048, 1, 1, 2048).permute(0, 3, 1, 2)  # (2048, 2048, 1, 1), channels last
    with FlopCounterMode(display=False) as counter:
        notebook()
    step = _seconds(ours, BATCHES)
    product = min(_seconds(lambda: a @ b, 4), _seconds(lambda: conv2d(pixels, kernels), 4))
    return {
        "matmul_gflop_s": 2 * 2048**3 / product / 1e9,
        "step_gflop_s": counter.get_total_flops() / 64 * size / step / 1e9,
        "step_images_s": size / step,
        "notebook_images_s": 64 / _seconds(notebook, -(-BATCHES * size // 64)),
    }


def _pipelines(data: CIFAR100) -> dict[str, float]:
    """Shuffled, normalized batches on the device: ours, and torchvision's with 0 or 2 workers."""
    theirs, ours = object.__new__(datasets.CIFAR100), data.sets["train"]  # needs no files
    # a tenth: it is slow
    theirs.data = ours.images[::10].permute(0, 2, 3, 1).contiguous().numpy()
    theirs.targets, theirs.target_transform = ours.labels[::10].tolist(), None
    theirs.transform = Compose([ToTensor(), Normalize(MEAN, STD)])
    rate = _images_s(data.train_dataloader(), lambda batch: normalize(batch, MEAN, STD))
    found, size = {"pipeline_images_s": rate}, data.hparams.batch_size
    for n in (0, 2):
        loader = DataLoader(theirs, size, shuffle=True, num_workers=n, persistent_workers=n > 0)
        found[f"torchvision_{n}_images_s"] = _images_s(loader, torch.Tensor.float)
    return found


def _images_s(loader: DataLoader, finish: Callable[[torch.Tensor], torch.Tensor]) -> float:
    def drain() -> None:
        for images, _ in loader:
            finish(images.to(DEVICE))

    return len(loader.dataset) / _seconds(drain, 1)
