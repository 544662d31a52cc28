"""The README's ladder: every rung is a recipe, and the top one is fast.yaml."""

import pytest
import yaml
from conftest import REPO

from allconv import ladder
from allconv.__main__ import main


def configuration(capsys, config, *flags):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(REPO / "configs" / config), *flags, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_top_is_the_shipped_recipe(capsys):
    top = configuration(capsys, "notebook.yaml", *" ".join(ladder.RUNGS.values()).split())
    fast = configuration(capsys, "fast.yaml")
    # without effect there: the schedule is another, and a test is not a rung's business
    for key in ("gamma", "milestones", "flip_test"):
        del top["model"][key], fast["model"][key]
    assert top["model"] == fast["model"]
    assert top["data"] == fast["data"]


@pytest.mark.parametrize("name", ladder.BESIDE)
def test_changes_are_parsed(name, capsys):
    rung, flags = ladder.BESIDE[name]
    given = [*list(ladder.RUNGS.values())[: rung % len(ladder.RUNGS) + 1], flags]
    changed = configuration(capsys, "notebook.yaml", *" ".join(given).split())
    assert changed != configuration(capsys, "notebook.yaml", *" ".join(given[:-1]).split())
