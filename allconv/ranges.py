"""The ranges of the settings of model and data; a value outside is a ValueError."""

from collections.abc import Mapping


def check_model(h: Mapping) -> None:
    """Check the settings of `allconv.Classifier`."""
    rules = {
        "lr": (h.lr > 0, "above 0"),
        "momentum": (0 <= h.momentum < 1, "at least 0 and below 1"),
        "weight_decay": (h.weight_decay >= 0, "at least 0"),
        "milestones": (all(m > 0 for m in h.milestones), "a list of numbers above 0"),
        "gamma": (h.gamma > 0, "above 0"),
        "warmup": (h.warmup is None or 0 <= h.warmup < 1, "null, or from 0 to below 1"),
        "muon_lr": (h.muon_lr >= 0, "at least 0"),
        "label_smoothing": (0 <= h.label_smoothing < 1, "from 0 to below 1"),
    }
    _check("model", h, rules)


def check_data(h: Mapping) -> None:
    """Check the settings of `allconv.CIFAR100`."""
    step = 100 if h.folder is None else 1  # the same number of each class
    val_right = 0 <= h.val_size < 50_000 and h.val_size % step == 0
    shares = [share for share, _ in h.sizes]
    sizes_right = all(0 < share <= 1 and 4 <= size <= 32 for share, size in h.sizes)
    rules = {
        "batch_size": (h.batch_size >= 1, "at least 1"),
        "val_size": (val_right, f"from 0 to {50_000 - step} in steps of {step}"),
        "split_seed": (0 <= h.split_seed < 2**32, f"from 0 to {2**32 - 1}"),
        "crop": (0 <= h.crop < 32, "from 0 to 31"),
        "sizes": (
            sizes_right and shares == sorted(set(shares)),
            "pairs of a share in (0, 1], ascending, and a size from 4 to 32",
        ),
        "cutmix": (0 <= h.cutmix <= 1, "from 0 to 1"),
        "folder": (not (h.demo and h.folder), "null when data.demo is true"),
    }
    _check("data", h, rules)


def _check(group: str, values: Mapping[str, object], rules: dict[str, tuple[bool, str]]) -> None:
    """Raise ValueError for a setting out of range.

    `rules` maps a setting to whether its rule is met, and to the rule as text.
    """
    for name, (kept, rule) in rules.items():
        if not kept:
            raise ValueError(f"{group}.{name} is {values[name]}: it must be {rule}")
