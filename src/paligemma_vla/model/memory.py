"""How much memory this process may still take."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def available_bytes() -> int | None:
    """Memory this process may still take: the least of what the machine, its control group and its own limit leave.

    None where the system does not tell (it is no Linux).
    """
    if not sys.platform.startswith("linux"):
        return None
    return min((left for left in (_machine(), *_control_groups(), _own_limit()) if left is not None), default=None)


def _machine() -> int | None:
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _own_limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    taken = _kilobytes(Path("/proc/self/status"), "VmSize:")
    return None if limit == resource.RLIM_INFINITY or taken is None else max(0, limit - taken)


def _kilobytes(path: Path, name: str) -> int | None:
    return _read(path, lambda text: next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(name)))


def _control_groups() -> Iterator[int | None]:
    """What is left of the limits of cgroup v2 and v1, of the process's own group and of the root a container sees.

    File pages count as taken, though the kernel gives the inactive ones up: they are added again.
    """
    own = _read(Path("/proc/self/cgroup"), lambda text: [line.split(":", 2) for line in text.splitlines()]) or []
    groups = {"": "/", **{kind: group for _, kind, group in own if kind in ("", "memory")}}
    for root, kind, limit, taken, given_up in [
        ("/sys/fs/cgroup", "", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ]:
        for folder in (Path(root), Path(root + groups.get(kind, "/"))):
            most, used = _read(folder / limit, int), _read(folder / taken, int)
            inactive = _read(folder / "memory.stat", partial(_field, name=given_up)) or 0
            yield None if most is None or used is None else max(0, most - used + inactive)


def _field(text: str, name: str) -> int:
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def _read(path: Path, parse: Callable[[str], T]) -> T | None:
    """What a file of the kernel says; None where it is missing or says something else (`max`)."""
    try:
        return parse(path.read_text())
    except (OSError, ValueError, LookupError, StopIteration):
        return None
