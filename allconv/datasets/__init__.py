"""Chooses the data set: CIFAR-100, the demo set, or a folder of your own images.

Each has a `title`, its `classes` in label order, its `superclasses`, and the methods `prepare`,
`load` and `digest`; see `allconv.datasets.cifar100.Official`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from allconv.datasets.cifar100 import Official
from allconv.datasets.demo import Demo
from allconv.datasets.folder import ImageFolder


def choose(
    data_dir: str = "data",
    demo: bool = False,
    folder: str | None = None,
    classes: Sequence[str] | None = None,
) -> Official | ImageFolder:
    """The data set for the data module's arguments of these names.

    `classes` are a folder's class names where they are known, for example from a checkpoint.
    """
    if folder is not None:
        return ImageFolder.at(os.path.expanduser(folder), classes)
    path = Path(os.path.expanduser(data_dir))  # in a YAML file, no shell does
    return Demo(path) if demo else Official(path)
