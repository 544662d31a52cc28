"""Uses that are odd but possible; each of these once went wrong or came close to it."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPO, TINY, process

from allconv import data
from allconv.__main__ import main
from allconv.model import AllCNN

ONE = [*TINY, "--model.width", "2", "--trainer.max_epochs", "1", "--trainer.limit_train_batches"]
LAST = "lightning_logs/version_0/checkpoints/last.ckpt"


def rates():
    with Path("lightning_logs/version_0/metrics.csv").open(newline="") as file:
        return [round(float(row["lr"]), 6) for row in csv.DictReader(file)]


def test_milestones_are_epochs_when_gradients_are_accumulated(own_folder):
    # 3 batches, 2 a step: the epoch's last step takes the rest, so an epoch has 2 steps, not 1
    main([*ONE, "3", "--trainer.max_epochs", "4", "--trainer.accumulate_grad_batches", "2",
          "--model.milestones", "[2]"])  # fmt: skip
    assert rates() == [0.1, 0.1, 0.05, 0.05]


def test_an_epoch_shorter_than_a_step_keeps_the_rate(own_folder):
    main([*ONE, "3", "--trainer.accumulate_grad_batches", "4"])
    assert rates() == [0.1]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_pictures_have_the_nets_precision(precision, own_folder):
    main([*ONE, "2", "--trainer.precision", precision])
    main(["test"])


def test_sanity_check_before_training(own_folder):
    main([*ONE, "2", "--trainer.num_sanity_val_steps", "1"])


def test_no_logging_interval(own_folder):
    main([*ONE, "2", "--trainer.log_every_n_steps", "0"])


# Lightning's word that there will be no best.ckpt, which is what is asked for here
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_the_checkpoint_it_names_at_the_end_is_there(own_folder, capfd):
    main([*ONE, "2", "--trainer.limit_val_batches", "0"])  # so there is no best
    said = capfd.readouterr().out
    assert Path(said.split("test --ckpt_path ")[1].split()[0]).is_file()


def test_a_random_seed_is_random_and_written_down(own_folder):
    found = set()
    # Lightning's word to its child processes, left behind in this one by other tests
    clean = {key: value for key, value in os.environ.items() if key != "PL_GLOBAL_SEED"}
    for _ in range(2):
        running = process(*ONE, "1", "--seed_everything", "true", env=clean)
        assert running.wait(60) == 0, running.stdout.read()
        running.stdout.close()
    for path in Path("lightning_logs").glob("*/config.yaml"):
        found.add(yaml.safe_load(path.read_text())["seed_everything"])
    assert len(found) == 2


def test_resuming_does_not_need_the_weights_that_the_run_began_with(run):
    shutil.copy(run / "checkpoints/last.ckpt", "begin.ckpt")
    main([*TINY, "--init", "begin.ckpt", "--trainer.max_epochs", "1"])
    Path("begin.ckpt").unlink()
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"])


def test_init_and_resuming_exclude_each_other(run, refused):
    assert "init" in refused("fit", "--ckpt_path", "last", "--init", "best", code=2)


@pytest.mark.parametrize("folder", [".", "checkpoints"])
def test_a_checkpoint_finds_its_run_from_within(folder, run, own_folder, monkeypatch):
    monkeypatch.chdir(run / folder)
    name = "best.ckpt" if folder == "checkpoints" else "checkpoints/best.ckpt"
    main(["test", "--ckpt_path", name, "--data.data_dir", str(own_folder / "data")])


def test_print_config_shows_what_will_be_used(run, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", "last", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["width"] == 4
    assert config["data"]["demo"] is True


def test_resuming_from_an_earlier_epoch_is_exact(own_folder):
    main([*TINY, "--config", str(REPO / "configs/every_epoch.yaml")])
    expected = torch.load(LAST, weights_only=True)["state_dict"]
    table = Path("lightning_logs/version_0/metrics.csv").read_text()
    main(["fit", "--ckpt_path", "lightning_logs/version_0/checkpoints/epoch0.ckpt"])
    found = torch.load(LAST, weights_only=True)["state_dict"]
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert Path("lightning_logs/version_0/metrics.csv").read_text() == table
    # an epoch has one file, not the stopped run's and "-v1" of the other
    assert len(list(Path("lightning_logs/version_0/checkpoints").iterdir())) == 5


def test_a_table_whose_resume_was_killed_is_whole_again(run):
    before = (run / "metrics.csv").read_text()
    # what a kill leaves between moving the table away and writing it anew
    (run / "metrics.csv").rename(run / "metrics.before-resume.csv")
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4"])
    assert (run / "metrics.csv").read_text().startswith(before)
    assert not (run / "metrics.before-resume.csv").exists()


def make(path, content=b""):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def demo(**files):
    data.CIFAR100(demo=True).prepare_data()
    for name, size in files.items():
        path = Path(f"data/cifar-100-demo/{name}.bin")
        path.write_bytes(path.read_bytes()[:size])


DEMO = "--data.demo true "
# what is prepared, arguments, exit code, what the line says
BAD = {
    "config without a file": (None, "--config", 2, "--config"),
    "a file where a folder should be": (
        lambda: make("data/cifar-100-binary"), "", 1, "data/cifar-100-binary"),
    "long name": (None, "--data.data_dir " + 300 * "x", 1, "File name too long"),
    "no place for the demo set": (None, DEMO + "--data.data_dir /proc/none", 1, "/proc/none"),
    "no place for runs": (
        demo, DEMO + "--trainer.default_root_dir /proc/none", 1, "/proc/none"),
    "a file instead of runs": (
        lambda: make("lightning_logs"), DEMO, 1, "lightning_logs"),
    "demo set cut to a record": (
        lambda: demo(train=data.RECORD), DEMO, 1, "cifar-100-demo/train.bin"),
    "seed below": (None, DEMO + "--seed_everything -1", 2, "seed_everything"),
    "seed above": (None, DEMO + "--seed_everything 99999999999", 2, "seed_everything"),
    "no trainer": (
        lambda: make("c.yaml", b"trainer: null"), "--config c.yaml " + DEMO, 2, "trainer"),
    "model is a number": (
        lambda: make("c.yaml", b"model: 3"), "--config c.yaml " + DEMO, 2, "model"),
    "bad milestone": (None, DEMO + "--model.milestones [-3]", 2, "model.milestones"),
    "no weights to begin with": (None, DEMO + "--init none.ckpt", 1, "init is none.ckpt"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_surroundings_are_one_line(what, own_folder, refused):
    prepare, args, code, message = BAD[what]
    if prepare:
        prepare()
    line = refused("fit", "--trainer.max_epochs", "1", "--model.width", "2", *args.split(),
                   code=code)  # fmt: skip
    assert message in line
    assert "object at 0x" not in line  # our insides


def without_a_weight(run):
    content = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    del content["state_dict"]["net.conv9.0.bias"]
    torch.save(content, run / "checkpoints/best.ckpt")


WRONG = {
    "a weight is missing": without_a_weight,
    "config.yaml is no text": lambda run: make(run / "config.yaml", bytes(range(256))),
    "config.yaml is broken": lambda run: make(run / "config.yaml", b"model: {"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_damaged_run_is_named_in_one_line(what, run, refused):
    WRONG[what](run)
    line = refused("test", code=1)
    assert "version_0" in line


STRANGE = {
    "number": {"conv1.0.weight": 3},
    "no hyperparameters": {"state_dict": {"net.conv1.0.weight": torch.zeros(1)}},
    "no weights": {"state_dict": None},
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_strange_checkpoint_is_named_in_one_line(what, own_folder, refused):
    torch.save(STRANGE[what], "strange.ckpt")
    assert "strange.ckpt" in refused("test", "--ckpt_path", "strange.ckpt", code=1)


def test_weights_of_a_checkpoint_without_its_state_cannot_be_resumed(run, refused):
    content = torch.load(LAST, weights_only=True)
    kept = ("state_dict", "hyper_parameters", "epoch", "global_step")
    torch.save({key: content[key] for key in kept}, LAST)
    args = ["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4"]
    assert "last.ckpt" in refused(*args, code=1)


def test_the_notebooks_residual_checkpoint_is_tested(run):
    torch.save(AllCNN(width=4, residuals=True).state_dict(), "epoch9.pt")
    main(["test", "--ckpt_path", "epoch9.pt", "--data.demo", "true", "--model.residuals", "true"])


def python(code):
    """Start a process that runs `code`; for what `python -m allconv` cannot be told by flags."""
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], **out)


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
def test_a_broken_download_leaves_nothing(how, own_folder, capfd, monkeypatch):
    monkeypatch.setattr(data, "URL", Answers(CUT[how]).url)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model.width", "2"])
    assert end.value.code == 1
    assert "put there cifar-100-python.tar.gz" in capfd.readouterr().err
    assert not list(Path("data").iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_download_is_one_message_and_leaves_nothing(number, code, own_folder):
    size = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n"
    url = Answers(size + bytes(200_000), pause=30).url
    start = "from allconv import data, __main__; data.URL = {!r}; __main__.main(['fit'])"
    running = python(start.format(url))
    while not list(Path("data").glob(".download*/*")):
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.05)
    running.send_signal(number)
    said, _ = running.communicate(timeout=30)
    assert running.returncode in (code, -number)
    assert "Traceback" not in said
    assert not list(Path("data").iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_test_does_not_count_as_done(number, code, run):
    start = (
        "import os; from allconv import data, __main__\n"
        "def strike(*_): os.kill(os.getpid(), {}); return normal(*_)\n"
        "normal, data.CIFAR100.on_after_batch_transfer = "
        "data.CIFAR100.on_after_batch_transfer, strike\n"
        "__main__.main(['test'])"
    )
    running = python(start.format(int(number)))
    said, _ = running.communicate(timeout=60)
    assert running.returncode == code, said
    assert "Traceback" not in said


def test_two_processes_resume_without_touching_other_tables(run):
    before = (run / "metrics.csv").read_text()
    two = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    for args in ([*ONE, "2", *two], ["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"]):
        running = process(*args)
        said, _ = running.communicate(timeout=120)
        assert running.returncode == 0, said
    assert (run / "metrics.csv").read_text() == before
    table = Path("lightning_logs/version_1/metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in table] == ["epoch", "0", "1"]


def test_two_processes_with_unequal_numbers_of_batches(run):
    path = Path("data/cifar-100-demo/test.bin")
    path.write_bytes(path.read_bytes() + path.read_bytes()[: data.RECORD])  # 501 and 500
    two = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    running = process("test", *two)
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said
    assert "1,001 pictures" in said
