"""`python -m allconv COMMAND`: help, version and typing errors are answered before torch loads."""

import difflib
import os
import sys
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "fit": "train; --ckpt_path last goes on with a stopped run, --init FILE starts from weights",
    "validate": "evaluate on the validation pictures; default: the newest run's best checkpoint",
    "test": "evaluate on the test pictures; default: the newest run's best checkpoint",
    "export": "write a trained net as .onnx or .safetensors, with what is known of it",
    "runs": "list the runs and their figures; runs that differ in their seed alone are summed up",
    "predict": "classify your own pictures, files or folders, and show where the net looked",
    "report": "write report.html about a checkpoint, or compare two: report A B",
    "bench": "measure training, evaluation, input pipeline and start-up on this machine",
}

HELP = """usage: python -m allconv COMMAND [options]

The All-Convolutional Net on CIFAR-100.

{commands}

  python -m allconv COMMAND --help   every option of a command
  python -m allconv --version        the version

start: python -m allconv fit --config configs/demo.yaml"""


def main(args: list[str] | None = None) -> None:
    """Answer what needs no torch, and hand the rest to allconv.cli."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS)) + 2
        print(HELP.format(commands="\n".join(f"  {k:{width}}{v}" for k, v in COMMANDS.items())))
        return
    if args[0] == "--version":
        print(f"allconv {version('allconv')}")
        return
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        print(f"allconv: no command {args[0]}; {hint}", file=sys.stderr)
        sys.exit(2)
    # read when torch loads: by itself a thread of libgomp spins for milliseconds where it should
    # wait. Beside other jobs on 2 cores `fit` took twice as long (124 s, not 55); alone, it is 1 to
    # 4 % slower with it
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # a command that needs no Trainer has a module of its own
    if args[0] in ("fit", "validate", "test"):
        import_module("allconv.cli").main(args)
    else:
        name = "listing" if args[0] == "runs" else args[0]  # allconv.runs: the folders themselves
        import_module(f"allconv.{name}").main(args[1:])


if __name__ == "__main__":
    main()
