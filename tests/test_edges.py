"""Uses that are odd but possible; each of these once went wrong or came close to it."""

import csv
import json
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import HANGS, RUN, TINY, finish, process, rows

from allconv.__main__ import main
from allconv.datasets.cifar100 import RECORD
from allconv.datasets.demo import Demo
from allconv.model import AllCNN

ONE = [*TINY, "--model.width", "2", "--trainer.max_epochs", "1", "--trainer.limit_train_batches"]


def column(name):
    with (RUN / "metrics.csv").open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


# 3 batches, 2 a step: the epoch's last step takes the rest, so an epoch has 2 steps, not 1; or an
# epoch that is shorter than a step
@pytest.mark.parametrize(
    ("accumulate", "epochs", "rates"), [(2, 4, [0.1, 0.1, 0.05, 0.05]), (4, 1, [0.1])]
)
def test_milestones_are_epochs_when_gradients_are_accumulated(
    accumulate, epochs, rates, own_folder
):
    main([*ONE, "3", "--trainer.max_epochs", str(epochs), "--model.milestones", "[2]",
          "--trainer.accumulate_grad_batches", str(accumulate)])  # fmt: skip
    assert [round(float(rate), 6) for rate in column("lr")] == rates


@pytest.mark.parametrize(
    "settings",
    [
        "bf16-true --trainer.num_sanity_val_steps 1",
        pytest.param("64-true --trainer.log_every_n_steps 0", marks=pytest.mark.slow),
        "bf16-mixed --trainer.limit_val_batches 0",  # so there is no best.ckpt
    ],
)
def test_images_have_the_nets_precision(settings, own_folder, capfd):
    main([*ONE, "2", "--trainer.precision", *settings.split()])
    named = capfd.readouterr().out.split("test --ckpt_path ")[1].split()[0]
    main(["test", "--ckpt_path", named])
    assert len(column("train/loss")) == 1


def test_a_random_seed_is_random_and_written_down(own_folder, monkeypatch):
    for before in ("", "abc"):
        monkeypatch.setenv("PL_GLOBAL_SEED", before)  # Lightning's word to child processes
        main([*ONE, "1", "--seed_everything", "true"])
    found = {
        yaml.safe_load(path.read_text())["seed_everything"]
        for path in Path("lightning_logs").glob("*/config.yaml")
    }
    assert len(found - {43, True}) == 2


@pytest.mark.slow
def test_deterministic_is_the_same_run(run):
    try:
        main([*TINY, "--trainer.deterministic", "true", "--trainer.max_epochs", "1"])
    finally:
        torch.use_deterministic_algorithms(False)
    table = (run.with_name("version_1") / "metrics.csv").read_text()
    assert (run / "metrics.csv").read_text().startswith(table)


LIGHTNING = (
    "--trainer.callbacks+=LearningRateMonitor --trainer.callbacks.logging_interval=step "
    "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/loss "
    "--trainer.callbacks.min_delta=100 --trainer.callbacks.patience=1 "
    "--trainer.callbacks.verbose=true --trainer.profiler simple "
    "--trainer.log_every_n_steps 2 --trainer.enable_model_summary false"
).split()


@pytest.mark.slow
def test_callbacks_and_profiler_of_lightning_say_what_they_have_to_say(own_folder, capsys):
    said = finish(*TINY, *LIGHTNING)
    assert rows(RUN) > 3  # LearningRateMonitor's are not ours
    assert [epoch for epoch in column("epoch") if epoch] == ["0", "1"]
    assert "did not improve in the last 1 records" in said  # EarlyStopping's reason
    assert "run_training_epoch" in said  # the profiler's report
    assert "net.conv9" not in said
    for noise in ("Seed set to", "Tip", "available", "reached", "weights_only"):
        assert noise not in said, noise
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4"])
    assert [epoch for epoch in column("epoch") if epoch] == ["0", "1", "2"]
    capsys.readouterr()
    main(["runs", "--json"])
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("folder", [pytest.param(".", marks=pytest.mark.slow), "checkpoints"])
def test_a_checkpoint_finds_its_run_from_within(folder, run, own_folder, monkeypatch):
    monkeypatch.chdir(run / folder)
    name = "best.ckpt" if folder == "checkpoints" else "checkpoints/best.ckpt"
    main(["test", "--ckpt_path", name, "--data.data_dir", str(own_folder / "data")])


