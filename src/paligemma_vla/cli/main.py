"""`paligemma-vla COMMAND`: dispatch, and the promise that a user never sees a traceback unless asked for.

Exit status: 0 only on success, 2 on a usage or input error, 130 when interrupted, 143 when terminated, 141
when nobody reads what it prints.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module

from paligemma_vla import limit_spinning, quiet_libraries
from paligemma_vla.errors import OPEN_FILES_REMEDY, Terminated, VLAError, first_line

COMMANDS = {
    "demo": "the whole job on a simulator: demonstrations, statistics, training, closed-loop evaluation, report",
    "benchmark": "the same on a published benchmark, LIBERO or MetaWorld MT50, over hours; go on by repeating the call",
    "stats": "compute normalisation statistics",
    "plan": "count the memory that training needs",
    "train": "train a policy",
    "consolidate": "write a checkpoint in shards as one .pth.tar",
    "evaluate": "compare a policy's actions with recorded episodes",
    "collect": "record scripted demonstrations in a simulator",
    "export": "write a policy as a Hugging Face folder, and put it on the hub",
    "serve": "answer robots over the network",
    "rollout": "run a policy in a simulator and count successes",
    "replay": "play recorded actions in a simulator, open loop: do they do what the recording says?",
    "data": "look at episodes, check them, convert them from and to LeRobot",
    "tiny": "write a random tiny PaliGemma with tokenizer",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `paligemma-vla`."""
    limit_spinning()
    parser = argparse.ArgumentParser(prog="paligemma-vla", description="Episodes in, a robot policy out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = list(sys.argv[1:] if argv is None else argv)
    wanted = next((word for word in argv if word in COMMANDS), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == wanted:  # the others' imports are not paid for
            module = import_module(f"paligemma_vla.cli.{name}")
            module.add_arguments(command)
            _add_common(command)
            command.set_defaults(run=module.main)
    args = parser.parse_args(argv)
    return guarded(args.run, args)


def script(name: str, argv: Sequence[str] | None = None, entry: str = "main") -> int:
    """Entry point of the scripts named in the specification (`main_train.py`, ...): one command under its own name."""
    limit_spinning()
    module = import_module(f"paligemma_vla.cli.{name}")
    parser = argparse.ArgumentParser(description=COMMANDS[name].capitalize() + ".")
    module.add_arguments(parser)
    _add_common(parser)
    return guarded(getattr(module, entry), parser.parse_args(argv))


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, once. Not in the ranks of torchrun: they must end even while a collective blocks."""
    if "LOCAL_RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; an error becomes one message and exit status 2."""
    logging.raiseExceptions = False  # a log file on a full disk must not print tracebacks
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter shows its code
    log_to_stderr()
    try:
        with _terminable():
            return run(args)
    except KeyboardInterrupt:
        _write("interrupted")
        return 130
    except Terminated:
        _write("terminated")
        return 143
    except BrokenPipeError:  # the reader of the output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would complain at its end that it cannot flush
        return 141
    except Exception as error:  # of any kind: a user gets a message and a status, never a traceback unasked
        if args.debug:
            traceback.print_exc()
        status, message = _status_and_message(error)
        _write(_printable(message))
        return status


def log_to_stderr() -> None:
    """Messages alone, from INFO up."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    quiet_libraries()


def _write(message: str) -> None:
    with suppress(OSError):  # stderr may be a full disk, or closed
        sys.stderr.write(f"{message}\n")


LONGEST_LINE, MOST_LINES = 500, 40


def _status_and_message(error: Exception) -> tuple[int, str]:
    if isinstance(error, VLAError):
        return 2, f"error: {error}"
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        remedy = "check this path, its rights and the space on its disk, or give another path"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = OPEN_FILES_REMEDY
        elif error.errno == errno.ENOSPC and not where:  # of a lock between processes
            remedy = "free some in /dev/shm (docker run --shm-size=8g), or on the disk of $TMPDIR"
        return 2, f"error: {where}{error.strerror}; {remedy}"
    if isinstance(error, UnicodeEncodeError):  # of a file name; what is printed is escaped
        return 2, f"error: this locale has no name for a file ({first_line(error)}); set PYTHONUTF8=1"
    if isinstance(error, MemoryError):
        return 2, "error: out of memory; lower data.batch_size, data.cache_mb or data.num_workers, or the sizes of the model"
    return 1, f"internal error: {type(error).__name__}: {error}\n  this is a defect; --debug shows where"


def _printable(message: str) -> str:
    """A message as a terminal can show it: it may quote a damaged file, with control characters or very long lines."""
    lines = [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in message.split("\n")]
    shown = "\n".join(lines[:MOST_LINES] + [f"  ... and {len(lines) - MOST_LINES} more"] * (len(lines) > MOST_LINES))
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown)


if __name__ == "__main__":
    sys.exit(main())
