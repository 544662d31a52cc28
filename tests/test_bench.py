"""`bench`: what it gives on a tiny net. Never how fast."""

import json
import math

import pytest

from allconv.__main__ import main

RATIOS = (
    "fraction_of_matmul",
    "step_vs_notebook",
    "fit_vs_step",
    "pipeline_vs_torchvision",
    "first_step_after_imports_s",
    "peak_rss_gib",
)


@pytest.mark.slow
def test_json_has_every_figure_and_no_label_is_cut(capsys, own_folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    tiny = "--width 4 --batch_size 20 --repeats 1 --demo true --json bench.json"
    main(["bench", *tiny.split()])
    found = json.loads((own_folder / "bench.json").read_text())
    assert {*RATIOS} < {*found["spread"]}
    for name in found["spread"]:
        low, high = found["spread"][name]
        assert 0 < low <= found[name] <= high < math.inf, name
    assert found["width"] == 4
    assert found["peak_rss_gib"] < 8
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines[1:])
    assert [line.split()[0] for line in lines[1:]] == list(found["spread"])
    assert not (own_folder / "lightning_logs").exists()


def test_wrong_arguments_are_one_line(refused):
    assert "repeats" in refused("bench", "--repeats", "0", code=2)


@pytest.mark.slow
def test_what_the_fit_refuses_is_one_line(refused):
    assert "width is -1" in refused("bench", "--width", "-1", "--demo", "true", code=2)
