"""Every shipped recipe runs, and every command in the README is one."""

import re
import shlex

import pytest
import yaml
from conftest import REPO

from allconv.__main__ import COMMANDS, main

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))
# what a recipe for other machines is run with here
ON_A_CPU = (
    "--data.demo true --model.width 4 --model.compile false --trainer.accelerator cpu "
    "--trainer.devices 1 --trainer.strategy auto --trainer.precision 32-true "
    "--trainer.max_epochs 2 --trainer.limit_train_batches 2"
).split()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_runs(path, own_folder, capfd):
    main(["fit", "--config", str(path), *ON_A_CPU])
    assert "best epoch" in capfd.readouterr().out
    main(["test"])
    if path.stem == "every_epoch":
        names = {p.name for p in own_folder.rglob("*.ckpt")}
        assert names == {"best.ckpt", "last.ckpt", "epoch0.ckpt", "epoch1.ckpt"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_begins_with_its_command(path):
    head = path.read_text().split("\n\n")[0]
    assert re.match(r"# ", head)
    assert f"configs/{path.name}" in head
    assert yaml.safe_load(path.read_text())


def readme_commands():
    text = (REPO / "README.md").read_text()
    found = re.findall(r"python -m allconv ([^\n`#|]+)", text)
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", readme_commands())
def test_readme_command_is_parsed(command, run, monkeypatch, capsys):
    args = shlex.split(command)
    assert args[0] in COMMANDS
    if "FILE" in args:
        args[args.index("FILE")] = str(run / "checkpoints/last.ckpt")
    args = [str(REPO / a) if a.startswith("configs/") else a for a in args]
    # what needs no Trainer has no configuration to print; its help checks the options by name
    if args[0] in ("fit", "validate", "test"):
        args, expected = [*args, "--print_config"], ["model:"]
    else:
        args, expected = [args[0], "--help"], [a for a in args if a.startswith("--")]
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in expected)
