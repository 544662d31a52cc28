"""`reproduce`: claims are listed, written into the tables, trained again and compared."""

import json
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from conftest import HANGS, REPO, TINY, finish, process, rows
from lightning.pytorch import callbacks

from allconv.__main__ import main
from allconv.commands import reproduce
from allconv.rundir import read_metrics

CLAIMS = reproduce.claims()
DOCS = ("README.md", "lightning_logs/README.md")


def claim(flags, metric, expected):
    return {
        "flags": flags,
        "result": {"metric": metric, "expected": expected, "tolerance": 0.5},
        "run": {"seeds": [43, 1], "hours": 0.1, "machine": "any", "commit": "0"},
    }


@pytest.fixture
def tiny(run, monkeypatch):
    """Claims on the tiny run's two results, with the run where `reproduce` keeps it."""
    accuracy = 100 * read_metrics(run)[-1]["val/acc"]
    tested = 100 * yaml.safe_load((run / "test.json").read_text())["test/acc"]
    flags = shlex.join(TINY[1:])
    content = {
        "val": claim(flags, "val/acc", accuracy),
        "test": claim(flags, "test/acc", tested),
        "off": claim(flags, "val/acc", accuracy + 0.6),
    }
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in content:
        copy = Path(f"reproduced/{name}/seed_43") / run
        shutil.copytree(run, copy)
        config["recipe"] = f"{name}: {flags}"
        (copy / "config.yaml").write_text(yaml.safe_dump(config))
    Path("claims.yaml").write_text(yaml.safe_dump({"small": content}, sort_keys=False))
    monkeypatch.setattr(reproduce, "CLAIMS", Path("claims.yaml"))
    return content


def code(*args):
    with pytest.raises(SystemExit) as end:
        main(["reproduce", *args])
    return end.value.code


def test_claims_are_listed_with_their_cost(capsys):
    main(["reproduce"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) < 80
    entry = r"  demo +val/acc  81\.40 \+- 8\.43  12 s on 2 idle CPU cores\n    `--config demo`\n"
    assert re.search(entry, text)
    assert "distilled from `wide` (trains wide first)" in " ".join(text.split())
    for name in CLAIMS:
        assert re.search(rf"^  {re.escape(name)} ", text, re.M)


def test_listing_imports_no_torch():
    run = "import sys; from allconv.__main__ import main; main(['reproduce'])"
    assert finish(code=f"{run}; print('torch' in sys.modules)").endswith("False\n")


@pytest.mark.parametrize("name", CLAIMS)
def test_claim_is_whole_and_its_flags_are_parsed(name, capsys):
    found = CLAIMS[name]
    if name == "ema" and not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("Lightning 2.6 has it")
    n, sd = len(found["seeds"]), found.get("sd")
    assert found["metric"] in ("test/acc", "val/acc")
    assert 0 < found["tolerance"] < 12
    assert found["hours"] > 0
    assert found["machine"]
    assert isinstance(found["commit"], str)
    assert sd is None or n >= 2
    if sd and n >= 3:
        assert found["tolerance"] == pytest.approx(3 * sd, abs=0.05)
    with pytest.raises(SystemExit) as end:
        main(["fit", *shlex.split(found["flags"]), "--print_config"])
    assert end.value.code == 0
    assert "model:" in capsys.readouterr().out


def test_tables_are_those_of_the_claims(own_folder):
    for name in DOCS:
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, name)
    main(["reproduce", "--tables", *DOCS])
    for name in DOCS:
        hint = f"run: python -m allconv reproduce --tables {' '.join(DOCS)}"
        assert Path(name).read_text() == (REPO / name).read_text(), hint


def test_a_table_with_a_quantity_is_plotted(own_folder, monkeypatch):
    rows = {f"e{n}": claim(f"--trainer.max_epochs {n}", "test/acc", 50 + n) for n in (1, 2)}
    for n, row in enumerate(rows.values(), 1):
        row["x"] = {"growth-epochs": 3 - n}
    Path("claims.yaml").write_text(yaml.safe_dump({"other": rows}))
    monkeypatch.setattr(reproduce, "CLAIMS", Path("claims.yaml"))
    Path("page.md").write_text("<!-- claims: growth-epochs -->\n<!-- end -->\n")
    main(["reproduce", "--tables", "page.md"])
    lines = Path("page.md").read_text().splitlines()
    assert lines[3].startswith("| `e2` | `--trainer.max_epochs 2` | 52.00 % |")
    assert lines[4].startswith("| `e1` ")
    assert Path("reference/growth-epochs.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["dmo"], 2, "no claim dmo; did you mean demo?"),
        (["xyz"], 2, "no claim xyz; python -m allconv reproduce lists them"),
        (["fast", "--evaluate"], 2, "which are those of record"),
        (["--tables", "none.md"], 1, "none.md: No such file"),
        (["--tables", "bare.md"], 1, "bare.md: no lines <!-- claims: TABLE -->"),
        (["--tables", "page.md"], 1, "no table nothing in claims.yaml"),
    ],
)
def test_bad_input_is_refused(args, status, said, refused):
    Path("page.md").write_text("<!-- claims: nothing -->\n<!-- end -->\n")
    Path("bare.md").write_text("text\n")
    assert said in refused("reproduce", *args, code=status)


