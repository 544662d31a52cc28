"""Fixtures: a folder of one's own, a tiny finished run, the real data set where it is."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from allconv.__main__ import main

# Before torch is imported, and for every process started here: the nets are tiny, and two threads
# that wait for each other on a busy machine made one test take minutes.
os.environ["OMP_NUM_THREADS"] = "1"
# Lightning logs to the stream that it finds when it is imported: not to that of a test
importlib.import_module("lightning.pytorch")

REPO = Path(__file__).resolve().parent.parent
HANGS = 600  # seconds that only a hang takes, however busy the machine
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
RUN = Path("lightning_logs/version_0")
LAST = RUN / "checkpoints/last.ckpt"
TINY = (
    "fit --data.demo true --data.batch_size 16 --model.width 4 --trainer.max_epochs 3 "
    "--trainer.limit_train_batches 9"
).split()
TWO = "--trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp".split()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, so that bare commands can be tried."""
    monkeypatch.chdir(tmp_path)
    # what Lightning tells its child processes, not a next test
    monkeypatch.setenv("PL_GLOBAL_SEED", "")
    monkeypatch.delenv("PL_GLOBAL_SEED")
    yield tmp_path
    for number, handler in HANDLERS.items():  # else Ctrl-C would not stop pytest
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A folder in which a tiny run on the demo set has ended and been tested."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    try:
        main(TINY)
        main(["test"])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(finished_run, own_folder):
    """A copy of the tiny run, in the current folder."""
    shutil.copytree(finished_run, own_folder, dirs_exist_ok=True)
    return RUN


@pytest.fixture(scope="session")
def real_data():
    """The folder of the real CIFAR-100: ALLCONV_DATA_DIR, or ../shared beside the repository."""
    folder = Path(os.environ.get("ALLCONV_DATA_DIR", REPO.parent / "shared"))
    if not (folder / "cifar-100-binary").is_dir():
        pytest.skip(f"no cifar-100-binary in {folder}; name its folder with ALLCONV_DATA_DIR")
    return folder


@pytest.fixture
def refused(capfd):
    """Calls main with arguments that it has to refuse; gives the one line that it says."""

    def call(*args, code):
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        lines = capfd.readouterr().err.splitlines()
        # but for the bar of a download
        lines = [s for s in lines if s.strip() and "%|" not in s and "B/s]" not in s]
        assert len(lines) == 1, lines
        assert "Traceback" not in lines[0]
        assert end.value.code == code, lines
        return lines[0]

    return call


def process(*args, code=None, **kwargs):
    """Start `python -m allconv`, or `code` with its arguments, in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "allconv"]), *map(str, args)]
    kwargs.setdefault("stderr", subprocess.STDOUT)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)


def second_process(running):
    """The number of the process that a `fit` of two has started."""
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    return int(children.read_text().split()[0])


def finish(*args, expected=0, **kwargs):
    """Run `python -m allconv` in a process of its own; gives what it printed."""
    running = process(*args, **kwargs)
    said, _ = running.communicate(timeout=HANGS)
    assert running.returncode == expected, said
    assert "Traceback" not in said
    return said


def wait_until(what, running):
    """Wait for something to happen while a process runs."""
    while not what():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)


def rows(run):
    """Number of epochs in a run's metrics.csv."""
    table = run / "metrics.csv"
    return max(0, len(table.read_text().splitlines()) - 1) if table.exists() else 0


def scalars(run):
    """Every scalar (tag, step, value) in the order in which TensorBoard has it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run), {"scalars": 0}).Reload()
    # val/best_acc and val/best_loss are for the table of hyperparameters, once a session
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith("val/best")]
    return [(tag, event.step, event.value) for tag in tags for event in board.Scalars(tag)]


def assert_same_checkpoint(found, expected):
    """Two checkpoints hold bitwise the same network, optimizer, schedule and epoch."""
    import torch

    found, expected = (torch.load(path, weights_only=True) for path in (found, expected))
    for part in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        _assert_same(found[part], expected[part], part)


def _assert_same(found, expected, name):
    import torch

    assert type(found) is type(expected), name
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), name
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            _assert_same(found[key], value, f"{name} {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), name
        for i, value in enumerate(expected):
            _assert_same(found[i], value, f"{name} {i}")
    else:
        assert found == expected, name


def assert_same_run(found, expected):
    """Two runs are bitwise the same: checkpoints, metrics.csv, TensorBoard's curves."""
    for name in ("best.ckpt", "last.ckpt"):
        assert_same_checkpoint(found / "checkpoints" / name, expected / "checkpoints" / name)
    assert (found / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()
    assert scalars(found) == scalars(expected)
