"""allconv: the All-Convolutional Net on CIFAR-100, a parameter-efficient baseline.

net = allconv.load("pretrained")
logits = net(net.preprocess("cat.jpg")[None])
print(net.classes[logits.argmax()])
"""


def load(name: str = "pretrained"):
    """A trained net, ready to use.

    Args:
        name: as --ckpt_path has it: "pretrained" (the packaged weights), "best" or "last" (of the
            newest run in ./lightning_logs), or a checkpoint file.

    Returns:
        `allconv.model.AllCNN` in eval mode on the CPU: (B, 3, 32, 32) to logits (B, 100), with
        `classes`, the 100 names in the order of the logits, and `preprocess`, which makes a file
        or Pillow picture (3, 32, 32), see `allconv.pictures.preprocess`.

    Raises:
        allconv.runs.CheckpointError: there is no such checkpoint, or it is of another net.
    """
    # here, so that importing allconv (for --help, say) does not import torch
    from pathlib import Path

    from allconv import data, demo, pictures, runs

    checkpoint = runs.load(runs.find_checkpoint(str(name), Path(runs.LOGS), "name"))
    net = runs.net_of(checkpoint)
    net.classes = demo.CLASSES if checkpoint.facts.get("demo") else data.CLASSES
    net.preprocess = pictures.preprocess
    return net
