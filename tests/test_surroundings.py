"""What the shell, the environment and other processes do to a command."""

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import HANGS, RUN, TINY, TWO, finish, process, rows, scalars, second_process

from allconv import rundir
from allconv.__main__ import main
from allconv.model import AllCNN

FIT = f"fit {' '.join(TINY[1:])} --trainer.enable_model_summary false"


@pytest.mark.parametrize(
    "command",
    ["runs > /dev/full", "runs >&-", pytest.param(f"{FIT} > /dev/full", marks=pytest.mark.slow)],
)
def test_output_that_cannot_be_written_is_one_line(command, run):
    command = f"{sys.executable} -m allconv {command}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("allconv: ")


def test_a_bad_rank_is_named(own_folder, refused, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "abc")
    assert "LOCAL_RANK is abc" in refused("runs", code=2)


def without_capabilities():
    """Before a root process starts: it may then read and write only what the modes allow."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_run_of_somebody_else(run):
    """Tested where it may only be read, its results are printed; unreadable, it is listed."""
    said = {}
    for command, mode in (("test", 0o500), ("runs", 0)):
        try:
            run.chmod(mode)
            child = process(command, preexec_fn=without_capabilities)
            said[command] = child.communicate()[0]
        finally:
            run.chmod(0o700)
    assert "test/acc" in said["test"]
    assert re.search(r"test.json: cannot be written .*; the earlier one is kept", said["test"])
    assert re.search(r"\n0 .* permission denied", said["runs"])


def test_a_tilde_is_the_home_folder(own_folder, monkeypatch, capfd):
    """Also where no shell replaces it: after `=`, and in a file. A space in it can be copied."""
    monkeypatch.setenv("HOME", str(own_folder / "my home"))
    Path("places.yaml").write_text("data: {data_dir: ~/d}\ntrainer: {default_root_dir: ~/r}\n")
    main([*FIT.split(), "--config", "places.yaml", "--trainer.max_epochs", "1"])
    logs = str(own_folder / "my home/r/lightning_logs")
    said = capfd.readouterr().out
    assert f"test --ckpt_path '{logs}/version_0/checkpoints/best.ckpt'\n" in said
    assert f"tensorboard --logdir '{logs}'\n" in said
    main(["test", "--ckpt_path=~/r/lightning_logs/version_0"])
    assert {path.name for path in Path("my home").iterdir()} == {"d", "r"}
    assert Path("my home/r", RUN, "test.json").is_file()
    assert not Path("~").exists()
    assert not Path("lightning_logs").exists()


def test_slurms_tasks_without_nodes_are_one_line(own_folder, refused, monkeypatch):
    for key, value in {"NTASKS": "2", "JOB_NAME": "train", "JOB_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    assert "--ntasks-per-node=2" in refused(*FIT.split(), "--trainer.devices", "1", code=2)


@pytest.mark.slow
def test_without_docstrings_and_with_an_unknown_plot_backend(run):
    settings = {**os.environ, "MPLBACKEND": "foo"}
    for args in (["runs"], ["test"]):
        command = [sys.executable, "-OO", "-m", "allconv", *args]
        done = subprocess.run(command, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_one_run_has_one_process(run, refused):
    more = "fit --ckpt_path last --trainer.max_epochs 4".split()
    with rundir.lock(run):
        assert "another process is training" in refused(*more, code=1)
    main(more)
    assert rows(run) == 4


@pytest.mark.slow
def test_of_two_resumes_at_once_one_wins(run):
    both = [process("fit", "--ckpt_path", "last", "--trainer.max_epochs", "40") for _ in range(2)]
    said = {each.communicate(timeout=HANGS)[0]: each.returncode for each in both}
    assert sorted(said.values()) == [0, 1], said
    loser = next(text for text, code in said.items() if code)
    assert "another process" in loser.splitlines()[-1]
    assert "Traceback" not in loser
    table = (run / "metrics.csv").read_text().splitlines()
    assert len(table) == len(set(table)) == 1 + 40


MEANWHILE = """
import subprocess, sys
from lightning.pytorch import Callback

class Meanwhile(Callback):
    def __init__(self):
        resume = ["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4"]
        subprocess.run([sys.executable, "-m", "allconv", *resume], check=True)
"""


@pytest.mark.slow
def test_a_run_that_went_on_since_it_was_read_is_left_alone(run):
    """Another process trains after the checkpoint was read, and has ended before the lock."""
    Path("meanwhile.py").write_text(MEANWHILE)
    args = "fit --ckpt_path last --trainer.max_epochs 5 --trainer.callbacks+=meanwhile.Meanwhile"
    said = finish(*args.split(), expected=1)
    assert "another process has just resumed this run" in said.splitlines()[-1]
    assert rows(run) == 4


def test_a_file_system_without_locks_is_told(run, capfd, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    main("fit --ckpt_path last --trainer.max_epochs 4".split())
    assert f"{run}: no lock (No locks available)" in capfd.readouterr().err
    assert rows(run) == 4


@pytest.mark.slow
def test_a_clock_that_was_set_back_does_not_mix_the_curves(own_folder):
    """TensorBoard reads the files of a run in the order of the seconds that they are named by."""
    main(TINY)
    expected = scalars(RUN)
    main([*TINY, "--trainer.max_epochs", "2"])
    run = RUN.with_name("version_1")
    (events,) = run.glob("events.*")
    second = events.name.split(".")[3]
    events.rename(events.with_name(events.name.replace(second, "4102444800")))  # 2100
    main("fit --ckpt_path last --trainer.max_epochs 3".split())
    assert len(list(run.glob("events.*"))) == 2
    assert scalars(run) == expected
    main("fit --ckpt_path last --trainer.max_epochs 4".split())
    assert len(list(run.glob("events.*"))) == 3


def test_a_batch_norm_without_values_is_refused_before_training(own_folder, refused):
    tiny = "--model.width 1 --data.batch_size 1 --data.sizes [[1,4]] --trainer.max_epochs 1"
    line = refused("fit", "--data.demo", "true", "--trainer.enable_model_summary", "false",
                   *tiny.split(), code=2)  # fmt: skip
    assert "more than 1 value per channel" in line
    assert not RUN.exists()


def test_weights_that_say_nothing_of_their_network_are_noted(run, capfd):
    torch.save(AllCNN(width=4).state_dict(), "epoch9.pt")
    main("test --ckpt_path epoch9.pt --data.demo true".split())
    assert "model.residuals (taken as False)" in capfd.readouterr().err


def training_in_two(n=1):
    """Two processes that have trained `n` epochs, and the second one's number."""
    running = process(*TINY, "--trainer.max_epochs", "500", *TWO, start_new_session=True)
    while rows(RUN) < n:
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.05)
    return running, second_process(running)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [True, False])
def test_two_processes_end_on_sigterm(everyone, own_folder):
    running, second = training_in_two()
    (os.killpg if everyone else os.kill)(running.pid, signal.SIGTERM)
    running.communicate(timeout=HANGS)
    assert running.returncode in (143, -signal.SIGTERM)
    while not gone(second):
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_process_is_named_and_ends_the_other(own_folder):
    running, second = training_in_two()
    os.kill(second, signal.SIGKILL)
    said, _ = running.communicate(timeout=HANGS)
    assert running.returncode != 0
    assert "rank 1 ended with code -9" in said
    assert "Traceback" not in said
    assert (RUN / "checkpoints/last.ckpt").is_file()
