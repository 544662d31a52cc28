"""A stopped run goes on exactly: weights, metrics.csv and TensorBoard as if never stopped."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    HANGS,
    LAST,
    REPO,
    RUN,
    TINY,
    assert_same_checkpoint,
    assert_same_run,
    finish,
    process,
    rows,
    wait_until,
)

from allconv.__main__ import main
from allconv.rundir import read_metrics, write_atomic
from allconv.task import Classifier

# dropout, augmentation and both kinds of schedule
RECIPES = {
    "notebook": "--model.milestones [1,3] --model.dropout 0.2",
    "strong": "--model.warmup 0.3 --model.muon_lr 0.05 --model.decay_norms false --data.crop 4 "
    "--data.flip true --data.sizes [[0.3,20],[0.6,24]] --data.cutmix 0.5 --model.whiten true "
    "--model.dropout 0.1",
}
FIT = "fit --data.demo true --model.width 4 --trainer.max_epochs 4".split()
SLOW = pytest.mark.slow
RESUME = ["fit", "--ckpt_path", "last"]


@pytest.mark.parametrize("recipe", [pytest.param("notebook", marks=SLOW), "strong"])
def test_killed_and_resumed_equals_never_stopped(recipe, own_folder, monkeypatch):
    """Twice killed with SIGKILL, once in the first epoch, each time resumed in a new process."""
    settings = [*FIT, *RECIPES[recipe].split(), "--trainer.limit_train_batches", "8"]
    main(settings)
    whole = RUN.absolute()

    Path("stopped").mkdir()
    monkeypatch.chdir("stopped")
    for args, epochs in ((settings, 0), (RESUME, 2)):
        running = process(*args)
        # last.ckpt is there from before the first step on
        wait_until(lambda n=epochs: LAST.exists() and rows(RUN) >= n, running)
        running.kill()
        said, _ = running.communicate(timeout=HANGS)
        assert running.returncode == -signal.SIGKILL, said
    main(RESUME)
    assert_same_run(RUN, whole)
    assert len(list(Path("lightning_logs").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("steps", [pytest.param(3, marks=SLOW), 11])
def test_stopped_inside_an_epoch_and_resumed_equals_never_stopped(steps, own_folder, capfd):
    """All that fast.yaml uses, and dropout."""
    settings = [
        *("fit", "--config", str(REPO / "configs/fast.yaml"), "--model.dropout", "0.1"),
        *"--data.demo true --model.width 4 --trainer.max_epochs 4".split(),
        *"--trainer.limit_train_batches 4".split(),
    ]
    main(settings)
    main([*settings, "--trainer.max_steps", str(steps)])
    said = capfd.readouterr().out
    epoch = steps // 4  # whole ones
    assert f"stopped in epoch {epoch + 1} at step {steps}" in said
    assert f"last.ckpt holds {epoch} whole" in said
    stopped = RUN.with_name("version_1")
    assert rows(stopped) == epoch
    content = torch.load(stopped / "checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 4 * epoch
    main(RESUME)  # to the same step
    more = f"fit --ckpt_path {stopped}/checkpoints/last.ckpt --trainer.max_steps -1"
    said = capfd.readouterr().out
    assert f"stopped in epoch {epoch + 1} at step {steps}" in said
    assert f"resume with: python -m allconv {more}\n" in said
    main(more.split())
    assert "changed:" not in capfd.readouterr().out
    assert_same_run(stopped, RUN)


def test_a_resumed_run_keeps_its_limit_of_steps(own_folder, capfd, refused):
    main([*TINY, "--trainer.max_steps", "14"])
    main([*TINY, "--trainer.max_steps", "9"])
    hint = "9 steps are done; set --trainer.max_steps above 9, or to -1"
    assert hint in refused(*RESUME, code=2)
    main([*RESUME, "--trainer.max_steps", "14"])
    said = capfd.readouterr().out
    assert "stopped in epoch 2 at step 14: last.ckpt holds 1 whole epoch;" in said
    stopped = RUN.with_name("version_1")
    assert_same_run(stopped, RUN)
    main([*TINY, "--trainer.max_epochs", "-1", "--trainer.max_steps", "5"])
    assert "--trainer.max_steps 10\n" in capfd.readouterr().out


def test_stopped_in_the_first_epoch_is_not_tested_but_goes_on(own_folder, capfd, refused):
    main([*TINY, "--trainer.max_steps", "5"])
    said = capfd.readouterr().out
    assert "last.ckpt holds 0 whole epochs" in said
    assert "allconv test" not in said
    assert torch.load(LAST, weights_only=True)["global_step"] == 0
    assert not (RUN / "metrics.csv").exists()
    assert not LAST.with_name("best.ckpt").exists()
    for command in ("test", "validate"):
        assert "first epoch" in refused(command, "--ckpt_path", "last", code=1)
    assert not list(RUN.glob("*.json"))
    main([*RESUME, "--trainer.max_epochs", "1", "--trainer.max_steps", "-1"])
    assert rows(RUN) == 1


def test_max_time_ends_a_run_after_a_whole_epoch(own_folder, capfd):
    main([*TINY, "--trainer.max_epochs", "500", "--trainer.max_time", "00:00:00:01"])
    done = rows(RUN)
    assert 0 < done < 500
    assert f"holds {done} whole epoch" in capfd.readouterr().out
    assert torch.load(LAST, weights_only=True)["global_step"] == 9 * done
    main([*RESUME, "--trainer.max_epochs", str(done + 1)])
    assert rows(RUN) == done + 1
    assert "whole epoch" not in capfd.readouterr().out
    main([*RESUME, "--trainer.max_epochs", "500"])  # as long again
    assert done + 1 < rows(RUN) < 500


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=SLOW)]
)
def test_signals_end_with_their_code_and_the_way_on(number, code, own_folder):
    running = process(*TINY, "--trainer.max_epochs", "500", stderr=subprocess.PIPE)
    wait_until(lambda: rows(RUN), running)
    running.send_signal(number)
    _, error = running.communicate(timeout=HANGS)
    assert running.returncode == code, error
    # after the table of layers, whose last line Lightning 2.5 does not have
    lines = re.split("Modules in eval mode|Total Flops", error)[-1].strip().splitlines()
    assert len(lines) == 1, error
    assert f"resume with: python -m allconv fit --ckpt_path {LAST}" in lines[0]
    for part in ("net.conv9", "[1, 4, 32, 32]", "[1, 8, 16, 16]", "[1, 16, 8, 8]", "7.3 K"):
        assert part in error
    assert "MulticlassAccuracy" not in error


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code"), [("SystemExit(143)", 143), ("SystemExit(130)", 130)])
@pytest.mark.parametrize("place", ["while_loading()", "write_atomic(Path('x'), while_writing)"])
def test_a_signal_in_a_c_extension_ends_with_its_code(stop, code, place, own_folder):
    """It makes another error of what a signal raises: seen with matplotlib's and torch's."""
    Path("strike.py").write_text(
        f"""
