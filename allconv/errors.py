"""User errors, and how a command exits: one line and an exit code.

Imports nothing heavy.
"""

import contextlib
import ctypes
import difflib
import errno
import os
import re
import signal
import sys
from argparse import Action
from collections.abc import Iterable, Iterator
from typing import NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
OUTPUT_ERRORS = (*DISK_ERRORS, errno.EPIPE)
# flags that other projects call otherwise
ELSEWHERE = {"gpus": "--trainer.devices", "num_gpus": "--trainer.devices"}
ELSEWHERE |= {"checkpoint": "--ckpt_path", "resume": "--ckpt_path", "weights": "--ckpt_path"}
# flags that take files with these endings
ENDINGS = {".ckpt": "--ckpt_path", ".onnx": "--out", ".safetensors": "--out", ".yaml": "--config"}
# types as jsonargparse names them, in words
TYPES = {r"Literal\[(.*?)\]": r"\1", "'": "", ", ": " or ", "NoneType": "null", "tuple": "a list"}
TYPES |= {r"\b(int or )?float\b( or int\b)?": "a number", r"\bint\b": "a whole number"}
TYPES |= {r"\bbool\b": "true or false"}


class UserError(ValueError):
    """An error the user can fix: the command prints one line and exits with 1."""

    code = 1


class UsageError(UserError):
    """Invalid arguments: exit code 2."""

    code = 2


class StoppedError(UserError):
    """A signal stopped the run: exit code 128 + its number."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def printable(text: object) -> str:
    """The text with control characters, newlines among them, escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def say(*lines: object) -> None:
    """Print notes to stderr: stdout is for results."""
    for line in lines:
        print("allconv:", printable(line), file=sys.stderr, flush=True)


def end(code: int, message: object) -> NoReturn:
    """Print one line to stderr, unless it is empty, and exit."""
    if code > 128:  # ignore a second Ctrl-C while the process exits
        sys.unraisablehook = lambda _: None  # CPython reports one that comes during this call
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = " ".join(str(message).split())
    # jsonargparse reports every type it tried: keep the error of the class that was named
    first = "(^Does not validate.*? Errors: - |(?=Problem with|Import path does))"
    if failed := re.search(first + "(.*?) - (Problem|Import|Not a v|Expected )", line):
        line = failed[2]
    if line:
        say(line)
    sys.exit(code)


@contextlib.contextmanager
def command() -> Iterator[None]:
    """Context of every command: a user error becomes one line, any other keeps its traceback."""
    if sys.stdout is None:
        end(1, "standard output is closed")
    with contextlib.suppress(AttributeError):  # a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal lacks characters
    rank = os.environ.get("LOCAL_RANK", "0")
    if not rank.isdigit():
        end(2, f"the environment variable LOCAL_RANK is {rank}: it must be a number")
    if sys.platform == "linux" and rank != "0":
        # a worker process ends with its launcher, whatever it is waiting for
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        end(error.code, error)
    except SystemExit as stop:
        if stop.code in (130, 143):
            end(stop.code, "stopped")
        raise
    except (OSError, ValueError) as error:
        # Lightning's loggers and torch's writer wrap a disk error in one of their own
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if isinstance(cause, BrokenPipeError) or getattr(cause, "errno", None) in DISK_ERRORS:
            # nothing more can be written, but Python would flush stdout again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(cause, BrokenPipeError):
            sys.exit(1)  # the reader, such as `head`, has closed the pipe
        if getattr(cause, "filename", None):
            end(1, f"{cause.filename}: {cause.strerror}")
        if getattr(cause, "errno", None) in DISK_ERRORS:
            end(1, f"cannot write: {cause.strerror}")
        raise


