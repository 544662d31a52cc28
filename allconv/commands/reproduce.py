"""`python -m allconv reproduce`: list the published numbers, or train them again and compare.

They are the claims in configs/claims.yaml; its header describes the fields.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from difflib import get_close_matches
from pathlib import Path

from allconv import evaluation, rundir
from allconv.errors import Parser, StoppedError, UsageError, UserError

Claim = dict[str, object]

CLAIMS = rundir.CONFIGS / "claims.yaml"
EVALUATED = 0.05  # points: tolerance of packaged weights, for rounding in a few of 10,000 images
LEVELS = {"notebook, 200 epochs": 61.46, "paper, 350 epochs": 66.29}  # test accuracies in %
MARKED = re.compile(r"(<!-- claims: (\S+) -->\n).*?(?=<!-- end -->)", re.S)


def claims() -> dict[str, Claim]:
    """The claims by name, each with its table and with the flags of its base."""
    found: dict[str, Claim] = {}
    for table, rows in rundir.read_yaml(CLAIMS).items():
        for name, row in rows.items():
            base = found[row["base"]]["flags"] if "base" in row else ""
            claim = {"x": {}, **row, **row["result"], **row["run"], "table": table}
            claim["flags"] = f"{base} {row['flags']}".strip()
            found[name] = {"what": f"`{claim['flags']}`", **claim}
    return found


def choose(name: str, found: dict[str, Claim]) -> dict[str, Claim]:
    """The claim of this name, or the claims of the tables NAME and NAME-...

    Raises:
        UsageError: there is none.
    """
    if name in found:
        return {name: found[name]}
    chosen = {k: c for k, c in found.items() if f"{c['table']}-".startswith(f"{name}-")}
    if not chosen:
        near = get_close_matches(name, [*found, *(c["table"] for c in found.values())], 1)
        hint = f"did you mean {near[0]}?" if near else "python -m allconv reproduce lists them"
        raise UsageError(f"no claim {name}; {hint}")
    return chosen


def _cost(claim: Claim) -> str:
    minutes = 60 * claim["hours"]
    time = f"{60 * minutes:.0f} s" if minutes < 1 else f"{minutes:.{int(minutes < 10)}f} min"
    return f"{time} on {claim['machine']}"


def listed(name: str, found: dict[str, Claim]) -> dict[str, Claim]:
    """The claims of a table, and those of others that are plotted with it, in order.

    Raises:
        UserError: there is none.
    """
    chosen = {k: c for k, c in found.items() if name == c["table"] or name in c["x"]}
    if not chosen:
        raise UserError(f"no table {name} in {CLAIMS.name}")
    return dict(sorted(chosen.items(), key=lambda item: item[1]["x"].get(name, 0)))


def table(name: str, found: dict[str, Claim]) -> str:
    """A table in Markdown."""
    rows = []
    for key, claim in listed(name, found).items():
        spread = f" ± {claim['sd']:.2f}" if "sd" in claim else ""
        cells = {"claim": f"`{key}`", "what": claim["what"]}
        cells[claim["metric"]] = f"{claim['expected']:.2f}{spread} %"
        if "base" in claim:
            difference = claim["expected"] - found[claim["base"]]["expected"]
            cells["change"] = f"{difference:+.2f}"
        cells |= claim.get("also", {}) | {"seeds": ", ".join(map(str, claim["seeds"]))}
        rows.append(cells | {"time": _cost(claim), "commit": f"`{claim['commit']}`"})
    keys = list(max(rows, key=len))
    lines = [keys, len(keys) * ["---"], *([str(row.get(key, "")) for key in keys] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw(name: str, found: dict[str, Claim], path: Path) -> None:
    """Plot the claims of a table growth-QUANTITY over that quantity, if they have one."""
    rows = [claim for claim in listed(name, found).values() if name in claim["x"]]
    if rows:
        from allconv import plots  # imports torch

        points = [(row["x"][name], row["expected"], row.get("sd", 0)) for row in rows]
        path.parent.mkdir(exist_ok=True)
        plots.growth(points, name.partition("-")[2], LEVELS).savefig(path, dpi=100)
        print(f"written: {path}")


def _call(name: str, *args: str) -> None:
    """Run a command of allconv in a process of its own, with its output passed through."""
    print("python -m allconv", shlex.join(args), flush=True)
    child = subprocess.Popen([sys.executable, "-m", "allconv", *args])
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the child as well, and ends it
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    if code in (1, 2):
        sys.exit(code)  # it has printed why
    if code:
        code = code if code > 0 else 128 - code
        raise StoppedError(f"{name} was stopped; run the same command again to resume it", code)


def trained(name: str, found: dict[str, Claim], out: Path, data: list[str]) -> Path:
    """The run of a claim's first seed in `out`: trained with its teacher, resumed, or complete.

    Raises:
        UserError: the run has other flags.
    """
    from allconv import checkpoints  # imports torch, which listing does not need

    claim, teacher = found[name], []
    if "teacher" in claim:
        best = trained(claim["teacher"], found, out, data) / "checkpoints/best.ckpt"
        teacher = ["--model.teacher", str(best)]
    recipe = f"{name}: {claim['flags']}"  # kept in the run's config.yaml
    seed = str(claim["seeds"][0])
    root = out / name / f"seed_{seed}"
    begun = list(root.glob(f"{rundir.LOGS}/version_*/checkpoints/last.ckpt"))
    if not begun:
        flags = [*shlex.split(claim["flags"]), *teacher, "--recipe", recipe, *data]
        flags += ["--seed_everything", seed, "--trainer.default_root_dir", str(root)]
        _call(name, "fit", *flags)
    run = begun[-1].parent.parent if begun else rundir.runs(root / rundir.LOGS)[-1]
    config = rundir.read_config(run)
    if config.get("recipe") != recipe:
        raise UserError(f"{run} is not of {recipe}; delete it, or choose another --out")
    done = checkpoints.load(run / "checkpoints/last.ckpt", resume=True).epoch
    if done < config["trainer"]["max_epochs"]:
        _call(name, "fit", "--ckpt_path", str(run / "checkpoints/last.ckpt"), *data)
    elif begun:
        print(f"{run} is complete: not trained again, unless with another --out")
    return run


def measure(name: str, found: dict[str, Claim], out: Path, data: list[str]) -> float:
    """The metric of a claim in %, of its run in `out`."""
    run, metric = trained(name, found, out, data), found[name]["metric"]
    if metric.startswith("val/"):
        return 100 * rundir.read_metrics(run)[-1][metric]
    if not evaluation.tested(run):
        checkpoint = run / f"checkpoints/{'best' if rundir.best_row(run) else 'last'}.ckpt"
        _call(name, "test", "--ckpt_path", str(checkpoint), *data)
    return 100 * evaluation.tested(run)[metric]


def compare(name: str, claim: Claim, value: float, tolerance: float, how: str) -> bool:
    """Print the value beside the published one; return whether it is within the tolerance."""
    right = abs(value - claim["expected"]) <= tolerance
    against = f"{value:.2f} against {claim['expected']:.2f} +- {tolerance:.2f}"
    word = "reproduced" if right else "not reproduced"
    print(f"{word}: {against} ({name}, {claim['metric']} in %, {how})", flush=True)
    return right


def reproduce(name: str, found: dict[str, Claim], out: Path, data: list[str]) -> bool:
    """Measure each claim of that name and compare; draw them if there are several."""
    values, right, chosen = {}, True, choose(name, found)
    for key, claim in chosen.items():
        values[key] = measure(key, found, out, data)
        right &= compare(key, claim, values[key], claim["tolerance"], f"seed {claim['seeds'][0]}")
    if len(chosen) > 1:
        from allconv import plots  # imports torch

        path = out / f"{next(iter(chosen.values()))['table'].partition('-')[0]}.png"
        expected = {name: claim["expected"] for name, claim in chosen.items()}
        plots.bars(values, expected).savefig(path, dpi=120)
        print(f"written: {path}")
    return right


def evaluate(name: str | None, found: dict[str, Claim], data: list[str]) -> bool:
    """Test the packaged weights, and compare the result with their claim."""
    own = next(key for key, claim in found.items() if "weights" in claim)
    if name not in (None, own):
        raise UsageError(f"--evaluate tests the packaged weights, which are those of {own}")
    _call(own, "test", "--ckpt_path", found[own]["weights"], *data)
    result = json.loads(Path(rundir.LOGS, "pretrained", "test.json").read_text("utf-8"))
    value = 100 * result[found[own]["metric"]]
    return compare(own, found[own], value, EVALUATED, "packaged weights")


def _print_all(found: dict[str, Claim]) -> None:
    """Print the claims table by table, each with its cost and how it is trained."""
    width, shown = shutil.get_terminal_size().columns - 1, None
    for name, claim in found.items():
        if claim["table"] != shown:
            shown = claim["table"]
            print(f"{shown}:")
        value = f"{claim['metric']:8} {claim['expected']:5.2f} +- {claim['tolerance']:.2f}"
        print(f"  {name:21} {value}  {_cost(claim)}")
        first = f" (trains {claim['teacher']} first)" if "teacher" in claim else ""
        text = textwrap.wrap(f"{claim['what']}{first}", width - 4, break_on_hyphens=False)
        print(textwrap.indent("\n".join(text), "    "))
    print("\ntrain one again, or all of a table: python -m allconv reproduce NAME")


def main(args: list[str]) -> None:
    """Run the command; exits with 1 if a number is not reproduced."""
    parser = Parser(prog="allconv reproduce", description="List or reproduce published numbers.")
    parser.add_argument("name", nargs="?", help="A claim, or a table: its claims, and a plot.")
    parser.add_argument("--data_dir", help="Folder with the data set; by default data.")
    parser.add_argument("--out", default="reproduced", help="Folder for the runs.")
    parser.add_argument("--evaluate", action="store_true", help="Only test the packaged weights.")
    parser.add_argument("--tables", nargs="+", help="Markdown files whose tables are written.")
    given, found = parser.parse_args(args), claims()
    data = ["--data.data_dir", given.data_dir] if given.data_dir else []
    if given.evaluate:
        sys.exit(not evaluate(given.name, found, data))
    if given.name:
        sys.exit(not reproduce(given.name, found, Path(given.out), data))
    for path in map(Path, given.tables or []):
        text = path.read_text("utf-8")
        if not MARKED.search(text):
            raise UserError(f"{path}: no lines <!-- claims: TABLE --> and <!-- end --> in it")
        rundir.write_text(path, MARKED.sub(lambda mark: mark[1] + table(mark[2], found), text))
        print(f"written: {path}")
        for _, name in MARKED.findall(text):
            draw(name, found, path.parent / "reference" / f"{name}.png")
    if not given.tables:
        _print_all(found)
