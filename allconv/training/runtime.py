"""Process setup of fit, validate and test: signals, memory, fewer messages."""

import contextlib
import ctypes
import logging
import re
import signal
import sys
import sysconfig
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

import allconv
from allconv.errors import StoppedError

# messages of Lightning that repeat what `Progress` says, or advertise
NOISE = re.compile(
    r"(\[rank: \d+\] )?((GPU|TPU|HPU) available|Tip:|💡|Seed set to|`Trainer\.fit` stopped|Restor"
    r"|Using (\S+ Automatic Mixed|default `Model)|Trainer already configured with model summary"
    r"|LOCAL_RANK|Loaded model weights|Detected KeyboardInterrupt|Received SIGTERM|-{20}|\s*$"
    r"|distributed_backend|All distributed|`weights_only` was not set)"
)
WARNINGS = (
    "Checkpoint directory .* exists",  # of a run that is resumed
    "`ModelCheckpoint.* could not find the monitored key",  # no validation, no best
    "Precision .* is not supported by the model summary",  # only its size in MB is affected
    r"\s*Unable to serialize instance",  # its text is what config.yaml gets
    "The dirpath has changed",  # evaluating from another folder than the run was started in
    ".*LeafSpec",  # between Lightning and torch
    "Glyph .* missing",  # a class name in a script that the figures' font does not have
    "Be aware that when using `ckpt_path`",  # evaluating needs no ModelCheckpoint
    ".*smaller than the logging interval",  # a row per epoch, whatever the interval
    "You're using the WeightAveraging callback with a model",  # nothing is sharded
    "Total length of `list` across ranks is zero",  # data.val_size is 0
    "The '.*_dataloader' does not have many workers",  # none are needed: a batch is one indexing
)


def prepare() -> None:
    """Set the signal handlers, filter messages and warnings, and set the allocator."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(lambda record: not NOISE.match(record.getMessage().lstrip()))
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    threading.excepthook = _thread_error
    keep_memory()


def _stop(number: int, frame: object) -> None:
    """Stop the run, and ignore later signals: they would interrupt the cleaning up.

    SystemExit for SIGINT too: at a KeyboardInterrupt, Lightning sets SIG_IGN, and a second Ctrl-C
    at that moment makes CPython print "Signal 2 ignored due to race condition" and a traceback.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: None)
    sys.exit(128 + number)


@contextlib.contextmanager
def stops() -> Iterator[None]:
    """Restore the exception of a signal that a C extension turned into another one.

    Seen while matplotlib's backend loads (ImportError), and in torch's writer (RuntimeError).
    """
    try:
        yield
    except Exception as error:
        below = error
        while below := below.__cause__ or below.__context__:
            if isinstance(below, SystemExit):
                raise below from None
        raise


@contextlib.contextmanager
def rank_zero_first(seconds: float = 7) -> Iterator[None]:
    """Let rank 0 report an error that all processes have, and end the others meanwhile."""
    try:
        yield
    except StoppedError:
        raise
    except Exception:
        time.sleep(seconds if rank_zero_only.rank else 0)
        raise


def in_users_code(error: BaseException) -> bool:
    """Whether code that is neither installed nor ours has a part in the error."""
    known = (sysconfig.get_path("stdlib"), str(Path(allconv.__file__).parent), "<")
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any("-packages" not in file and not file.startswith(known) for file in files)


def first_failure(launcher: object, seconds: float = 5) -> str | None:
    """Which of the processes that a launcher has started failed within a time; all are ended."""
    processes, end, failed = [*getattr(launcher, "procs", [])], time.monotonic() + seconds, None
    if processes:
        launcher.procs.clear()  # or Lightning's observer, which looks at them, kills this process
    while processes and not failed and time.monotonic() < end:
        for rank, process in enumerate(processes, 1):
            if process.poll():
                failed = f"rank {rank} ended with code {process.returncode}"
        time.sleep(0.05)
    for process in processes:
        process.terminate()
    return failed


def keep_memory() -> None:
    """Make glibc keep freed memory.

    By default it maps each tensor above 32 MiB anew: 98,000 page faults per training step (width
    64, batch 128, 2 cores). Without them, a step is 1.24 times as fast, and an evaluation in
    batches of 500 three times.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no giving back


def _thread_error(thread) -> None:
    """Do not print a disk error in TensorBoard's thread: its next call raises it again."""
    if thread.exc_type is not OSError:
        threading.__excepthook__(thread)
