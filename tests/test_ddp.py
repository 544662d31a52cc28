"""Two processes on a CPU, through the real command, against one."""

import json
import time
from pathlib import Path

import pytest
from conftest import (
    HANGS,
    LAST,
    REPO,
    RUN,
    TINY,
    assert_same_checkpoint,
    finish,
    process,
    rows,
    scalars,
)

from allconv.__main__ import main

pytestmark = pytest.mark.slow  # each process imports torch and Lightning

TWO = "--trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp".split()
RECORD = 3074  # bytes of an image in the binary form


def test_two_processes_count_each_image_once(own_folder):
    fit = "fit --data.demo true --model.width 4 --trainer.max_epochs 2 --data.val_size 300".split()
    finish(*fit, "--trainer.limit_train_batches", "5", *TWO)
    assert [p.name for p in Path("lightning_logs").iterdir()] == ["version_0"]
    # an odd number of images: the processes hold 251 and 250, and then one batch more and none
    path = Path("data/cifar-100-demo/test.bin")
    whole = path.read_bytes()
    one = "--trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto".split()
    for content, n in ((whole[: 501 * RECORD], 501), (whole + whole[:RECORD], 1001)):
        path.write_bytes(content)
        found = {}
        said = finish("test", *TWO)
        assert f"{n:,} images" in said
        found["two"] = json.loads((RUN / "test.json").read_text())
        main(["test", *one])
        found["one"] = json.loads((RUN / "test.json").read_text())
        for key in ("test/acc", "test/top5", "test/n"):
            assert found["one"][key] == found["two"][key]
        assert found["two"]["test/n"] == n
        assert found["one"]["test/loss"] == pytest.approx(found["two"]["test/loss"], abs=1e-6)


@pytest.mark.parametrize("recipe", ["notebook", "strong"])
def test_resume_of_two_processes_is_exact(recipe, own_folder):
    fit = "fit --data.demo true --model.width 4 --trainer.limit_train_batches 6".split()
    # without what is a share of max_epochs, since that changes when the run goes on
    options = {
        "notebook": "--model.milestones [1] --model.dropout 0.2",
        "strong": f"--config {REPO}/configs/strong.yaml --model.warmup null --data.sizes []",
    }
    settings = ["fit", *options[recipe].split(), *fit[1:], *TWO]
    finish(*settings, "--trainer.max_epochs", "3")
    finish(*settings, "--trainer.max_epochs", "2")
    finish("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3")
    resumed = RUN.with_name("version_1")
    assert_same_checkpoint(resumed / "checkpoints/last.ckpt", LAST)
    assert (resumed / "metrics.csv").read_text() == (RUN / "metrics.csv").read_text()
    assert scalars(resumed) == scalars(RUN)


def test_two_processes_touch_no_other_runs_table(run):
    before = (run / "metrics.csv").read_text()
    finish(*TINY, "--trainer.max_epochs", "1", *TWO)
    finish("fit", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert (run / "metrics.csv").read_text() == before
    assert rows(run.with_name("version_1")) == 2


def test_a_process_that_fails_ends_the_run_with_its_own_error(own_folder):
    """The second process finds the data cut off, while the first waits for it."""
    main([*TINY, "--trainer.fast_dev_run", "1"])  # draws the demo set
    running = process(*TINY, *TWO)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    while not children.read_text():
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.05)
    Path("data/cifar-100-demo/train.bin").write_bytes(b"cut")
    said, _ = running.communicate(timeout=HANGS)
    assert running.returncode != 0
    assert "data/cifar-100-demo/train.bin: expected a multiple of 3,074 bytes, found 3" in said
