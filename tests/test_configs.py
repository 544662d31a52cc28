"""Every shipped recipe is parsed and runs, and every command that is shown to a user is one."""

import re
import shlex

import pytest
import yaml
from conftest import REPO

from allconv.__main__ import COMMANDS, main
from allconv.training.settings import RECIPES

CONFIGS = sorted(RECIPES)
# what a recipe for other machines is run with here
ON_A_CPU = (
    "--init null --data.folder null --data.demo true --model.width 2 --model.teacher null "
    "--model.compile false --trainer.accelerator cpu --trainer.devices 1 "
    "--trainer.strategy auto --trainer.precision 32-true "
    "--trainer.max_epochs 1 --trainer.limit_train_batches 1 --trainer.limit_val_batches 1"
).split()


def read(name):
    return yaml.safe_load((REPO / f"configs/{name}.yaml").read_text())


def flat(config, prefix=""):
    """Keys and values of a configuration, without what it appends to a list."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif not key.endswith("+"):
            found[prefix + key] = value
    return found


def printed(args, capsys):
    """The whole configuration of a command, as --print_config shows it."""
    with pytest.raises(SystemExit) as end:
        main([*args, "--print_config"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    return yaml.safe_load(out)


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_is_parsed_as_it_is(name, capsys):
    found = flat(printed(["fit", "--config", name], capsys))
    for key, value in flat(read(name)).items():
        assert found[key] == value


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_runs(name, own_folder, capfd):
    main(["fit", "--config", name, *ON_A_CPU])
    assert "best epoch" in capfd.readouterr().out
    config = yaml.safe_load((own_folder / "lightning_logs/version_0/config.yaml").read_text())
    assert config["recipe"] == name
    names = {p.name for p in own_folder.rglob("*.ckpt")}
    every = {"epoch0.ckpt"} if name == "every_epoch" else set()
    assert names == {"best.ckpt", "last.ckpt", *every}


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_begins_with_its_command(name):
    head = (REPO / f"configs/{name}.yaml").read_text().split("\n\n")[0]
    assert head.startswith("# ")
    assert re.search(rf"--config (configs/{name}\.yaml|{name}\b)", head)
    assert read(name)


def shown_commands():
    """The commands in the README and at the head of each recipe, without what follows in prose."""
    found = set()
    for path in (REPO / "README.md", *(REPO / "configs").glob("*.yaml")):
        text = path.read_text().replace("\\\n", " ")
        for quoted in re.findall(r"```(?:bash|console|sh)\n(.*?)```", text, re.S):
            found |= set(re.findall(r"^\$? *(?:python -m )?allconv (.+)$", quoted, re.M))
        found |= set(re.findall(r"`(?:python -m )?allconv (\w[^`\n]*)`", text))
        found |= set(re.findall(r"^# +(?:python -m )?allconv (\w.*)$", text, re.M))
    commands = {re.split(r" +#|[|>]", command)[0].strip() for command in found}
    return sorted(command for command in commands if "..." not in command)


def test_commands_are_shown():
    first = {command.split()[0] for command in shown_commands()}
    assert {"fit", "test", "predict", "report", "export", "runs", "bench"} <= first


@pytest.mark.parametrize("command", shown_commands())
def test_shown_command_is_parsed(command, run, monkeypatch, capsys):
    args = shlex.split(command)
    if args[0].startswith("-") or args == ["COMMAND", "--help"]:
        return  # of the program itself
    assert args[0] in COMMANDS
    if "DIR" in args:
        for name in ("cat", "dog"):
            (run / "own/train" / name).mkdir(parents=True)
        args[args.index("DIR")] = str(run / "own")
    if "FILE" in args:
        args[args.index("FILE")] = str(run / "checkpoints/last.ckpt")
    args = [str(REPO / a) if a.startswith("configs/") else a for a in args]
    if args[0] in ("fit", "validate", "test") and "--help" not in args:
        assert "model" in printed(args, capsys)
        return
    # what needs no Trainer has no configuration to print; its help lists the options by name
    with pytest.raises(SystemExit) as end:
        main([args[0], "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for option in (a.partition("=")[0] for a in args if a.startswith("--")):
        assert re.search(rf"{option}\b", said), option
