"""The error a user can mend, and how a command ends: one line and an exit code.

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
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

from jsonargparse import ArgumentParser

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
OUTPUT_ERRORS = (*DISK_ERRORS, errno.EPIPE)


class UserError(ValueError):
    """Something the user can mend: ends a command with one line and exit code 1."""

    code = 1


class UsageError(UserError):
    """Arguments that cannot work: exit code 2."""

    code = 2


class StoppedError(UserError):
    """The run was stopped by a signal: exit code 128 + its number."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def check_ranges(
    group: str, values: Mapping[str, object], rules: dict[str, tuple[bool, str]]
) -> None:
    """Refuse a setting that breaks its rule: `rules` has whether it is kept, and its text."""
    for name, (kept, rule) in rules.items():
        if not kept:
            raise ValueError(f"{group}.{name} is {values[name]}: it must be {rule}")


def printable(text: object) -> str:
    """The text with control characters, newlines among them, escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def say(*lines: object) -> None:
    """Print notes on the error stream, so that the output holds results only."""
    for line in lines:
        print("allconv:", printable(line), file=sys.stderr, flush=True)


def end(code: int, message: object) -> NoReturn:
    """Print one line on the error stream and exit."""
    if code > 128:  # a second Ctrl-C while the process ends changes nothing
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = " ".join(str(message).split())
    # jsonargparse lists every type that was tried: what the class that was named said
    first = "(^Does not validate.*? Errors: - |(?=Problem with|Import path does))"
    if failed := re.search(first + "(.*?) - (Problem|Import|Not a v|Expected )", line):
        line = failed[2]
    say(line)
    sys.exit(code)


@contextlib.contextmanager
def command() -> Iterator[None]:
    """What every command runs in: errors the user can mend become one line, others a traceback."""
    if sys.stdout is None:
        end(1, "standard output is closed")
    rank = os.environ.get("LOCAL_RANK", "0")
    if not rank.isdigit():
        end(2, f"the environment variable LOCAL_RANK is {rank}: it must be a number")
    if sys.platform == "linux" and rank != "0":
        # a process of several ends with the one that started it, wherever it waits
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        end(error.code, error)
    except KeyboardInterrupt:
        end(130, "interrupted")
    except SystemExit as stop:
        if stop.code == 143:
            end(143, "terminated")
        raise
    except (OSError, ValueError) as error:
        # Lightning's loggers and torch's writer wrap a disk's error in one of their own
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if isinstance(cause, BrokenPipeError) or getattr(cause, "errno", None) in DISK_ERRORS:
            # nothing more can be written; Python would try once more when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(cause, BrokenPipeError):
            sys.exit(1)  # the reader, `head` for one, has had enough
        if getattr(cause, "filename", None):
            end(1, f"{cause.filename}: {cause.strerror}")
        if getattr(cause, "errno", None) in DISK_ERRORS:
            end(1, f"cannot write: {cause.strerror}")
        raise


class OneLineErrors:
    """Mixin for parsers: an error is one line that names what may have been meant."""

    classes: tuple[str, ...] = ()  # that may be named by a value
    recipes: tuple[str, ...] = ()  # that may be named by --config

    def __init__(self, *args, **kwargs):
        # the parser of a named class has no name of its own; keys are exact
        super().__init__(*args, **{"prog": "allconv", "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and exit with 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        line, words, meant = " ".join(message.split()), [], {}
        line = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line)
        if re.search("nrecognized|not accept", line):
            words = re.findall(r"--[\w.-]+|(?<=[\"'])[\w.]+(?=[\"'])|(?<=arguments: )\w+", line)
            meant = {key: key for a in parser._actions for key in (a.dest, *a.option_strings)}
            words = [word for word in words if word not in meant]
            meant |= {name: f"--config {name}" for name in self.recipes}
        elif no_class := re.match(r"(.*?)- Expected a path but (\w+) ", line):
            words, meant = [no_class[2]], {name: name for name in self.classes}
            line = f"{no_class[1]}no class {no_class[2]}"
        elif union := re.match(
            r"(.*?)Does not validate .* Errors: - Expected a (.*) Given value type: .*: (.*)", line
        ):
            kinds = union[2].replace("typing.", "").split(" - Expected a ")
            line = f"{union[1]}Expected {' or '.join(kinds)}. Got value: {union[3]}"
        near = [match for word in words for match in _near(word, meant)]
        end(2, f"{line}; did you mean {meant[near[0]]}?" if near else line)


def _near(word: str, names: Iterable[str]) -> list[str]:
    """Names that begin or end like the word, as --model.lr does for --lr, or the most similar."""
    names = sorted(names, key=lambda name: (len(name), name))
    begin = [name for name in names if name.startswith(word)]
    # without the group: it may be another one's, and makes no key alike
    keys = {name: name.rpartition(".")[2].lstrip("-") for name in (word, *names)}
    end = [name for name in names if name.startswith("-") and name.endswith(keys[word])]
    near = difflib.get_close_matches(keys[word], keys.values(), len(keys), 0.75)
    return begin or end or difflib.get_close_matches(word, [n for n in names if keys[n] in near], 1)


class Parser(OneLineErrors, ArgumentParser):
    """Parser of the commands that need no Trainer."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Call a missing flag what the help calls it."""
        for action in self._actions:
            if action.option_strings and message.endswith(f"are required: {action.dest}"):
                message = message.replace(f": {action.dest}", f": {action.option_strings[-1]}")
        super().error(message, ex)
