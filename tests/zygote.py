"""Real commands, in processes of their own, without paying for the imports each time.

One single-threaded process has imported torch, transformers, pyarrow and the commands; each request forks a child of it that
runs `paligemma-vla ARGV` to its end, uncaught errors and exit handlers included.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

PROGRAM = """#!{python} -S
import sys
from multiprocessing.connection import Client
with Client({address!r}) as zygote:
    zygote.send(sys.argv[1:])
    status, stdout, stderr = zygote.recv()
sys.stdout.write(stdout)
sys.stderr.write(stderr)
sys.exit(status)
"""
LIGHT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Result:
    """How a command ended. status: exit status, negative for a signal. hung: it was killed because its time was up.

    peak_bytes: largest resident memory; a forked child begins with its parent's (some 300 MB of libraries), as any process
    that imports them would.
    """

    status: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int
    hung: bool


@dataclass(frozen=True)
class Child:
    """A running command: leader of a process group of its own, so `os.killpg(child.pid, ...)` reaches its workers too."""

    zygote: Zygote
    pid: int

    def wait(self, timeout: float) -> Result:
        """Its end; after `timeout` seconds the whole group is killed, and `hung` says so."""
        ended = self.zygote.ask(wait=self.pid, timeout=timeout)
        printed = [self.zygote.printed(self.pid, name) for name in ("stdout", "stderr")]
        return Result(ended["status"], *printed, ended["seconds"], ended["peak_bytes"], ended["hung"])


class Zygote:
    """`with Zygote() as zygote: zygote.run(["stats", ...], cwd)`. memory: limit of a child's address space in bytes."""

    def __init__(self, memory: int | None = None) -> None:
        self.memory = memory

    def __enter__(self) -> Zygote:
        self._folder = tempfile.TemporaryDirectory(prefix="zygote-")
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **LIGHT},
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def start(self, argv: list[str], cwd: Path, environment: Mapping[str, str] | None = None) -> Child:
        """Begin a command; it may be killed by its `pid` from here on. environment: what it has besides this process's."""
        words = [str(word) for word in argv]
        return Child(self, self.ask(argv=words, cwd=str(cwd), memory=self.memory, environment=dict(environment or {}))["pid"])

    def run(self, argv: list[str], cwd: Path, timeout: float = 60) -> Result:
        return self.start(argv, cwd).wait(timeout)

    def run_script(self, script: Path, cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a shell script that calls `$PALIGEMMA_VLA COMMAND ...`; each call is as `run`."""
        with Listener() as listener, ThreadPoolExecutor(1) as executor:
            program = Path(self._folder.name) / "paligemma-vla"
            program.write_text(PROGRAM.format(python=sys.executable, address=listener.address), encoding="utf-8")
            program.chmod(0o700)
            variables = {**os.environ, **environment, "PALIGEMMA_VLA": str(program)}
            running = executor.submit(
                subprocess.run, [script], cwd=cwd, env=variables, capture_output=True, text=True, check=False
            )
            running.add_done_callback(lambda _: Client(listener.address).close())
            while True:
                with listener.accept() as caller:
                    try:
                        done = self.run(caller.recv(), cwd, timeout=300)
                    except EOFError:  # the script is over
                        return running.result()
                    caller.send((done.status, done.stdout, done.stderr))

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def printed(self, pid: int, name: str) -> str:
        path = Path(self._folder.name) / f"{pid}.{name}"
        text = path.read_text(encoding="utf-8", errors="replace")
        path.unlink()
        return text


def serve(folder: str) -> None:
    """Answer requests until there are no more, then end what still runs."""
    import gc

    import torch

    import paligemma_vla.cli.data
    import paligemma_vla.cli.evaluate
    import paligemma_vla.cli.stats
    import paligemma_vla.cli.train
    import paligemma_vla.evaluation.report
    import paligemma_vla.model.paligemma_vlm
    import paligemma_vla.training.trainer  # noqa: F401 - a child finds all of these imported
    from paligemma_vla.training.run import installed_packages

    installed_packages()
    # Whoever started the tests may have had some signals ignored (nohup, a background job), which the commands would honour.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)
    gc.freeze()  # what is never collected is never copied into a child
    replies = os.fdopen(os.dup(1), "w")
    running: dict[int, float] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            began = running.pop(request["wait"])
            answer = _wait(request["wait"], began, request["timeout"])
        else:
            answer = {"pid": _fork(request, folder)}
            running[answer["pid"]] = time.monotonic()
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _fork(request: dict[str, Any], folder: str) -> int:
    ready, set_up = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(request["cwd"])
        _redirect(os.devnull, 0)
        for number, name in enumerate(("stdout", "stderr"), 1):
            _redirect(os.path.join(folder, f"{os.getpid()}.{name}"), number)
        if request["memory"]:
            resource.setrlimit(resource.RLIMIT_AS, (request["memory"],) * 2)
        os.close(ready)
        os.close(set_up)
        os.environ.update(request["environment"])
        _run(request["argv"])
    os.close(set_up)
    os.read(ready, 1)  # ends when the child has closed its end: it leads its group now
    os.close(ready)
    return pid


def _run(argv: list[str]) -> NoReturn:
    """Run a command and end as `sys.exit` would, but for the teardown of the modules, which takes longer than most commands."""
    from paligemma_vla.cli.main import main

    try:
        status: Any = main(argv)
    except SystemExit as ended:  # argparse
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def _redirect(path: str, number: int) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.dup2(file, number)
    os.close(file)


def _wait(pid: int, began: float, timeout: float) -> dict[str, Any]:
    deadline, hung = time.monotonic() + timeout, False
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if not hung and time.monotonic() > deadline:
            hung = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.002)
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - began,
        "peak_bytes": usage.ru_maxrss * scale,
        "hung": hung,
    }


if __name__ == "__main__":
    serve(sys.argv[1])