import lightning.pytorch
from pathlib import Path
from allconv.rundir import write_atomic

def while_loading():
    raise ImportError("failed") from {stop}

def while_writing(file):
    try:
        raise {stop}
    except BaseException:
        raise RuntimeError("unexpected pos")

class Strike(lightning.pytorch.Callback):
    def on_train_batch_end(self, *_):
        {place}
"""
    )
    said = finish(*TINY, "--trainer.callbacks+=strike.Strike", expected=code)
    assert said.splitlines()[-1].startswith("allconv: ")


@SLOW
@pytest.mark.parametrize("pause", [0.0001, 0.05])
def test_ctrl_c_twice_is_ctrl_c(pause, own_folder):
    running = process(*FIT, "--trainer.max_epochs", "500")
    wait_until(lambda: rows(RUN), running)
    for _ in range(2):
        running.send_signal(signal.SIGINT)
        time.sleep(pause)
    said, _ = running.communicate(timeout=HANGS)
    assert running.returncode == 130, said
    assert said.splitlines()[-1].startswith("allconv: ")
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
# at whose loading a process is struck: of allconv.errors, torch, and what follows
@pytest.mark.parametrize(
    "libraries",
    [["/_yaml", "/_multiarray_umath"], pytest.param(["/libtorch_cpu", "/_imaging"], marks=SLOW)],
    ids=" ".join,
)
def test_signals_in_the_first_second(libraries, number, own_folder):
    """At random moments while the program is imported."""
    rng = random.Random(int(os.environ.get("ALLCONV_SEED", 0)))
    for library in libraries:
        running = process(*FIT, stderr=subprocess.PIPE)
        maps = Path(f"/proc/{running.pid}/maps")
        wait_until(lambda maps=maps, library=library: library in maps.read_text(), running)
        time.sleep(rng.uniform(0, 0.1))
        running.send_signal(number)
        said, error = running.communicate(timeout=HANGS)
        assert (running.returncode, said) == (128 + number, ""), (library, error)
        assert len(error.splitlines()) == 1, (library, error)
        assert error.startswith("allconv: "), (library, error)
    assert not RUN.parent.exists()


def kept(run):
    """Hard links of a run's files; they hold the old content if a file is replaced as a whole."""
    links = {}
    for path in run.rglob("*"):
        if path.is_file() and not path.name.startswith("events."):  # they are appended to
            links[path] = Path("kept") / path.name
            links[path].parent.mkdir(exist_ok=True)
            os.link(path, links[path])
    return links


