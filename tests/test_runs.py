"""`runs`: what it says of whole runs, of damaged ones, and of several seeds."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev

import pytest
import yaml
from conftest import REPO, RUN, TINY, process

from allconv.__main__ import main
from allconv.rundir import best_row


def listed(capsys, *args):
    capsys.readouterr()
    main(["runs", "--json", *args])
    return json.loads(capsys.readouterr().out)


def copied(run, n, seed, test=True, **model):
    """A copy of a run as if it had been trained with another seed, or another net."""
    copy = Path(f"lightning_logs/version_{n}")
    shutil.copytree(run, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["seed_everything"] = seed
    config["data"]["data_dir"] = f"folder{n}"
    config["model"].update(model)
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    table = (copy / "metrics.csv").read_text()
    best = best_row(run)["val/acc"]
    (copy / "metrics.csv").write_text(table.replace(str(best), str(best + seed / 1000)))
    if not test:
        (copy / "test.json").unlink()


def test_a_run_is_listed_with_its_figures(run, capsys):
    (row,) = listed(capsys)["runs"]
    best, tested = best_row(run), json.loads((run / "test.json").read_text())
    assert row["val/acc"] == best["val/acc"]
    assert row["best_epoch"] == best["epoch"] + 1
    assert row["test/acc"] == tested["test/acc"]
    kept = ("number", "recipe", "data", "width", "epochs", "max_epochs", "seed")
    assert [row[key] for key in kept] == [0, None, "demo", 4, 3, 3, 43]
    assert row["when"] < tested["date"]
    main(["test", "--ckpt_path", "last"])  # has a file of its own
    assert json.loads((run / "test_last.json").read_text())["epoch"] == 3
    assert listed(capsys)["runs"][0]["test/acc"] == row["test/acc"]


SELDOM = pytest.param("check_val_every_n_epoch 2", marks=pytest.mark.slow)


@pytest.mark.parametrize("validated", ["val_check_interval 4", SELDOM])
def test_the_best_validation_is_the_best_checkpoints(validated, own_folder, capsys):
    """Also within an epoch, or in every second one."""
    main([*TINY, *f"--trainer.{validated} --trainer.max_epochs 4 --model.lr 0.3".split()])
    shown = re.findall(r"\n    \d .* ", capsys.readouterr().out)[-1].split()[4]
    for command in ("validate", "test"):
        main([command])
    found, tested = (json.loads((RUN / f"{c}.json").read_text()) for c in ("validate", "test"))
    (row,) = listed(capsys)["runs"]
    assert row["val/acc"] == pytest.approx(found["val/acc"])
    assert float(shown) == pytest.approx(100 * found["val/acc"], abs=0.01)
    assert row["test/acc"] == tested["test/acc"]
    # of the best validation so far, when the epoch went on
    (RUN / "test.json").write_text(json.dumps({**tested, "step": tested["step"] - 4}))
    assert listed(capsys)["runs"][0]["test/acc"] is None


def test_a_run_goes_on_from_a_validation_in_an_epochs_last_step(own_folder, capsys):
    main([*TINY, *"--trainer.check_val_every_n_epoch 2 --trainer.max_epochs 2".split()])
    main(["fit", "--ckpt_path", str(RUN / "checkpoints/best.ckpt"), "--trainer.max_epochs", "3"])
    assert listed(capsys)["runs"][0]["epochs"] == 3


def test_a_run_is_called_by_its_config_files_also_when_resumed(own_folder, capsys):
    files = [f"--config={REPO}/configs/{name}.yaml" for name in ("demo", "residual")]
    few = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    main(["fit", *files, *TINY[1:], *few, "--trainer.max_epochs", "1"])
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    main([*TINY, *few, "--trainer.max_epochs", "1", "--recipe", "mine"])
    assert [row["recipe"] for row in listed(capsys)["runs"]] == ["demo+residual", "mine"]


def test_what_a_run_changed_against_its_recipe_is_listed(own_folder, capsys):
    few = "--trainer.limit_train_batches 3 --trainer.limit_val_batches 2 --model.width 4".split()
    main(["fit", "--config", "demo", "--config", "every_epoch", "--trainer.max_epochs", "1", *few])
    main([*TINY, *few, "--trainer.max_epochs", "1", "--model.decay_norms", "false"])
    main([*"fit --config finetune --init null --data.folder null".split(), *TINY[1:], *few])
    layered, alone, nulls = (row["changes"] for row in listed(capsys)["runs"])
    assert {"init null", "folder null"} <= set(nulls.split(", "))
    few = "limit_train_batches 3, limit_val_batches 2"
    assert set(layered.split(", ")) == {"width 4", "max_epochs 1", *few.split(", ")}
    expected = {"width 4", "decay_norms False", "demo True", "batch_size 16", "max_epochs 1"}
    expected |= {*few.split(", ")}
    assert set(alone.split(", ")) == expected


def test_the_reference_run_is_listed(capsys):
    (row,) = [r for r in listed(capsys, "--logs", f"{REPO}/lightning_logs")["runs"]
              if r["number"] == "reference"]  # fmt: skip
    assert (row["epochs"], row["test/acc"], row["problem"]) == (120, 0.7631, None)


def test_seeds_are_summed_up(run, capsys):
    copied(run, 1, 44, test=False)
    copied(run, 2, 44)  # the newest run of a seed counts
    copied(run, 3, 45)
    copied(run, 4, 46, width=8)
    found = listed(capsys)
    (group,) = found["seeds"]
    assert (group["number"], group["seed"], group["width"]) == ([0, 2, 3], [43, 44, 45], 4)
    for key in ("val/acc", "test/acc"):
        values = [found["runs"][i][key] for i in group["number"]]
        assert group[key] == pytest.approx({"mean": mean(values), "sd": stdev(values), "n": 3})
    main(["runs"])
    spread = group["val/acc"]
    assert spread["sd"] > 0
    said = capsys.readouterr().out
    assert f"  {spread['mean']:.4f} ± {spread['sd']:.4f}  " in said
    copied(run, 5, 47, test=False)
    main(["runs"])
    assert capsys.readouterr().out.count(" (n = 3)  ") == 1  # of four seeds, three are tested


def test_sorting_and_plain_text_in_a_pipe(run, capsys):
    copied(run, 10, 44, width=300)
    copied(run, 9, 45, width=5)
    Path("lightning_logs/version_11").mkdir()
    order = [row["number"] for row in listed(capsys)["runs"]]
    assert order == [0, 9, 10, 11]
    order = [row["number"] for row in listed(capsys, "--sort", "width")["runs"]]
    assert order == [11, 0, 9, 10]
    path = Path("lightning_logs/version_9/config.yaml")
    path.write_text(path.read_text().replace("recipe: null", f"recipe: {'long' * 50}"))
    main(["runs"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == (
        "number recipe data width epochs val/acc best_epoch test/acc seed when changes".split()
    )
    assert [line.split()[0] for line in lines[1:5]] == ["0", "9", "10", "11"]
    assert "long" * 50 in lines[2]


def test_a_narrow_terminal_has_the_changes_below_the_run(run, capsys, monkeypatch):
    copied(run, 1, 44, cutmix=0.5)
    for n in (2, 3):
        copied(run, n, 44 + n)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(["runs"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line[:1].strip()][:3] == ["number", "0", "1"]
    assert any(" ± " in line for line in lines)
    assert "changes: width 4, batch_size 16" in lines[2]


def test_an_ascii_terminal_gets_the_seeds_too(run):
    copied(run, 1, 44)
    for variables in ({"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}):
        child = process("runs", env={**os.environ, **variables})
        said = child.communicate()[0]
        assert child.returncode == 0, said
        assert "over seeds" in said


def test_an_ascii_terminal_gets_the_names_of_files(run):
    name = "\u732b.png"
    Path(name).write_bytes((REPO / "lightning_logs/reference/test.png").read_bytes())
    variables = {"PYTHONIOENCODING": "ascii"}
    child = process("predict", name, "--ckpt_path", "best", env={**os.environ, **variables})
    assert r"\u732b.png" in child.communicate()[0]
    assert child.returncode == 0


def test_control_characters_are_escaped(run, capsys):
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "4", "--recipe", "a\x1b[31mb\nc"])
    capsys.readouterr()
    main(["runs"])
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "a\\x1b[31mb\\nc" in said


@pytest.mark.parametrize("flag", ["limit_test_batches=1", "fast_dev_run=true"])
def test_a_test_of_a_part_is_no_test(flag, run, capsys):
    before = {path.name: path.read_bytes() for path in run.glob("test*")}
    main(["test", f"--trainer.{flag}"])
    assert "nothing is written: these are 500 of 1,000 images" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in run.glob("test*")} == before


# each with whether it can be told from a file that says nothing
DAMAGED = {
    "config.yaml": {
        bytes(range(256)): True,
        b"model: {": True,
        b"- 1": True,
        b"model: 3\ndata: [1]\ntrainer:\n": True,
        b"recipe: {a: 1}\nseed_everything: [1]\nmodel: {width: [3]}\n": False,
        b"1: 2\nb: 3\nrecipe: 2026-01-01\n": False,
    },
    "metrics.csv": {
        bytes(range(256)): True,
        b"1,2\n3,4,5\n": True,
        b"epoch,step,val/acc\n0,5,nan\n": False,
        b"epoch,val/acc\n1,abc\n": True,
        b"": False,
    },
    "test.json": {
        bytes(range(256)): False,
        b"{": False,
        b"[1]": False,
        b'{"checkpoint": 3}': False,
        b'{"checkpoint": "best.ckpt", "epoch": 3, "remark": null, "test/acc": "x"}': False,
    },
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_run_is_listed_with_what_is_wrong(name, run, capsys):
    copied(run, 1, 44)
    for content, told in DAMAGED[name].items():
        (run / name).write_bytes(content)
        row, other = listed(capsys)["runs"]
        assert (row["number"], other["width"], other["problem"]) == (0, 4, None)
        assert row["test/acc"] is None or name == "config.yaml"
        assert row["width"] == 4 or name == "config.yaml"
        assert bool(row["problem"]) == told, content
        main(["runs"])
        said = capsys.readouterr().out
        assert not told or row["problem"].splitlines()[0][:60].strip() in said
        assert max(map(len, said.splitlines())) < 250


@pytest.mark.parametrize("end", ["x", "", "99999999999999999999.vm", "²³.vm", "1.2", "..."])
def test_odd_event_files_are_passed_over(end, run, capsys):
    before = listed(capsys)
    (run / f"events.out.tfevents.{end}").touch()
    assert listed(capsys) == before


def test_the_folder_above_the_runs_may_be_named(run, capsys):
    assert listed(capsys, "--logs", ".") == listed(capsys)


def test_a_renamed_run_is_listed(run, capsys):
    copied(run, 1, 44)
    (before, _) = listed(capsys)["runs"]
    run.rename(run.with_name("baseline"))
    (named, one) = listed(capsys)["runs"]
    assert named == before | {"number": "baseline"}
    assert one["number"] == 1
    assert listed(capsys, "--logs", "lightning_logs/baseline")["runs"] == [named]


def test_a_run_may_be_named_and_needs_no_configuration(run, capsys):
    """As those of other programs."""
    for name in ("config.yaml", "hparams.yaml"):
        (run / name).unlink()
    assert listed(capsys, "--logs", str(run)) == listed(capsys)
    main(["runs"])
    said = capsys.readouterr().out.splitlines()[1].split()
    assert said[4] == "3"


def test_the_weights_that_a_run_began_with_are_listed(run, capsys):
    main([*TINY, *"--trainer.max_epochs 1 --init last --model.teacher best".split()])
    for epochs in (2, 3):  # also after it was resumed
        changes = listed(capsys)["runs"][1]["changes"]
        assert "init version_0/checkpoints/last.ckpt" in changes
        assert "teacher version_0/checkpoints/best.ckpt" in changes
        main(f"fit --ckpt_path last --trainer.max_epochs {epochs}".split())


def test_a_logger_may_write_among_the_runs(run, capsys):
    log = "--trainer.logger CSVLogger --trainer.logger.save_dir . --trainer.max_epochs 1"
    main([*TINY, *log.split()])
    assert (run.with_name("version_2") / "metrics.csv").is_file()
    main(["test"])
    assert (run.with_name("version_1") / "test.json").is_file()
    (run.parent / "lightning_logs").mkdir()
    assert [row["number"] for row in listed(capsys)["runs"]] == [0, 1, 2]


def test_a_run_from_python_is_said_to_be_one(own_folder, capsys):
    RUN.mkdir(parents=True)
    (RUN / "hparams.yaml").write_text("width: 8\n")
    (row,) = listed(capsys)["runs"]
    assert row["problem"] == "no config.yaml: trained from Python"


def test_a_run_is_named_by_its_number(run, capsys):
    shutil.copytree(run, run.with_name("version_1"))
    for name in ("0", "version_0"):
        main(["validate", "--ckpt_path", name])
        assert f"{run}/checkpoints/best.ckpt" in capsys.readouterr().out


def test_without_runs_and_with_wrong_columns(own_folder, refused):
    assert "no runs in" in refused("runs", code=1)
    assert "no runs in" in refused("runs", "--logs", "elsewhere", code=1)
    Path("reproduced/csv/lightning_logs/version_0").mkdir(parents=True)  # of a CSVLogger
    config = Path("reproduced/demo/seed_43/lightning_logs/version_0/config.yaml")
    config.parent.mkdir(parents=True)
    config.touch()
    hint = "try --logs reproduced/demo/seed_43/lightning_logs"
    assert hint in refused("runs", "--logs", "reproduced", code=1)
    assert "sort" in refused("runs", "--sort", "widht", code=2)


@pytest.mark.slow
def test_it_is_quick(run):
    """No torch: at most 0.3 of the user CPU time of importing it, measured in turns."""

    def seconds(*args):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    rounds = [(seconds("-m", "allconv", "runs"), seconds("-c", "import torch")) for _ in range(3)]
    assert median(ours / torch for ours, torch in rounds) <= 0.3
