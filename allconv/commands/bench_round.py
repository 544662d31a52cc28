"""A round of `python -m allconv bench`: the real fit, then what it is compared with."""

import copy
import json
import resource
import sys
import time
from collections.abc import Callable

import torch
from lightning.pytorch import Callback
from torch.nn.functional import conv2d, cross_entropy
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose, Normalize, ToPILImage, ToTensor

from allconv import cli, errors
from allconv.augment import normalize
from allconv.cifar100 import MEAN, STD
from allconv.data import CIFAR100
from allconv.model import AllCNN
from allconv.optim import parameter_groups
from allconv.task import Classifier

IMPORTED = time.time()
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
BATCHES = 6  # in an epoch; the first of two epochs warms up
NET = {"dropout": 0.0, "rectify_logits": False, "nesterov": True, "decay_norms": False}
FIT = {  # as the recipes, and on a GPU configs/gpu.yaml, have it
    **{f"model.{key}": value for key, value in NET.items()},
    **{"model.compile": GPU, "data.crop": 4, "data.flip": True},
    **{"trainer.precision": "bf16-mixed" if GPU else "32-true", "trainer.devices": 1},
    **{"trainer.limit_train_batches": BATCHES, "trainer.limit_val_batches": 4},
    **{"trainer.max_epochs": 2, "trainer.enable_model_summary": False},
    "trainer.callbacks+": "allconv.commands.bench_round.Laps",
}


def main() -> None:
    """Fit with the flags of the command line, measure the contenders, and print the figures."""
    flags = FIT | json.loads(sys.argv[1])
    size = flags["data.batch_size"]
    with errors.command():
        # first: fit also sets how memory is handled
        cli.main(["fit", *(f"--{key}={value}" for key, value in flags.items())])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = _steps(flags["model.width"], size) | _pipelines(Laps.data, size)
    found["fit_images_s"], found["bare_images_s"] = BATCHES * size / Laps.fit, size / Laps.bare
    found["fit_vs_step"] = BATCHES * Laps.bare / Laps.fit
    found["first_step_after_imports_s"] = Laps.first - IMPORTED
    found["peak_rss_gib"] = peak / (2**30 if sys.platform == "darwin" else 2**20)
    print(json.dumps({**found, "device": torch.cuda.get_device_name() if GPU else "CPU"}))


class Laps(Callback):
    """Times the start, the training part of the last epoch, and as many bare steps after it."""

    first, fit, bare, data = 0.0, 0.0, 0.0, None

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        """Begin the training part."""
        Laps.first, self.start = Laps.first or time.time(), _now()

    def on_validation_start(self, trainer, pl_module) -> None:
        """End the training part."""
        Laps.fit, Laps.data = _now() - self.start, trainer.datamodule
        if trainer.current_epoch == 0:  # it warms up
            return
        # at once: the speed of a busy machine changes
        with torch.inference_mode(False), torch.enable_grad():
            step = _bare(copy.deepcopy(pl_module), Laps.data.hparams.batch_size)
            Laps.bare = _seconds(step, BATCHES)


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


def _stepper(net: AllCNN, optimizer: torch.optim.Optimizer, images: torch.Tensor):
    """A training step on normalized images (B, 3, 32, 32), and nothing around it."""
    images, labels = images.to(DEVICE), torch.arange(len(images), device=DEVICE) % 100

    def step() -> None:
        with torch.autocast(DEVICE, DTYPE, enabled=GPU):
            loss = cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _bare(task: Classifier, size: int) -> Callable[[], None]:
    images = torch.randn(size, 3, 32, 32).to(memory_format=torch.channels_last)
    groups = parameter_groups(task.to(DEVICE).train().net, task.hparams)
    task.configure_model()  # compiles it on a GPU
    return _stepper(task.net, torch.optim.SGD(groups, 0.01, 0.9, nesterov=True, fused=True), images)


def _steps(width: int, size: int) -> dict[str, float]:
    """Matrix product, our step and the notebook's, of normalized images on the device."""
    a, b = torch.randn(2, 2048, 2048, device=DEVICE, dtype=DTYPE)
    # the same product by the kernels of the convolutions: MKL's takes twice as long on an AMD
    pixels = a.view(1, 2048, 1, 2048).permute(0, 3, 1, 2)  # (1, 2048, 2048, 1), channels last
    kernels = b.view(2048, 1, 1, 2048).permute(0, 3, 1, 2)  # (2048, 2048, 1, 1), channels last
    net, ours = AllCNN(width).to(DEVICE), _bare(Classifier(width=width, **NET, compile=GPU), size)
    sgd = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=2e-5)
    notebook = _stepper(net, sgd, torch.randn(64, 3, 32, 32))
    with FlopCounterMode(display=False) as counter:
        notebook()
    contenders = (lambda: a @ b, lambda: conv2d(pixels, kernels), ours, notebook)
    *products, step, theirs = map(_seconds, contenders, (4, 4, 3, -(-3 * size // 64)))
    matmul, image = 2 * 2048**3 / min(products) / 1e9, counter.get_total_flops() / 64 / 1e9
    return {
        "matmul_gflop_s": matmul,
        "step_gflop_s": image * size / step,
        "fraction_of_matmul": image * size / step / matmul,
        "step_images_s": size / step,
        "notebook_images_s": 64 / theirs,
        "step_vs_notebook": size / step / (64 / theirs),
    }


def _one_by_one(batch: list) -> list[torch.Tensor]:
    """What torchvision's CIFAR100 does with the images of a batch, each on its own."""
    transform = Compose([ToPILImage(), ToTensor(), Normalize(MEAN, STD)])
    return default_collate([(transform(image), label) for image, label in batch])


def _pipelines(data: CIFAR100, size: int) -> dict[str, float]:
    """Shuffled, normalized batches on the device."""
    images = data.sets["train"].images[::10].permute(0, 2, 3, 1).contiguous().numpy()
    labels = data.sets["train"].labels[::10].tolist()
    single = list(zip(images, labels, strict=True))  # few: it is so slow
    options = {"batch_size": size, "collate_fn": _one_by_one, "shuffle": True}
    ours, none = data.train_dataloader(), DataLoader(single, **options)
    two = DataLoader(single, num_workers=2, persistent_workers=True, **options)

    def drain(loader: DataLoader) -> None:
        for images, _ in loader:
            images = images.to(DEVICE)
            if loader is ours:
                normalize(images, MEAN, STD)

    rates = [len(x.dataset) / _seconds(lambda x=x: drain(x), 1) for x in (ours, none, two)]
    names = ("pipeline_images_s", "torchvision_0_images_s", "torchvision_2_images_s")
    found = dict(zip(names, rates, strict=True))
    return {**found, "pipeline_vs_torchvision": rates[0] / max(rates[1:])}
