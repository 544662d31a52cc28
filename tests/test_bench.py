"""`bench`: what it gives on a tiny net. Never how fast."""

import json
import math

from allconv import bench

TINY = ["--width", "4", "--batch_size", "20", "--repeats", "1", "--demo", "true"]


def test_json_has_every_figure(capsys, own_folder):
    bench.main([*TINY, "--json", "bench.json"])
    found = json.loads((own_folder / "bench.json").read_text())
    for name in bench.FIGURES:
        low, high = found["spread"][name]
        assert 0 < low <= found[name] <= high < math.inf, name
    assert found["width"] == 4
    assert found["peak_rss_gib"] < 8
    parts = found["data_s"] + found["setup_s"]
    assert math.isclose(parts, found["first_step_after_imports_s"])
    assert "fraction_of_matmul" in capsys.readouterr().out
    assert not (own_folder / "lightning_logs").exists()
