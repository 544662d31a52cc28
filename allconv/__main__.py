"""`python -m allconv COMMAND`: help, version and typos are answered before torch is imported."""

import os
import signal
import sys
from importlib import import_module

COMMANDS = {
    "fit": "train; --ckpt_path last resumes a stopped run, --init FILE starts from weights",
    "validate": "evaluate on the validation images; default: the newest run's best checkpoint",
    "test": "evaluate on the test images; default: the newest run's best checkpoint",
    "export": "write a trained network as .onnx or .safetensors, with its metadata",
    "runs": "list the runs and their results; runs differing only in seed are averaged",
    "predict": "classify your own images, files or folders, and show the class evidence",
    "report": "write an HTML report about a checkpoint, or compare two: report A B",
    "reproduce": "list the published numbers, or train them again and compare",
    "bench": "measure training, input pipeline, memory and start-up on this machine",
}

# what other programs call them
MEANT = {"train": "fit", "resume": "fit --ckpt_path last", "finetune": "fit --config finetune"}
MEANT |= {"eval": "test or validate", "evaluate": "test or validate", "-V": "--version"}

HELP = """usage: python -m allconv COMMAND [options]

The All-Convolutional Net on CIFAR-100.

{commands}

  python -m allconv COMMAND --help   every option of a command
  python -m allconv --version        the version

start: python -m allconv fit --config demo"""


def stop(number: int, frame: object) -> None:
    """Exit at once: an import could swallow an exception, and there is nothing to clean up."""
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides it
    os.write(2, show_cursor + b"allconv: stopped\n")
    os._exit(128 + number)


def main(args: list[str] | None = None) -> None:
    """Handle help, version and typos, and dispatch the commands."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    from allconv import errors  # its imports take 0.1 s

    args = sys.argv[1:] if args is None else args
    if args and args[0] in ("-h", "--help", "help"):
        args = [*args[1:2], "--help"]
    if not args or args[0] == "--help":
        width = max(map(len, COMMANDS)) + 2
        print(HELP.format(commands="\n".join(f"  {k:{width}}{v}" for k, v in COMMANDS.items())))
        return
    if args[0] == "--version":
        import allconv

        print(f"allconv {allconv.__version__}")
        return
    if args[0] not in COMMANDS:
        import difflib

        known = {name: name for name in (*COMMANDS, "--version")} | MEANT
        near = difflib.get_close_matches(args[0], known, 1)
        hint = f"did you mean {known[near[0]]}?" if near else f"commands: {', '.join(COMMANDS)}"
        if args[0].startswith("-") and (later := [arg for arg in args if arg in COMMANDS]):
            hint = f"the command comes first: allconv {later[0]} {args[0]} ..."
        errors.end(2, f"no command {args[0]}; {hint}")
    # Read when torch is loaded. By default an idle libgomp thread spins for milliseconds: beside
    # other jobs on 2 cores, that doubled the time of `fit` (124 s instead of 55). On an idle
    # machine, this setting costs 1 to 4 %.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.pop("MPLBACKEND", None)  # no window is opened, and an unknown backend is an error
    with errors.command():
        if args[0] in ("fit", "validate", "test"):
            import_module("allconv.training.cli").main(args)
        else:  # what needs no Trainer
            import_module(f"allconv.commands.{args[0]}").main(args[1:])


if __name__ == "__main__":
    main()