def test_the_notebooks_residual_checkpoint_is_tested(run):
    torch.save(AllCNN(width=4, residuals=True).state_dict(), "epoch9.pt")
    main(["test", "--ckpt_path", "epoch9.pt", "--data.demo", "true", "--model.residuals", "true"])


def make(path, content=b""):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def cut_demo():
    Demo(Path("data")).prepare()
    path = Path("data/cifar-100-demo/train.bin")
    path.write_bytes(path.read_bytes()[:RECORD])


DEMO = "--data.demo true "
# what is prepared, arguments, what the line says
BAD = {
    "a file where a folder should be": (lambda: make("data"), DEMO, "data"),
    "a long name": (None, "--data.data_dir " + 300 * "x", "File name too long"),
    "no place for the demo set": (None, DEMO + "--data.data_dir /proc/none", "/proc/none"),
    "no place for runs": (None, DEMO + "--trainer.default_root_dir /proc/none", "/proc/none"),
    "a file instead of runs": (lambda: make("lightning_logs"), DEMO, "lightning_logs"),
    "a demo set cut to a record": (cut_demo, DEMO, "cifar-100-demo/train.bin"),
    "no weights to begin with": (None, DEMO + "--init none.ckpt", "init is none.ckpt"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_surroundings_are_one_line(what, own_folder, refused):
    prepare, args, message = BAD[what]
    if prepare:
        prepare()
    line = refused("fit", "--trainer.max_epochs", "1", "--model.width", "2",
                   "--trainer.enable_model_summary", "false", *args.split(), code=1)  # fmt: skip
    assert message in line
    assert not RUN.exists()


class Answers:
    """A server on this machine that gives every call the same bytes, and then maybe hangs."""

    def __init__(self, content, pause=0):
        self.content, self.pause, self.socket = content, pause, socket.create_server(("", 0))
        name = "cifar-100-python.tar.gz"
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/{name}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            threading.Thread(target=self.answer, args=self.socket.accept()[:1], daemon=True).start()

    def answer(self, call):
        with call:
            call.recv(4096)
            call.sendall(self.content)
            time.sleep(self.pause)


CUT = {
    "short": b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nbegin",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbe",
    "garbage": b"not what a web server says\r\n\r\n",
    "closed": b"",
    "error": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("how", CUT)
def test_a_broken_download_is_one_line_and_not_taken_for_the_data(
    how, own_folder, refused, monkeypatch
):
    monkeypatch.setattr("torchvision.datasets.CIFAR100.url", Answers(CUT[how]).url)
    for _ in range(2):  # the second finds what the first left
        line = refused("fit", "--model.width", "2", code=1)
        assert "download failed" in line
        assert "place cifar-100-python.tar.gz" in line
    assert not Path("lightning_logs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_download_is_one_line(number, code, own_folder):
    size = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n"
    url = Answers(size + bytes(2_000_000), pause=HANGS).url
    start = (
        "import sys; from torchvision.datasets import CIFAR100; from allconv.__main__ import main\n"
        "CIFAR100.url = sys.argv[1]; main(['fit'])"
    )
    running = process(url, code=start)
    while not any(path.stat().st_size for path in Path().glob("data/*")):
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.05)
    running.send_signal(number)
    said, _ = running.communicate(timeout=HANGS)
    assert running.returncode == code, said
    assert "Traceback" not in said
    assert not Path("lightning_logs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_test_does_not_count_as_done(number, code, run):
    """Struck from within, by a callback of the user's."""
    before = (run / "test.json").read_bytes()
    Path("strike.py").write_text(
        "import os, lightning.pytorch\nclass Strike(lightning.pytorch.Callback):\n"
        f"    def on_test_batch_end(self, *_): os.kill(os.getpid(), {int(number)})\n"
    )
    said = finish("test", "--trainer.callbacks+=strike.Strike", expected=code)
    assert said.splitlines()[-1].startswith("allconv: ")
    assert (run / "test.json").read_bytes() == before
