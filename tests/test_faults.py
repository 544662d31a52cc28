"""What may befall a run: kills at random moments, full disks, damaged files.

By hand, with many kills:
ALLCONV_KILLS=200 ALLCONV_SEED=7 pytest -n 0 -s -m slow tests/test_faults.py -k random
"""

import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import HANGS, LAST, REPO, RUN, TINY, assert_same_run, finish, process, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allconv import checkpoints, cifar100
from allconv.__main__ import main

few = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

SEED = int(os.environ.get("ALLCONV_SEED", 0))
KILLS = int(os.environ.get("ALLCONV_KILLS", 4))
KILLS_OF_A_RUN = 8
EPOCHS = 10
# all that fast.yaml uses, and dropout
FIT = [
    *("fit", "--config", str(REPO / "configs/fast.yaml"), "--model.dropout", "0.1"),
    *f"--data.demo true --model.width 4 --trainer.max_epochs {EPOCHS}".split(),
    *"--trainer.limit_train_batches 4 --data.data_dir ../data".split(),
]
ENDS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
LONGER = ["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4"]


def leftovers():
    """What a kill may leave, for the next start to clear."""
    return {path.name for path in RUN.rglob("*.writing")}


def strike(args, moment, number, rng):
    """Start a command that gets a signal, while a file is written or at any moment of training."""
    running, said = process(*args), ""
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
            running.stdout.readline()
        time.sleep(rng.uniform(0, 0.4))
    running.send_signal(number)
    return running, said + running.communicate(timeout=HANGS)[0]


@pytest.mark.slow
def test_killed_at_random_moments(own_folder, monkeypatch):
    """However often a run is killed: last.ckpt loads, and in the end it is as if never stopped."""
    rng = random.Random(SEED)
    Path("whole").mkdir()
    monkeypatch.chdir("whole")
    main(FIT)
    whole, count, kills, runs = RUN.absolute(), Counter(), 0, 0
    while kills < KILLS:
        runs += 1
        Path(f"../run{runs}").mkdir()
        monkeypatch.chdir(f"../run{runs}")
        args, done, code = FIT, 0, None
        numbers = [rng.choice([*ENDS]) for _ in range(min(KILLS_OF_A_RUN, KILLS - kills))]
        for number in numbers:
            moment = rng.choice(["training", "writing"])
            running, said = strike(args, moment, number, rng)
            code = running.returncode
            if code == 0:  # struck too late
                break
            kills += 1
            epochs = checkpoints.load(LAST, resume=True).epoch
            lost = rows(RUN) - epochs
            what = f"run {runs}, kill {kills}: {number.name} in {moment}, ended with {code}, "
            what += f"{epochs} epochs in last.ckpt, {rows(RUN)} in metrics.csv, left {leftovers()}"
            print(what, flush=True)
            assert code == ENDS[number], what + said
            assert "Traceback" not in said, what + said
            assert done <= epochs, what
            assert lost <= 1, what
            done, args = epochs, ["fit", "--ckpt_path", "last"]
            count.update([f"{number.name} in {moment}", f"{len(leftovers())} left"])
            count["epochs done again"] += max(0, lost)
            if done == EPOCHS:  # struck after the last epoch
                break
        if code != 0 and done < EPOCHS:
            finish(*args)
            assert not leftovers()
        assert_same_run(RUN, whole)
    print(f"seed {SEED}, {kills} kills in {runs} runs: {dict(count)}")


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

    largest = max(path.stat().st_size for path in run.glob("events*"))
    assert largest > size
    longer = ["fit", "--ckpt_path", LAST, "--trainer.max_epochs", "4"]
    said = finish(*longer, expected=1, preexec_fn=limited((size + largest) // 2)).splitlines()
    assert said[-1].startswith("allconv: ")
    assert "File too large" in said[-1]
    assert not leftovers()
    if checkpoints.load(LAST).epoch < 4:
        main([*map(str, longer)])
    assert rows(run) == 4


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


@few
@given(st.data())
def test_a_damaged_checkpoint_is_refused_or_the_same(run, draw):
    """Cut anywhere, or some bytes changed: never other weights."""
    whole = LAST.read_bytes()
    expected = checkpoints.load(LAST)
    damaged = bytearray(whole)
    for place in draw.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        damaged[place] ^= draw.draw(st.integers(1, 255))
    del damaged[draw.draw(st.integers(0, len(whole)) | st.just(len(whole))) :]
    path = Path("damaged.ckpt")
    path.write_bytes(damaged)
    try:
        found = checkpoints.load(path)
    except checkpoints.CheckpointError as error:
        assert "damaged.ckpt" in str(error)
        return
    assert found.hparams == expected.hparams
    assert found.step == expected.step
    assert all(torch.equal(value, found.weights[key]) for key, value in expected.weights.items())


@few
@given(st.data())
def test_damaged_data_are_refused_or_read(own_folder, draw):
    """A record form has no checksum; the official files have one (tests/test_data.py)."""
    cifar100.prepare("data", demo=True)
    path, record = Path("data/cifar-100-demo/train.bin"), 3074
    kept = path.with_name("kept")
    if not kept.exists():
        shutil.copy(path, kept)
    damaged = bytearray(kept.read_bytes())
    size = len(damaged)
    labels = st.integers(0, size // record - 1).map(lambda n: n * record + 1)
    for place in draw.draw(st.lists(labels | st.integers(0, size - 1), max_size=3)):
        damaged[place] ^= draw.draw(st.integers(1, 255))
    records = st.integers(0, size // record).map(lambda n: n * record)
    del damaged[draw.draw(st.just(size) | records | st.integers(0, size)) :]
    path.write_bytes(damaged)
    try:
        sets = [cifar100.load(split, "data", demo=True) for split in ("train", "val")]
    except cifar100.DataError as error:
        assert "train.bin" in str(error) or "val_size" in str(error)
        return
    assert sum(len(labels) for _, labels in sets) == len(damaged) // record


KEYS = [
    *("model.width", "model.residuals", "model.dropout", "model.rectify_logits", "model.lr"),
    *("model.milestones", "model.warmup", "model.muon_lr", "model.compile", "data.data_dir"),
    *("data.batch_size", "data.val_size", "data.split_seed", "data.crop", "data.flip"),
    *("data.sizes", "data.demo", "seed_everything", "trainer.max_epochs", "init"),
]
values = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.text("0123456789.-+e[]{},: nulltrueinfa'\"#&*!|>%@`"),
    st.integers().map(str),
    st.floats().map(str),
)


@settings(few, max_examples=25)
@given(key=st.sampled_from(KEYS), value=values)
def test_any_value_is_taken_or_refused_in_one_line(key, value, own_folder, capfd):
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--{key}={value}", "--print_config"])
    said = capfd.readouterr()
    assert end.value.code in (0, 2)
    if end.value.code:
        assert len(said.err.splitlines()) == 1
        assert said.err.startswith("allconv: ")
