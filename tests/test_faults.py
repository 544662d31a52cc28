"""What may befall a run: kills at random moments, full disks, damaged files.

By hand, with many kills, of `one` process or of `two`:
ALLCONV_KILLS=200 ALLCONV_SEED=7 pytest -n 0 -s -m slow tests/test_faults.py -k "random and one"
"""

import os
import random
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import (
    HANGS,
    LAST,
    RUN,
    TINY,
    TWO,
    assert_same_run,
    finish,
    process,
    rows,
    second_process,
)

from allconv import checkpoints
from allconv.__main__ import main

SEED = int(os.environ.get("ALLCONV_SEED", 0))
KILLS = int(os.environ.get("ALLCONV_KILLS", 4))
KILLS_OF_A_RUN = 8
EPOCHS = 10
SMALL = (
    f"--data.demo true --model.width 4 --model.dropout 0.1 --trainer.max_epochs {EPOCHS} "
    "--trainer.limit_train_batches 4 --data.data_dir ../data"
).split()
# all that a recipe uses, and dropout
FITS = {
    "one": ["fit", "--config", "fast", *SMALL],
    "two": ["fit", "--config", "strong", *SMALL, *TWO],
}
# the command's exit code, by whom the signal hit; two processes leave SIGTERM to the system, and
# Lightning kills the first with a line of its own if it sees that the second is gone before we do
ENDS = {
    signal.SIGKILL: {"first": [-9], "all": [-9], "second": [1, -9]},
    signal.SIGTERM: {"first": [143, -15], "all": [143, -15], "second": [1, -9]},
    signal.SIGINT: {"first": [130], "all": [130], "second": [1, -9]},
}
LONGER = ["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4"]


def leftovers():
    """What a kill may leave, for the next start to clear."""
    return {path.name for path in RUN.rglob("*.writing")}


def strike(args, moment, whom, number, rng):
    """Start a command that gets a signal, while a file is written or at any moment of training.

    Returns:
        Its exit code, what it said, and how many seconds after the signal all processes had ended.
    """
    running, said = process(*args, start_new_session=True), ""
    while "run directory" not in (line := running.stdout.readline()):
        assert line, said
        said += line
    while not LAST.exists() and running.poll() is None:  # it is written before the first step
        time.sleep(0.01)
    if moment == "writing":
        for _ in range(rng.randint(1, 6)):
            before = leftovers()
            while not leftovers() - before and running.poll() is None:
                pass  # a file is written in some milliseconds
    else:
        for _ in range(rng.randint(0, 2)):  # epochs; at the end of the output no more lines
            said += running.stdout.readline()
        time.sleep(rng.uniform(0, 0.4))
    start = time.monotonic()
    if running.poll() is None:
        if whom == "all":
            os.killpg(running.pid, number)
        else:
            os.kill(running.pid if whom == "first" else second_process(running), number)
    said += running.communicate(timeout=HANGS)[0]  # ends with the last process that can write
    return running.returncode, said, time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("processes", FITS)
def test_killed_at_random_moments(processes, own_folder, monkeypatch):
    """However often a run is killed: last.ckpt loads, and in the end it is as if never stopped."""
    rng, fit = random.Random(SEED), FITS[processes]
    hit = ["first", "second", "all"] if processes == "two" else ["first"]
    Path("whole").mkdir()
    monkeypatch.chdir("whole")
    finish(*fit)
    whole, count, kills, runs, slowest = RUN.absolute(), Counter(), 0, 0, 0.0
    while kills < KILLS:
        runs += 1
        Path(f"../run{runs}").mkdir()
        monkeypatch.chdir(f"../run{runs}")
        args, done, code = fit, 0, None
        for _ in range(min(KILLS_OF_A_RUN, KILLS - kills)):
            moment, whom = rng.choice(["training", "writing"]), rng.choice(hit)
            number = rng.choice([*ENDS])
            code, said, seconds = strike(args, moment, whom, number, rng)
            if code == 0:  # struck too late
                break
            kills += 1
            epochs = checkpoints.load(LAST, resume=True).epoch
            lost = rows(RUN) - epochs
            what = f"run {runs}, kill {kills}: {number.name} in {moment}, {whom}, ended with "
            what += f"{code} after {seconds:.1f} s, {epochs} epochs in last.ckpt, {rows(RUN)} in "
            what += f"metrics.csv, left {leftovers()}"
            print(what, flush=True)
            assert code in ENDS[number][whom], what + said
            assert "Traceback" not in said, what + said
            assert done <= epochs, what
            assert lost <= 1, what
            done, args = epochs, ["fit", "--ckpt_path", "last"]
            count.update([f"{number.name} in {moment}", f"{whom} hit", f"{len(leftovers())} left"])
            count["epochs done again"] += max(0, lost)
            slowest = max(slowest, seconds)
            if done == EPOCHS:  # struck after the last epoch
                break
        if code != 0 and done < EPOCHS:
            finish(*args)
            assert not leftovers()
        assert_same_run(RUN, whole)
    print(f"seed {SEED}, {kills} kills in {runs} runs, ended within {slowest:.1f} s: {dict(count)}")


def limited(size):
    """Limits the size of files, of a process that is started: stands for a disk that is full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on(run):
    """First a new run's checkpoint meets the limit, then, with more room, TensorBoard."""
    size = LAST.stat().st_size
    said = finish(*TINY, expected=1, preexec_fn=limited(size // 4)).splitlines()
    assert said[-1].startswith("allconv: ")
    assert "last.ckpt" in said[-1]
    assert "File too large" in said[-1]
    files = [path.name for path in run.with_name("version_1").rglob("*")]
    assert not [name for name in files if name.endswith((".ckpt", ".writing"))]

    # TensorBoard's file gets figures in epochs 10 and 20: twice the size of a checkpoint
    longer = ["fit", "--ckpt_path", LAST, "--trainer.max_epochs", "20"]
    said = finish(*longer, expected=1, preexec_fn=limited(size * 3 // 2)).splitlines()
    assert said[-1].startswith("allconv: ")
    assert "File too large" in said[-1]
    assert not leftovers()
    if checkpoints.load(LAST).epoch < 20:
        main([*map(str, longer)])
    assert rows(run) == 20


@pytest.mark.slow
def test_two_runs_started_at_once(own_folder):
    running = [process(*TINY) for _ in range(2)]
    for each in running:
        said, _ = each.communicate(timeout=HANGS)
        assert each.returncode == 0, said
    assert_same_run(RUN, RUN.with_name("version_1"))
    names = {path.name for path in Path("data/cifar-100-demo").iterdir()}
    assert names == {"train.bin", "test.bin"}


TABLES = {
    "binary": lambda table: bytes(range(256)),
    "a short row": lambda table: table.replace(b",800.0", b"", 1),
    "a long row": lambda table: table.replace(b"800.0", b"800,0", 1),
    "no column of steps": lambda table: table.replace(b"step", b"stop", 1),
    "a step that is no number": lambda table: table.replace(b",8,", b",eight,", 1),
    "an infinite epoch": lambda table: table.replace(b"\n0,", b"\ninf,", 1),
    "no epoch": lambda table: table.replace(b"\n0,", b"\nnan,", 1),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_damaged_table_is_one_line_and_kept(what, run, refused):
    path = run / "metrics.csv"
    path.write_bytes(TABLES[what](path.read_bytes()))
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"}
    assert "metrics.csv: row 1 is damaged" in refused(*LONGER, code=1)
    assert {p: p.read_bytes() for p in files} == files