def test_claims_are_no_recipe(refused):
    said = refused("fit", "--config", "claims", code=2)
    assert "claims," not in said.replace("--config claims", "")


def test_what_is_complete_is_only_compared(tiny, capfd):
    assert not code("val")
    assert not code("test")
    said = capfd.readouterr().out.splitlines()
    assert ["not trained again" in line for line in said] == [True, False] * 2
    said = said[1::2]
    for line, name in zip(said, ("val", "test"), strict=True):
        assert line.startswith(f"reproduced: {tiny[name]['result']['expected']:.2f} against ")
        assert "+- 0.50" in line


@pytest.mark.slow
def test_the_teacher_of_a_claim_is_trained_first(own_folder, monkeypatch, capfd):
    few = shlex.join([*TINY[1:], "--trainer.max_epochs", "1"])
    student = {**claim(few, "val/acc", 50), "teacher": "wide"}
    content = {"wide": claim(f"{few} --model.width 5", "val/acc", 50), "student": student}
    Path("claims.yaml").write_text(yaml.safe_dump({"small": content}))
    monkeypatch.setattr(reproduce, "CLAIMS", Path("claims.yaml"))
    code("student")
    fits = [line for line in capfd.readouterr().out.splitlines() if " -m allconv fit " in line]
    best = "reproduced/wide/seed_43/lightning_logs/version_0/checkpoints/best.ckpt"
    assert ["--model.width 5" in line for line in fits] == [True, False]
    assert f"--model.teacher {best}" in fits[1]


@pytest.mark.slow
def test_a_claim_without_validation_is_of_the_last_epoch(own_folder, monkeypatch, capfd):
    flags = shlex.join([*TINY[1:], "--data.val_size", "0"])
    Path("claims.yaml").write_text(yaml.safe_dump({"all": {"all": claim(flags, "test/acc", 50)}}))
    monkeypatch.setattr(reproduce, "CLAIMS", Path("claims.yaml"))
    code("all")
    root = "reproduced/all/seed_43/lightning_logs"
    test, measured = capfd.readouterr().out.splitlines()[-1], f"{root}/version_0/test_last.json"
    assert f"reproduced: {100 * json.loads(Path(measured).read_text())['test/acc']:.2f}" in test
    main(["runs", "--logs", root, "--json"])
    (row,) = json.loads(capfd.readouterr().out)["runs"]
    assert f"reproduced: {100 * row['test/acc']:.2f}" in test


def test_a_table_is_compared_and_drawn_and_fails_as_a_whole(tiny, capfd):
    assert code("small") == 1
    said = capfd.readouterr().out
    assert said.count("\nreproduced: ") == 2
    assert "\nnot reproduced: " in said
    assert Path("reproduced/small.png").stat().st_size > 1000


def test_a_run_of_other_flags_is_refused(tiny, refused):
    tiny["val"]["flags"] += " --model.lr 0.2"
    Path("claims.yaml").write_text(yaml.safe_dump({"small": tiny}))
    said = refused("reproduce", "val", code=1)
    assert "delete it, or choose another --out" in said


@pytest.mark.slow
def test_no_data_is_one_line(own_folder, capfd):
    Path("file").touch()
    assert code("fast", "--data_dir", "file") == 1
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_demo_is_reproduced(own_folder, capfd):
    assert not code("demo")
    assert "\nreproduced: " in capfd.readouterr().out


@pytest.mark.slow
def test_a_stopped_reproduction_goes_on(own_folder):
    run = Path("reproduced/demo/seed_43/lightning_logs/version_0")
    running, end = process("reproduce", "demo"), time.monotonic() + HANGS
    while rows(run) < 1 and time.monotonic() < end:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=HANGS)
    assert running.returncode == 143
    assert "demo was stopped; run the same command again to resume it" in said
    assert 1 <= rows(run) < 5
    said = finish("reproduce", "demo")
    assert f"fit --ckpt_path {run}/checkpoints/last.ckpt" in said
    assert "\nreproduced: " in said
    assert rows(run) == 5