class OneLineErrors:
    """Parser mixin: an error is one line, with a suggestion for a misspelt name."""

    classes: tuple[str, ...] = ()  # that a value may name
    recipes: tuple[str, ...] = ()  # that --config may name

    def __init__(self, *args, **kwargs):
        # the parser of a named class has no prog of its own; flags are not abbreviated
        super().__init__(*args, **{"prog": "allconv", "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and exit with 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        line, words, meant = " ".join(message.split()), [], {}
        line = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", line)
        if re.search("nrecognized|not accept", line):
            words = re.findall(r"--[\w.-]+|(?<=[\"'])[\w.]+(?=[\"'])", line)
            meant = {key: key for a in parser._actions for key in (a.dest, *a.option_strings)}
            words = [ELSEWHERE.get(_last(word), word) for word in words if word not in meant]
        elif no_class := re.match(r"(.*?)- Expected a path but (\w+) ", line):
            words, meant = [no_class[2]], {name: name for name in self.classes}
            line = f"{no_class[1]}no class {no_class[2]}"
        elif union := re.match(
            r"(.*?)Does not validate .* Errors: - Expected a (.*) Given value type: .*: (.*)", line
        ):
            kinds = union[2].split(" - Expected a ")
            line = f"{union[1]}Expected {' or '.join(kinds)}. Got value: {union[3]}"
        if wrong := re.match(r'Parser key "(.*?)": Expected (?:a )?(.*)\. Got value: (.*)', line):
            key, wanted, given = wrong.groups()
            for name, text in TYPES.items():
                wanted = re.sub(name, text, wanted)
            line = f"{key} is {given}: it must be {wanted}"
        line = re.sub('^Parser key "(.*?)"', r"\1", line)
        near = [match for word in words for match in _near(word, meant)]
        if near:
            line += f"; did you mean {meant[near[0]]}?"
        elif "--ckpt_path" in words and any(
            "checkpoint" in str(a.help) for a in parser._actions if not a.option_strings
        ):
            line += "; name the checkpoint without a flag"
        elif stray := re.search(r"unrecognized arguments: (?!--)(\S+)", line):
            line += f"; {self._place(stray[1], parser._actions)}"
        end(2, line)

    def _place(self, word: str, actions: Iterable[Action]) -> str:
        """Where a word belongs that has no flag in front of it."""
        if word.startswith("-"):
            return f"did you mean ./{word}?" if os.path.isfile(word) else "see --help"
        names = [action for action in actions if not action.option_strings]
        flags = {flag for action in actions for flag in action.option_strings}
        meant = {name: f"--config {name}" for name in self.recipes}
        if "--ckpt_path" in flags:
            meant |= {name: f"--ckpt_path {name}" for name in ("last", "best", "pretrained")}
            meant |= {word: f"--ckpt_path {word}"} if word.isdigit() else {}
        if (flag := ENDINGS.get(os.path.splitext(word)[1])) in flags:
            meant[word] = f"{flag} {word}"
        if near := _near(word, meant):
            return f"did you mean {meant[near[0]]}?"
        if any(action.nargs == "+" for action in names):
            return "name all files together, before or after the flags"
        if names:
            return f"names: at most {len(names)}"
        return f"{word} needs a flag in front of it, see --help"


def _near(word: str, names: Iterable[str]) -> list[str]:
    """Names that begin or end with the word, groups left out, else the most similar one."""
    flag = word.startswith("-")
    alike = sorted((n for n in names if n.startswith("-") == flag), key=lambda n: (len(n), n))
    key, keys = _last(word), {name: _last(name) for name in alike}
    begin = [name for name in alike if key and keys[name].startswith(key)]
    end = [name for name in alike if key and keys[name].endswith(key)]
    close = difflib.get_close_matches(key, keys.values(), len(keys) or 1, 0.75)
    similar = [name for name in alike if keys[name] in close]
    return begin or end or difflib.get_close_matches(word, similar, 1)


def _last(name: str) -> str:
    return name.rpartition(".")[2].lstrip("-").lower()


class Help(DefaultHelpFormatter):
    """Help without a default of null, which the text explains, or of a flag without a value."""

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action)
        text = text.replace(" (default: null)", "").replace(" (default: False)", "")
        return text.replace(", default: null)", ")")


class Parser(OneLineErrors, ArgumentParser):
    """Parser of the commands that need no Trainer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=Help, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Name a missing flag as the help does."""
        for action in self._actions:
            if action.option_strings and message.endswith(f"are required: {action.dest}"):
                message = message.replace(f": {action.dest}", f": {action.option_strings[-1]}")
        super().error(message, ex)
