"""allconv: the All-Convolutional Net on CIFAR-100, a parameter-efficient baseline.

net = allconv.load("pretrained")
logits = net(net.preprocess("cat.jpg")[None])
print(net.classes[logits.argmax()])
"""

from importlib import import_module

HOMES = {"AllCNN": "allconv.model", "Classifier": "allconv.task", "CIFAR100": "allconv.data"}
__all__ = ["CIFAR100", "AllCNN", "Classifier", "load"]


def __getattr__(name: str):
    """Import a name on first use, so that `import allconv` is cheap."""
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("allconv")
    raise AttributeError(f"module 'allconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def load(name: str = "pretrained"):
    """A trained network, ready to use.

    Args:
        name: a value of --ckpt_path: "pretrained" (the packaged weights), "best" or "last" (of
            the newest run in ./lightning_logs), a checkpoint file or a run directory.

    Returns:
        `allconv.AllCNN` in eval mode on the CPU: (B, 3, 32, 32) to logits (B, classes), with
        `classes`, the class names in the order of the logits, and `preprocess`, which turns an
        image file, a Pillow image, a uint8 array or tensor into the network's input, see
        `allconv.datasets.images.preprocess`.

    Raises:
        allconv.checkpoints.CheckpointError: the checkpoint is missing or damaged.
    """
    from allconv import checkpoints
    from allconv.datasets import images

    checkpoint = checkpoints.load(checkpoints.find(name, key="name"))
    net = checkpoint.net()
    net.classes = checkpoint.classes
    net.preprocess = images.preprocess
    return net
