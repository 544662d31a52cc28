"""What a training shows at a terminal; test_edges.py has what it prints without one."""

import os
import pty
import re
import subprocess
import sys

import pytest
from conftest import LAST, TINY, TWO


def at_a_terminal(args, columns):
    """What the command writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    variables = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    command = [sys.executable, "-m", "allconv", *args]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=variables) as process:
        os.close(theirs)
        found = b""
        try:
            while part := os.read(ours, 4096):
                found += part
        except OSError:  # Linux: the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[\d;?]*\w", "", found.decode())  # without colours and movements


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "columns", "rate"), [(TWO, 80, "/s "), ([], 140, " images/s, left ")]
)
def test_bar_fits_the_terminal(more, columns, rate, own_folder):
    fit = [*TINY, *more, "--trainer.enable_model_summary", "false"]
    said = at_a_terminal(fit, columns)
    lines = re.split(r"[\r\n]+", said)
    # epoch, batches, loss, last validation, images a second, time left of the epoch and of the run
    bars = [line for line in lines if re.match("epoch 3/3 .*9/9 loss ", line)]
    shown = rf"loss \d\.\d\d val \d\.\d\d \d+\.\d% best \d+\.\d% [\d,]+{rate}00:00/00:00"
    assert re.search(shown, bars[0])
    assert any("validating" in line for line in lines)
    assert max(len(line.rstrip()) for line in lines if line.startswith("epoch")) <= columns
    # each epoch leaves its line, of one process, and no command is broken into two
    assert [line[:5].strip() for line in lines if re.match(r"    \d  ", line)] == ["1", "2", "3"]
    assert said.count("run directory: ") == 2  # at the start and at the end
    assert f"next: python -m allconv test --ckpt_path {LAST.with_name('best.ckpt')}" in lines
    said = at_a_terminal("fit --ckpt_path last --trainer.max_epochs 4".split(), columns)
    assert re.search(r"epoch 4/4 .*loss \d\.\d\d best \d+\.\d% ", said)
