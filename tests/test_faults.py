"""What may befall a run: kills at random moments, full disks, a failing process.

By hand, with many kills: ALLCONV_KILLS=200 pytest -n 0 -s tests/test_faults.py -k random
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
from conftest import REPO, TINY, process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from allconv import data, runs
from allconv.__main__ import main

few = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

KILLS = int(os.environ.get("ALLCONV_KILLS", 2))
KILLS_OF_A_RUN = 8
EPOCHS = 10
RUN = Path("lightning_logs/version_0")
LAST = RUN / "checkpoints/last.ckpt"
# all that fast.yaml uses, and dropout
FIT = [
    *("fit", "--config", str(REPO / "configs/fast.yaml"), "--model.dropout", "0.1"),
    *f"--data.demo true --model.width 4 --trainer.max_epochs {EPOCHS}".split(),
    *"--trainer.limit_train_batches 4 --data.data_dir ../data".split(),
]
ENDS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
# calls within which a process strikes itself: a checkpoint's file is opened, written, about to take
# the old one's place; rows of metrics.csv are written
CALLS = ("torch.save", "os.fsync", "os.replace", "csv.DictWriter.writerows")
START = """
import csv, os, sys, torch
from allconv import __main__
def struck(*args, left=[{count}], normal={call}, **kwargs):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), {number})
    return normal(*args, **kwargs)
{call} = struck
__main__.main(sys.argv[1:])
"""


def scalars(run):
    """Every scalar (tag, step, value) in the order in which TensorBoard has it."""
    board = EventAccumulator(str(run), {"scalars": 0}).Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith("hp/")]
    return [(tag, event.step, event.value) for tag in tags for event in board.Scalars(tag)]


def rows(run):
    table = run / "metrics.csv"
    return max(0, len(table.read_text().splitlines()) - 1) if table.exists() else 0


def leftovers():
    """What a kill may leave, for the next start to clear."""
    return [*RUN.rglob("*.writing"), *RUN.glob("metrics.before-resume.csv")]


def same(found, expected):
    """Whether two checkpoints hold bitwise the same net, optimizer and epoch."""
    found, expected = (torch.load(path, weights_only=True) for path in (found, expected))
    for content in (found, expected):
        content["moments"] = {
            f"{key} {name}": value
            for key, values in content["optimizer_states"][0]["state"].items()
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
    return found["epoch"] == expected["epoch"] and all(
        torch.equal(value, found[part][key])
        for part in ("state_dict", "moments")
        for key, value in expected[part].items()
    )


def strike(args, moment, number, rng):
    """Start a command that gets a signal, within a call or at any moment of training."""
    if moment != "training":
        first = 1 + (args is FIT)  # training begins with the first checkpoint
        code = START.format(call=moment, count=rng.randint(first, 4), number=int(number))
        running = process(*args, code=code)
        return running, running.communicate(timeout=600)[0]
    running, said = process(*args), ""
    while "run folder" not in (line := running.stdout.readline()):
        assert line, said
        said += line
    while not LAST.exists() and running.poll() is None:  # it is written before the first step
        time.sleep(0.01)
    for _ in range(rng.randint(0, 2)):  # epochs; at the end of the output no more lines
        running.stdout.readline()
    time.sleep(rng.uniform(0, 0.4))
    running.send_signal(number)
    return running, said + running.communicate(timeout=600)[0]


def test_killed_at_random_moments(own_folder, monkeypatch):
    """However often a run is killed: last.ckpt loads, and in the end it is as if never stopped."""
    seed = int(os.environ.get("ALLCONV_KILL_SEED", random.getrandbits(32)))
    print(f"ALLCONV_KILL_SEED={seed}")
    rng = random.Random(seed)
    main(FIT)
    whole, count, kills, runs = RUN.absolute(), Counter(), 0, 0
    while kills < KILLS:
        runs += 1
        Path(f"../run{runs}").mkdir()
        monkeypatch.chdir(f"../run{runs}")
        args, done, code = FIT, 0, None
        numbers = [rng.choice([*ENDS]) for _ in range(min(KILLS_OF_A_RUN, KILLS - kills))]
        for number in numbers:
            moment = rng.choice(["training", "training", *CALLS])
            running, said = strike(args, moment, number, rng)
            code = running.returncode
            if code == 0:  # struck too late
                break
            kills += 1
            content = torch.load(LAST, weights_only=True)
            epochs = content["epoch"] + (content["global_step"] > 0)
            lost = rows(RUN) - epochs
            left = [path.name for path in leftovers()]
            what = f"run {runs}, kill {kills}: {number.name} in {moment}, ended with {code}, "
            what += f"{epochs} epochs in last.ckpt, {rows(RUN)} in metrics.csv, left {left}"
            print(what, flush=True)
            # before training the system's own handler ends the process
            assert code == ENDS[number] or (moment != "training" and code == -number), what + said
            assert "Traceback" not in said, what + said
            assert done <= epochs, what
            assert lost <= 1, what
            done, args = epochs, ["fit", "--ckpt_path", "last"]
            count.update([f"{number.name} in {moment}", f"ended with {code}", *left])
            count["epochs done again"] += max(0, lost)
            if done == EPOCHS:  # struck after the last epoch
                break
        if code != 0 and done < EPOCHS:
            running = process(*args)
            said, _ = running.communicate(timeout=600)
            assert running.returncode == 0, said
        for name in ("last", "best"):
            assert same(RUN / f"checkpoints/{name}.ckpt", whole / f"checkpoints/{name}.ckpt"), seed
        assert (RUN / "metrics.csv").read_text() == (whole / "metrics.csv").read_text(), seed
        assert scalars(RUN) == scalars(whole), seed
        assert not leftovers(), seed
    print(f"{kills} kills in {runs} runs: {dict(count)}")


@pytest.mark.parametrize("steps", [3, 11])
def test_stopped_inside_an_epoch_and_resumed_equals_never_stopped(steps, own_folder, capfd):
    short = [*FIT, "--trainer.max_epochs", "4"]
    main(short)
    main([*short, "--trainer.max_steps", str(steps)])
    said = capfd.readouterr().out
    epoch = steps // 4  # whole ones
    assert f"stopped in epoch {epoch + 1} at step {steps}: last.ckpt is of {epoch} whole" in said
    whole, stopped = Path("lightning_logs/version_0"), Path("lightning_logs/version_1")
    assert rows(stopped) == epoch
    main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "-1"])
    assert "no longer bitwise" not in capfd.readouterr().out
    for name in ("best.ckpt", "last.ckpt"):
        assert same(stopped / "checkpoints" / name, whole / "checkpoints" / name)
    assert (stopped / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert scalars(stopped) == scalars(whole)


def test_time_that_is_up_inside_an_epoch_leaves_the_state_before_it(own_folder, capfd):
    main([*TINY, "--data.batch_size", "1", "--trainer.limit_train_batches", "1.0",
          "--trainer.max_time", "00:00:00:01"])  # fmt: skip
    assert "last.ckpt is of 0 whole epochs" in capfd.readouterr().out
    assert torch.load(LAST, weights_only=True)["global_step"] == 0
    assert not (RUN / "metrics.csv").exists()
    assert not LAST.with_name("best.ckpt").exists()


# a batch size that does not divide the steps of the epochs before
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_what_changes_the_run_is_named_when_it_goes_on(run, capfd):
    go_on = ["fit", "--ckpt_path", "last", "--trainer.max_epochs"]
    main([*go_on, "4"])  # the schedule has milestones: the epochs so far are the same
    assert "no longer bitwise" not in capfd.readouterr().out
    main([*go_on, "5", "--data.batch_size", "32", "--seed_everything", "7"])
    said = capfd.readouterr().out
    assert "changed: seed_everything from 43 to 7, data.batch_size from 64 to 32; it is" in said


def test_a_schedule_over_no_number_of_epochs_is_refused(own_folder, refused):
    args = [*TINY, "--trainer.max_epochs", "-1", "--model.warmup", "0.2"]
    assert "trainer.max_epochs" in refused(*args, code=2)


TABLES = {
    "binary": lambda table: bytes(range(256)),
    "a word": lambda table: table.replace(b"800.0", b"many", 1),
    "a short row": lambda table: table.replace(b",800.0", b"", 1),
    "a long row": lambda table: table.replace(b"800.0", b"800,0", 1),
    "no step": lambda table: table.replace(b"step", b"stop", 1),
    "a nul": lambda table: table.replace(b"800.0", b"\0", 1),
    "an infinite epoch": lambda table: table.replace(b"\n0,", b"\ninf,", 1),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_damaged_table_is_one_line_and_kept(what, run, refused):
    path = run / "metrics.csv"
    path.write_bytes(TABLES[what](path.read_bytes()))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    line = refused("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4", code=1)
    assert "metrics.csv: row 1 is not one of numbers" in line or what == "binary"
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_row_that_a_full_disk_cut_off_is_written_again(run, capfd):
    table = run / "metrics.csv"
    whole = table.read_bytes()
    with table.open("ab") as file:
        file.write(b"3,0.1,3")
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4"])
    assert table.read_bytes().startswith(whole)
    assert rows(run) == 4


@pytest.mark.parametrize(
    ("size", "what"), [(60_000, ".ckpt: cannot be written"), (120_000, "make room")]
)
def test_a_full_disk_is_one_line(size, what, own_folder):
    """A limit on the size of files stands for it: first the checkpoint, then TensorBoard meets it.

    The same with full file systems, by hand: see the README.
    """
    data.CIFAR100(demo=True).prepare_data()
    running = process(
        *TINY, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    )
    said, _ = running.communicate(timeout=600)
    assert running.returncode == 1, said
    assert "Traceback" not in said
    assert what in said.splitlines()[-1]
    assert "File too large" in said.splitlines()[-1]
    if LAST.exists():
        main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4"])
        assert rows(RUN) == 4
    assert not leftovers()


def test_two_runs_started_at_once(own_folder):
    running = [process(*TINY) for _ in range(2)]
    for each in running:
        said, _ = each.communicate(timeout=600)
        assert each.returncode == 0, said
    a, b = (Path("lightning_logs", name) for name in ("version_0", "version_1"))
    assert same(a / "checkpoints/last.ckpt", b / "checkpoints/last.ckpt")
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()
    assert {path.name for path in Path("data/cifar-100-demo").iterdir()} == {
        "train.bin",
        "test.bin",
    }


def test_deterministic_is_the_same_run(run):
    main([*TINY, "--trainer.deterministic", "true"])
    torch.use_deterministic_algorithms(False)
    assert same(run.with_name("version_1") / "checkpoints/last.ckpt", LAST)


@few
@given(st.data())
def test_a_damaged_checkpoint_is_refused_or_the_same(run, draw):
    """Cut anywhere, or some bytes changed: never other weights."""
    whole = LAST.read_bytes()
    expected = runs.load(LAST)
    damaged = bytearray(whole)
    for place in draw.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        damaged[place] ^= draw.draw(st.integers(1, 255))
    del damaged[draw.draw(st.integers(0, len(whole)) | st.just(len(whole))) :]
    path = Path("damaged.ckpt")
    path.write_bytes(damaged)
    try:
        found = runs.load(path)
    except runs.CheckpointError as error:
        assert "damaged.ckpt" in str(error)
        return
    assert found.hparams == expected.hparams
    assert found.step == expected.step
    assert all(torch.equal(value, found.weights[key]) for key, value in expected.weights.items())


@few
@given(st.data())
def test_damaged_data_are_refused_or_read(own_folder, draw):
    """A record form has no checksum; the official files have one (tests/test_data.py)."""
    module = data.CIFAR100(demo=True)
    module.prepare_data()
    path = Path("data/cifar-100-demo/train.bin")
    kept = path.with_name("kept")
    if not kept.exists():
        shutil.copy(path, kept)
    damaged = bytearray(kept.read_bytes())
    size = len(damaged)
    labels = st.integers(0, size // data.RECORD - 1).map(lambda record: record * data.RECORD + 1)
    for place in draw.draw(st.lists(labels | st.integers(0, size - 1), max_size=3)):
        damaged[place] ^= draw.draw(st.integers(1, 255))
    records = st.integers(0, size // data.RECORD).map(lambda record: record * data.RECORD)
    del damaged[draw.draw(st.just(size) | records | st.integers(0, size)) :]
    path.write_bytes(damaged)
    try:
        module.setup("fit")
    except data.DataError as error:
        assert "train.bin" in str(error) or "val_size" in str(error)
        return
    assert len(module.sets["train"]) + len(module.sets["val"]) == len(damaged) // data.RECORD


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
