"""Fixtures: a folder of one's own, a tiny finished run, the real data set where it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from allconv.__main__ import main

# Before torch is imported, and for every process started here: the nets are tiny, and two threads
# that wait for each other on a busy machine made one test take minutes.
os.environ["OMP_NUM_THREADS"] = "1"

REPO = Path(__file__).resolve().parent.parent
TINY = (
    "fit --data.demo true --model.width 4 --trainer.max_epochs 3 --trainer.limit_train_batches 9"
).split()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, so that bare commands can be tried."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    return Path("lightning_logs/version_0")


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
        lines = [s for s in capfd.readouterr().err.splitlines() if s.strip() and "%|" not in s]
        assert end.value.code == code
        assert len(lines) == 1, lines
        assert "Traceback" not in lines[0]
        return lines[0]

    return call


def process(*args, code=None, **kwargs):
    """Start `python -m allconv`, or `code` with its arguments, in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "allconv"]), *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )
