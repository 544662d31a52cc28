"""`python -m allconv bench`: how close training comes to the limit of this machine.

Each round is a process that measures everything, since the speed of a shared machine changes by
the minute. Rates and ratios are medians over the rounds; lightning_logs/README.md defines them.
"""

import json as json_format
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from allconv import evaluation
from allconv.errors import Parser, UsageError, say
from allconv.rundir import write_text

# in at most 27 letters, for a line of 80
MEANING = {
    "fraction_of_matmul": "FLOP/s: step / product",
    "step_vs_notebook": "images/s: step / notebook's",
    "fit_vs_step": "images/s: fit / bare step",
    "pipeline_vs_torchvision": "images/s / torchvision's",
    "first_step_after_imports_s": "start of fit; low is good",
    "peak_rss_gib": "memory of fit; low is good",
    "fit_images_s": "training in fit",
    "matmul_gflop_s": "a product of two matrices",
    "step_gflop_s": "bare training step",
    "step_images_s": "bare training step",
    "notebook_images_s": "the notebook's step",
    "pipeline_images_s": "our batches, no net",
    "torchvision_0_images_s": "torchvision's, no workers",
    "torchvision_2_images_s": "torchvision's, 2 workers",
}


def bench(
    data_dir: str = "data",
    width: int = 64,
    batch_size: int = 128,
    repeats: int = 5,
    demo: bool = False,
    json: str | None = None,
) -> None:
    """Measure training, input pipeline, memory and start-up; let nothing else run meanwhile.

    Args:
        data_dir: folder with the data set, as in fit.
        width: channels after the first convolution.
        batch_size: images in a training batch.
        repeats: number of rounds; each takes half a minute on two CPU cores.
        demo: use the small synthetic data set instead.
        json: file for the figures.
    """
    if repeats < 1:
        raise UsageError(f"repeats is {repeats}: it must be above 0")
    flags = [f"--model.width={width}", f"--data.batch_size={batch_size}", f"--data.demo={demo}"]
    flags.append(f"--data.data_dir={os.path.abspath(os.path.expanduser(data_dir))}")
    code, rounds = "from allconv.commands import bench_round; bench_round.main()", []
    for i in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", code, *flags, f"--trainer.default_root_dir={folder}"]
            process = subprocess.run(command, stdout=subprocess.PIPE)
        if process.returncode:
            sys.exit(process.returncode)  # it has printed why
        rounds.append(json_format.loads(process.stdout.splitlines()[-1]))
        say(f"round {i + 1} of {repeats} is done")
    machine = f"{rounds[0].pop('device')} on {platform.machine()}, {os.cpu_count()} cores"
    result = {"rounds": repeats, "width": width, "batch_size": batch_size, "demo": demo}
    result |= {"machine": machine, **evaluation.provenance(), "spread": {}}
    print(f"width {width}, batch {batch_size}, {machine}, {result['date']}")
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        result[name] = middle = median(values)
        result["spread"][name] = low, high = min(values), max(values)
        digits = 0 if middle > 999 else 2
        spread = f"({low:.{digits}f} - {high:.{digits}f})"
        print(f"{name:27}{middle:7.{digits}f} {spread:17} {MEANING[name]}")
    say("higher is better unless noted")
    if json:
        write_text(Path(json), json_format.dumps(result, indent=2) + "\n")


def main(args: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="allconv bench")
    parser.add_function_arguments(bench)
    bench(**parser.parse_args(args).as_dict())