def test_longer_is_the_same_run_with_one_flag_and_files_are_replaced_whole(run, capfd):
    main(["test", "--ckpt_path", "last"])
    links = kept(run)
    before = {path: path.read_bytes() for path in links}
    for folder in (run, run / "checkpoints"):  # what a kill in a write left
        (folder / ".1234abcd.writing").write_bytes(b"half of it")
    main([*RESUME, "--trainer.max_epochs", "4"])
    assert "changed:" not in capfd.readouterr().out  # milestones: the epochs so far are the same
    main(["test", "--ckpt_path", "last"])
    assert rows(run) == 4
    assert not list(run.rglob("*.writing"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 4
    assert config["ckpt_path"] is None
    for name in ("config.yaml", "metrics.csv", "curves.png", "test_last.json",
                 "test_last.png", "test_last_confusion.png", "checkpoints/last.ckpt"):  # fmt: skip
        path = run / name
        assert path.read_bytes() != before[path], name
        assert links[path].read_bytes() == before[path], name  # not written in place


@SLOW
def test_killed_while_a_file_is_written(run):
    """SIGKILL as soon as a resume begins to write config.yaml leaves the old one or the new."""
    path = run / "config.yaml"
    old = path.read_text()
    longer = [*RESUME, "--trainer.max_epochs", "4"]
    running = process(*longer)
    while not list(run.glob("*.writing")) and path.read_text() == old:  # as fast as it goes
        assert running.poll() is None, running.communicate()
    running.kill()
    running.communicate(timeout=HANGS)
    found = path.read_text()
    main(longer)
    assert found in (old, path.read_text())
    assert "max_epochs: 4" in path.read_text()


def test_a_write_that_is_killed_keeps_the_earlier_file(own_folder):
    code = (
        "import os, sys; from pathlib import Path; from allconv.rundir import write_atomic\n"
        "def write(file): file.write(b'half of it'); file.flush(); os.kill(os.getpid(), 9)\n"
        "write_atomic(Path(sys.argv[1]), write)"
    )
    Path("file").write_text("before")
    running = process("file", code=code)
    running.communicate(timeout=HANGS)
    assert running.returncode == -signal.SIGKILL
    assert Path("file").read_text() == "before"


def test_two_writers_of_one_file_leave_a_whole_one(own_folder):
    """As two containers do that draw the demo set into one folder, with the same process number."""

    def write(file):
        file.write(b"first ")
        write_atomic(Path("file"), lambda other: other.write(b"the other's"))
        file.write(b"and last")

    write_atomic(Path("file"), write)
    assert Path("file").read_text() == "first and last"
    assert [path.name for path in Path().iterdir()] == ["file"]


# every epoch is kept; the second of three is the only one that is validated, and so the best
KEPT = {"filename": "epoch{epoch}", "auto_insert_metric_name": False, "save_top_k": -1}
KEPT |= {"save_on_train_epoch_end": True, "enable_version_counter": False}
SECOND = [*TINY, "--trainer.check_val_every_n_epoch", "2", "--trainer.callbacks+=ModelCheckpoint"]
SECOND += [f"--trainer.callbacks.{key}={value}" for key, value in KEPT.items()]


def test_resuming_from_an_earlier_epoch_is_exact(own_folder):
    main(SECOND)
    table = (RUN / "metrics.csv").read_text()
    LAST.rename("expected.ckpt")
    config = (RUN / "config.yaml").stat()
    second = LAST.with_name("epoch1.ckpt")
    states = torch.load(second, weights_only=True)["callbacks"]
    (score,) = (state["best_model_score"] for key, state in states.items() if "Best" in key)
    assert score == read_metrics(RUN)[1]["val/acc"]  # it was saved after best.ckpt
    main(["fit", "--ckpt_path", str(second)])
    after = (RUN / "config.yaml").stat()  # nothing changed, nothing was written
    assert (after.st_mtime_ns, after.st_ino) == (config.st_mtime_ns, config.st_ino)
    assert_same_checkpoint(LAST, "expected.ckpt")
    assert (RUN / "metrics.csv").read_text() == table
    # an epoch has one file, not the stopped run's and "-v1" of the other
    assert len(list(LAST.parent.iterdir())) == 5


def stopped_at_once(monkeypatch, *args):
    """A command with Ctrl-C in its first step, when something has been logged already."""

    def stop(task, batch, batch_idx):
        task.trainer.loggers[1].log_metrics({"own": 1.0}, task.global_step)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as end:
        patched.setattr(Classifier, "training_step", stop)
        main(list(args))
    assert end.value.code == 130


def test_resuming_from_before_the_best_epoch_is_a_new_run(own_folder, capfd, monkeypatch):
    """It has a last.ckpt from the beginning, and may itself be resumed."""
    main(SECOND)
    files = {path: path.read_bytes() for path in RUN.rglob("*.*") if path.is_file()}
    capfd.readouterr()
    main(["fit", "--ckpt_path", str(LAST.with_name("epoch0.ckpt"))])
    assert (
        "older than the best.ckpt of its run: this is a new run from it" in capfd.readouterr().err
    )
    assert {path: path.read_bytes() for path in files} == files
    new = RUN.with_name("version_1")
    assert read_metrics(new) == read_metrics(RUN)[1:]
    for name in ("best.ckpt", "last.ckpt"):
        nets = [torch.load(run / "checkpoints" / name, weights_only=True) for run in (RUN, new)]
        torch.testing.assert_close(*(net["state_dict"] for net in nets), rtol=0, atol=0)


def test_broken_off_at_once_a_run_resumed_from_an_earlier_epoch_is_as_before(
    own_folder, monkeypatch
):
    main(SECOND)
    files = {path: path.read_bytes() for path in (LAST, RUN / "metrics.csv")}
    stopped_at_once(monkeypatch, "fit", "--ckpt_path", str(LAST.with_name("epoch1.ckpt")))
    assert {path: path.read_bytes() for path in files} == files


def test_float64_weights_are_resumed_exactly(own_folder):
    fit = [*TINY, "--trainer.precision", "64-true"]
    main(fit)
    main([*fit, "--trainer.max_epochs", "1"])
    main([*RESUME, "--trainer.max_epochs", "3"])
    assert_same_checkpoint(LAST, RUN.with_name("version_1") / "checkpoints/last.ckpt")


def test_broken_off_after_its_best_validation_a_run_goes_on_in_its_directory(own_folder):
    """The best.ckpt of the epoch that is trained again is newer than last.ckpt."""
    main([*TINY, *"--trainer.val_check_interval 4 --trainer.max_steps 5".split()])
    assert read_metrics(RUN)[0]["step"] == 3
    main([*RESUME, "--trainer.max_steps", "-1"])
    assert not RUN.with_name("version_1").exists()
    assert rows(RUN) > 3


def test_resuming_does_not_need_the_weights_that_the_run_began_with(run, capfd):
    Path("begin.ckpt").write_bytes(LAST.read_bytes())
    main([*TINY, "--init", "begin.ckpt", "--trainer.max_epochs", "1", "--model.lr", "1e-9"])
    assert "from begin.ckpt: all weights\n" in capfd.readouterr().out
    old = torch.load("begin.ckpt", weights_only=True)["state_dict"]
    new = torch.load("lightning_logs/version_1/checkpoints/last.ckpt", weights_only=True)
    for key, value in new["state_dict"].items():
        if key.endswith("weight"):
            torch.testing.assert_close(value, old[key], atol=1e-5, rtol=0)
    Path("begin.ckpt").unlink()
    main([*RESUME, "--trainer.max_epochs", "2"])


# a batch size that does not divide the steps of the epochs before
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_what_changes_the_run_is_named_when_it_goes_on(run, capfd):
    changes = "--trainer.max_epochs 4 --data.batch_size 32 --seed_everything 7".split()
    main([*RESUME, *changes])
    said = capfd.readouterr().out
    assert "changed: data.batch_size from 16 to 32 (the learning rate goes by steps), seed_" in said
