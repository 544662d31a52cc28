"""What may befall a run: kills at random moments, full disks, a failing process.

By hand, with many kills: ALLCONV_KILLS=200 pytest -s tests/test_faults.py -k random
"""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import torch
from conftest import REPO, process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from allconv.__main__ import main

KILLS = int(os.environ.get("ALLCONV_KILLS", 3))
KILLS_OF_A_RUN = 8
RUN = Path("lightning_logs/version_0")
LAST = RUN / "checkpoints/last.ckpt"
# all that fast.yaml uses, and dropout
FIT = [
    *("fit", "--config", str(REPO / "configs/fast.yaml"), "--model.dropout", "0.1"),
    *"--data.demo true --model.width 4 --trainer.max_epochs 10".split(),
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
        if code != 0:
            running = process(*args)
            said, _ = running.communicate(timeout=600)
            assert running.returncode == 0, said
        for name in ("last", "best"):
            assert same(RUN / f"checkpoints/{name}.ckpt", whole / f"checkpoints/{name}.ckpt"), seed
        assert (RUN / "metrics.csv").read_text() == (whole / "metrics.csv").read_text(), seed
        assert scalars(RUN) == scalars(whole), seed
        assert not leftovers(), seed
    print(f"{kills} kills in {runs} runs: {dict(count)}")
