"""Which episode files lie behind a URL: a file, a folder that is searched through, or a glob, as for paths."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from paligemma_vla.byte_source import Listed, list_files
from paligemma_vla.data.sources import MARKS
from paligemma_vla.errors import DataError
from paligemma_vla.storage import join_url, split_url

COPY_IT = "copy it to this machine; `paligemma-vla data convert` makes episode files of it, which may lie behind URLs"
MAGIC = re.compile(r"[*\[]")  # a question mark begins the options of a URL


def files_behind(url: str, where: str) -> dict[str, Listed]:
    """Files behind a URL, by theirs, sorted. Raises `DataError` naming `where`, or `StorageError`."""
    head, rest = split_url(url)
    if not head.partition("://")[2].strip("/"):
        raise DataError(f"{where}: got '{url}', which names no place; give a bucket, or a folder or file in it")
    folder, pattern = _base(head.rstrip("/"))
    base = folder + rest
    listed = list_files(base)
    files = {_tidy(name): name for name in sorted(listed, key=lambda name: name != _tidy(name))}
    if not pattern and not files:
        return {url: None}  # a file, or nothing: opening it tells
    matches = _matching(list(files), pattern) if pattern else {"": list(files)}
    for match, inside in matches.items():
        for form, mark in MARKS.items():
            if mark in inside:
                place = join_url(base, match) if match else url
                raise DataError(f"{where}: {place}: this is {form} data, which is read from a disk only; {COPY_IT}")
    found = {
        f"{match}/{name}".strip("/")
        for match, inside in matches.items()
        for name in inside
        if not name or (name.endswith(".parquet") and not PurePosixPath(name).name.startswith("."))
    }
    for name in sorted(found):
        if files[name] != name:
            raise DataError(f"{where}: {join_url(base, files[name])}: has a part without a name in its path; rename it")
    return {join_url(base, name): listed[name] for name in sorted(found)}


def _tidy(name: str) -> str:
    """A path without parts that have no name, which stores allow."""
    return "/".join(part for part in name.split("/") if part)


def _base(head: str) -> tuple[str, str]:
    """A URL up to the last folder without a glob, and the pattern below it."""
    magic = MAGIC.search(head, head.index("://") + 3)
    if magic is None:
        return head, ""
    folder, _, _ = head[: magic.start()].rpartition("/")
    return folder, head[len(folder) + 1 :]


def _matching(names: list[str], pattern: str) -> dict[str, list[str]]:
    """Files and folders that match a pattern, each with the names of the files below it; a file's is empty.

    What is called just so matches, and nothing else does then: a name may well hold what a glob would take for its own. What
    is hidden matches only a pattern that says so.
    """
    from fsspec.utils import glob_translate

    literal = any(name == pattern or name.startswith(f"{pattern}/") for name in names)
    expression = re.compile(f"{re.escape(pattern)}$" if literal else glob_translate(pattern))
    hidden = literal or _is_hidden(pattern)
    found: dict[str, list[str]] = {}
    for name in names:
        for place in (name, *(str(parent) for parent in PurePosixPath(name).parents if str(parent) != ".")):
            if expression.match(place) and (hidden or not _is_hidden(place)):
                found.setdefault(place, []).append(name.removeprefix(place).strip("/"))
    return found


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))
