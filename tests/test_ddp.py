"""Two processes on a CPU, through the real command, against one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    HANGS,
    LAST,
    REPO,
    RUN,
    TINY,
    TWO,
    assert_same_checkpoint,
    finish,
    process,
    rows,
    scalars,
    wait_until,
)

from allconv.__main__ import main

pytestmark = pytest.mark.slow  # each process imports torch and Lightning

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


LEAVE = """
import os, time
import torch
from lightning.pytorch import Callback

class Leave(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1:
            torch.distributed.destroy_process_group()
            time.sleep(2)
            os._exit(3)
"""


def test_a_process_that_takes_a_moment_to_exit_is_named(own_folder):
    """The first process sees the closed connection before the second one has ended."""
    Path("leave.py").write_text(LEAVE)
    path = os.pathsep.join([str(own_folder), *sys.path])
    flag = "--trainer.callbacks+=leave.Leave"
    said = finish(*TINY, *TWO, flag, expected=1, env={**os.environ, "PYTHONPATH": path})
    assert said.splitlines()[-1] == "allconv: rank 1 ended with code 3"
    assert "Traceback" not in said


def test_ctrl_c_is_one_line_that_names_the_run(run):
    running = process(*TINY, "--trainer.max_epochs", "500", *TWO, start_new_session=True)
    resumed = run.with_name("version_1")
    wait_until(lambda: rows(resumed), running)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    said, _ = running.communicate(timeout=HANGS)
    (line,) = (line for line in said.splitlines() if line.startswith("allconv: "))
    assert running.returncode == 130
    assert line.endswith(f"--ckpt_path {resumed}/checkpoints/last.ckpt")


def test_a_loss_that_is_not_finite_is_one_line(own_folder):
    said = finish(*TINY, *TWO, "--model.lr", "1e30", expected=1)
    (line,) = (line for line in said.splitlines() if line.startswith("allconv: "))
    assert "start again with a lower model.lr" in line


def test_an_error_of_all_processes_is_told_once(own_folder):
    said = finish(*TINY, *TWO, "--trainer.sync_batchnorm", "true", expected=2)
    (line,) = (line for line in said.splitlines() if line.startswith("allconv: "))
    assert "SyncBatchNorm" in line


PLAIN = """
from pathlib import Path
import lightning
from allconv import CIFAR100, Classifier
trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp",
                            limit_train_batches=2, logger=False, enable_checkpointing=False)
task, data = Classifier(width=2), CIFAR100(demo=True)
trainer.fit(task, data)
validated = trainer.callback_metrics["val/n"]
trainer.test(task, data)
tested = trainer.callback_metrics["test/n"]
Path(f"counted-{trainer.global_rank}").write_text(f"{validated:.0f} {tested:.0f}")
"""


def test_a_plain_trainer_of_two_processes_counts_each_image_once(own_folder):
    Path("plain.py").write_text(PLAIN)
    subprocess.run([sys.executable, "plain.py"], check=True, timeout=HANGS, capture_output=True)
    counted = [Path(f"counted-{rank}").read_text() for rank in range(2)]
    assert counted == ["800 1000"] * 2


RECORD_LABELS = """
from pathlib import Path
import torch
from lightning.pytorch import Callback

class Labels(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        name = f"{trainer.world_size}-{batch_idx}-{trainer.global_rank}.pt"
        torch.save(batch[1], Path(__file__).with_name(name))
"""


def test_each_step_sees_the_same_images_whatever_the_number_of_processes(own_folder):
    """1, 2 and 4 processes with batches of 40, 20 and 10."""
    Path("record.py").write_text(RECORD_LABELS)
    fit = "fit --data.demo true --model.width 2 --trainer.max_epochs 1 --trainer.accelerator cpu"
    limits = "--trainer.limit_train_batches 3 --trainer.limit_val_batches 1"
    seen = {}
    for n in (1, 2, 4):
        strategy = "ddp" if n > 1 else "auto"
        finish(
            *f"{fit} {limits} --trainer.devices {n} --trainer.strategy {strategy}".split(),
            *f"--data.batch_size {40 // n} --trainer.callbacks+=record.Labels".split(),
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(own_folder), *sys.path])},
        )
        seen[n] = [
            torch.cat([torch.load(f"{n}-{step}-{rank}.pt") for rank in range(n)]).sort().values
            for step in range(3)
        ]
    for step in range(3):
        assert len(seen[1][step]) == 40
        assert seen[1][step].equal(seen[2][step])
        assert seen[1][step].equal(seen[4][step])


def test_torchrun_starts_its_processes(own_folder):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    said = subprocess.run(
        [*launcher, "-m", "allconv", *TINY, "--trainer.max_epochs", "1", *TWO],
        text=True,
        check=True,
        capture_output=True,
        timeout=HANGS,
    ).stdout
    assert "2 x cpu" in said
    assert [p.name for p in Path("lightning_logs").iterdir()] == ["version_0"]
    assert rows(RUN) == 1


def test_slurm_starts_the_processes(own_folder):
    """As srun does: two tasks with SLURM's variables, and none of them starts another."""
    main([*TINY, "--trainer.fast_dev_run", "1"])  # draws the demo set
    job = {
        "NTASKS": 2,
        "NTASKS_PER_NODE": 2,
        "JOB_ID": 7,
        "JOB_NAME": "job",
        "NODELIST": "localhost",
    }
    tasks = []
    for rank in (0, 1):
        of_task = job | {"PROCID": rank, "LOCALID": rank, "NODEID": 0}
        variables = {f"SLURM_{key}": str(value) for key, value in of_task.items()}
        tasks.append(
            process(*TINY, "--trainer.max_epochs", "1", *TWO, env={**os.environ, **variables})
        )
    said = [task.communicate(timeout=HANGS)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "2 x cpu" in said[0]
    assert rows(RUN) == 1
