"""`python -m allconv bench`: how near training is to the limit of this machine.

A round is a process of its own, in which contenders take turns. A figure is the median over the
rounds, and a ratio that of each round's ratio: the speed of a busy machine changes by the minute.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from jsonargparse.typing import PositiveInt

from allconv.errors import Parser, say
from allconv.rundir import write_text

FIGURES = {
    "fraction_of_matmul": "FLOP/s: step / product",
    "step_vs_notebook": "images/s: ours / its step",
    "fit_vs_step": "images/s: fit / step",
    "pipeline_vs_torchvision": "images/s: ours / the best",
    "first_step_after_imports_s": "start of fit",
    "peak_rss_gib": "memory of fit",
    "step_gflop_s": "training step",
    "matmul_gflop_s": "2048 x 2048, the best way",
    "step_images_s": "training step, bare",
    "notebook_images_s": "its net and optimizer",
    "fit_images_s": "training in fit",
    "bare_images_s": "step, in turn with fit",
    "pipeline_images_s": "our loader, normalized",
    "torchvision_0_images_s": "no workers, normalized",
    "torchvision_2_images_s": "2 workers, normalized",
}


def bench(
    data_dir: str = "data",
    width: int = 64,
    batch_size: int = 128,
    repeats: PositiveInt = 5,
    demo: bool = False,
) -> dict[str, object]:
    """Measure training, input pipeline, memory and start-up; let nothing else run meanwhile.

    Args:
        data_dir: folder with the data set, as in fit.
        width: channels after the first convolution.
        batch_size: images in a training batch.
        repeats: number of rounds; each takes half a minute on two CPU cores.
        demo: use the small synthetic data set instead.
    """
    rounds, place = [], os.path.abspath(data_dir)
    flags = {"model.width": width, "data.batch_size": batch_size, "data.demo": demo}
    for i in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            places = {"data.data_dir": place, "trainer.default_root_dir": folder}
            code = "from allconv.commands import bench_round; bench_round.main()"
            command = [sys.executable, "-c", code, json.dumps(flags | places)]
            process = subprocess.run(command, stdout=subprocess.PIPE)
        if process.returncode:
            sys.exit(process.returncode)  # it has said why
        rounds.append(json.loads(process.stdout.splitlines()[-1]))
        say(f"round {i + 1} of {repeats} is done")
    samples = {name: [values[name] for values in rounds] for name in FIGURES}
    return {
        **{name: median(values) for name, values in samples.items()},
        "spread": {name: [min(values), max(values)] for name, values in samples.items()},
        **{"rounds": repeats, "width": width, "batch_size": batch_size, "demo": demo},
        "machine": f"{rounds[0]['device']} on {platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "torchvision", "lightning")},
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def main(args: list[str]) -> None:
    """Run the command: prints a table, or with `--json` the figures, or writes them to a file."""
    parser = Parser(prog="allconv bench", description=bench.__doc__.splitlines()[0])
    parser.add_function_arguments(bench)
    parser.add_argument("--json", nargs="?", const="-", help="File for the figures; - prints them.")
    given = parser.parse_args(args).as_dict()
    path = given.pop("json")
    result = bench(**given)
    text = json.dumps(result, indent=2)
    if path == "-":
        print(text)
        return
    if path:
        write_text(Path(path), text + "\n")
    print("width {width}, batch {batch_size}, {machine}, {date}".format(**result))
    for name, meaning in FIGURES.items():
        values = [f"{x:.{0 if x > 999 else 2}f}" for x in (result[name], *result["spread"][name])]
        print("{:27}{:>7}  ({} - {})".format(name, *values).ljust(54), meaning)
