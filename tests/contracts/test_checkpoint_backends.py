"""What every checkpoint keeps, whether it is one file or a folder of shards."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from paligemma_vla.errors import CheckpointError, UnreadableCheckpointError
from paligemma_vla.training import checkpoint as ckpt
from paligemma_vla.training.checkpoint import BEST, LAST, load_checkpoint, newest_checkpoint
from support import checkpoint_payload, identical, write_checkpoint

KEYS = (*ckpt.SPEC_KEYS, *ckpt.RESUME_KEYS)
SUFFIXES = {"file": ".pth.tar", "shards": ".dcp"}


@pytest.fixture(params=SUFFIXES)
def suffix(request: pytest.FixtureRequest) -> str:
    return SUFFIXES[request.param]


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, suffix: str) -> Save:
    """`save("epoch_1", step)`: a checkpoint of either kind."""
    return lambda name, step: write_checkpoint(tmp_path / f"checkpoint_{name}{suffix}", checkpoint_payload(step))


def names(folder: Path) -> set[str]:
    return {path.name.split(".")[0].removeprefix("checkpoint_") for path in folder.glob("checkpoint_*")}


def test_checkpoint_is_read_as_it_was_written(save: Save, tmp_path: Path) -> None:
    path = save("step_7", 7)
    loaded = load_checkpoint(path, ckpt.RESUME_KEYS)
    expected = checkpoint_payload(7)
    for key in KEYS:
        if key != "optimizer":  # of which a robot needs nothing
            assert identical(loaded[key], expected[key]), key
    assert identical(ckpt.read_checkpoint(path, ckpt.IN_SHARDS), expected)
    assert not list(tmp_path.glob(".*"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    """One bit in the content of the largest entry of an archive, or in the middle of another file."""
    content = bytearray(path.read_bytes())
    offset = len(content) // 2
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        offset = largest.header_offset + largest.file_size // 2
    content[offset] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


VICTIMS = {
    "file": lambda path: path,
    "file without sha256": lambda path: (path, (path.with_name(f"{path.name}.sha256")).unlink())[0],
    "shard": lambda path: next(path.glob("*.safetensors")),
    "record": lambda path: path / "record.pt",
}


@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink])
@pytest.mark.parametrize("part", VICTIMS)
def test_damage_is_found_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str, damage: Callable[[Path], None]
) -> None:
    suffix = ".pth.tar" if part.startswith("file") else ".dcp"
    older, newer = (write_checkpoint(tmp_path / f"checkpoint_step_{step}{suffix}", checkpoint_payload(step)) for step in (1, 2))
    damage(VICTIMS[part](newer))
    with pytest.raises(CheckpointError, match=newer.name):
        load_checkpoint(newer)
    assert newest_checkpoint(tmp_path) == older
    assert ("passed over: " in caplog.text) == newer.exists()


@pytest.mark.parametrize("name", ["shard-00009-model-00001-of-00001.safetensors", "junk.safetensors"])
def test_shard_that_was_not_written_with_the_others_is_refused(tmp_path: Path, name: str) -> None:
    """All that are there would be read, and which of two counts is chance."""
    older, newer = (write_checkpoint(tmp_path / f"checkpoint_step_{step}.dcp", checkpoint_payload(step)) for step in (1, 2))
    shutil.copy(next(older.glob("*.safetensors")), newer / name)
    with pytest.raises(CheckpointError, match=rf"checkpoint_step_2\.dcp: {name} "):
        load_checkpoint(newer)
    assert newest_checkpoint(tmp_path) == older


@pytest.mark.parametrize("key", KEYS)
def test_key_that_a_resume_needs_is_missed_by_name(tmp_path: Path, suffix: str, key: str) -> None:
    content = checkpoint_payload(1)
    if suffix == ".dcp" and key in ckpt.IN_SHARDS:
        pytest.skip("the writer needs these")
    del content[key]
    path = write_checkpoint(tmp_path / f"checkpoint_step_1{suffix}", content)
    with pytest.raises(CheckpointError, match=rf"checkpoint_step_1.*: missing {key};"):
        load_checkpoint(path, keys=ckpt.RESUME_KEYS)
    assert newest_checkpoint(tmp_path) is None


def test_checkpoint_that_would_run_code_is_refused(save: Save, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save("step_1", 1)
    torch.save({**checkpoint_payload(1), "shards": {}, "epoch": Attack()}, path / "record.pt" if path.is_dir() else path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_newest_is_that_of_the_highest_step_whatever_names_and_dates_say(save: Save, tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for age, (name, step) in enumerate([("epoch_2", 20), ("step_13", 13), ("epoch_1", 10), ("step_9", 9)]):
        os.utime(save(name, step), (age, age))
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name.startswith("checkpoint_epoch_2.")


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), MemoryError("no memory"), PermissionError(errno.EACCES, "denied")]
)
def test_checkpoint_that_may_be_intact_is_not_passed_over(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A run that began afresh beside it would be the worse for it."""
    save("step_1", 1)

    def fails(path: Path) -> str:
        raise error

    monkeypatch.setattr(ckpt, "sha256", fails)
    with pytest.raises(UnreadableCheckpointError, match=r"checkpoint_step_1.*it may be intact"):
        newest_checkpoint(tmp_path)


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on file sizes stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["step_1", "step_2"])
def test_save_that_fails_leaves_what_was_there(save: Save, tmp_path: Path, name: str) -> None:
    """Another checkpoint, or one of the same name."""
    intact = save("step_1", 1)
    with full_disk(), pytest.raises(CheckpointError, match=rf"checkpoint_{name}\..*: cannot be written \(.*File too large"):
        save(name, 2)
    assert newest_checkpoint(tmp_path) == intact
    assert load_checkpoint(intact)["step"] == 1
    assert not list(tmp_path.glob(".*"))
    assert newest_checkpoint(tmp_path) == intact
    assert newest_checkpoint(tmp_path) != save("step_2", 2) == newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("keep_last", "left"),
    [
        (None, {"epoch_1", "epoch_2", "step_7"}),
        (1, {"step_7", "epoch_1"}),
        (2, {"step_7", "epoch_2", "epoch_1"}),
        (9, {"step_3", "step_7", "epoch_1", "epoch_2"}),
    ],
)
def test_prune_keeps_the_newest_and_what_is_linked(save: Save, tmp_path: Path, keep_last: int | None, left: set[str]) -> None:
    """Epoch 1 is the best, step 7 the last. Dates are those of a copy, in the wrong order."""
    for age, (name, step) in enumerate([("step_7", 7), ("epoch_2", 6), ("step_3", 4), ("epoch_1", 3)]):
        path = save(name, step)
        os.utime(path, (age, age))
        if name in ("step_7", "epoch_1"):
            ckpt.link_checkpoint(path, LAST if name == "step_7" else BEST)
    ckpt.prune_checkpoints(tmp_path, keep_last)
    assert names(tmp_path) == left


def test_prune_does_not_count_what_cannot_be_read_among_the_newest(save: Save, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        path = save(f"epoch_{step}", step)
        if step > 2:
            empty(path / "record.pt" if path.is_dir() else path)
    ckpt.prune_checkpoints(tmp_path, keep_last=1)
    assert names(tmp_path) == {"epoch_2", "epoch_3", "epoch_4"}


def test_link_points_at_its_target_and_moves_with_its_folder(save: Save, tmp_path: Path, suffix: str) -> None:
    for step in (1, 2):
        ckpt.link_checkpoint(save(f"epoch_{step}", step), LAST)
        assert load_checkpoint(tmp_path / f"last{suffix}")["step"] == step
        assert ckpt.linked_checkpoints(tmp_path) == {f"checkpoint_epoch_{step}{suffix}"}
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}_moved"))
    assert load_checkpoint(moved / f"last{suffix}")["step"] == 2


def test_leftovers_of_a_killed_save_go_and_never_come_into_the_next(save: Save, tmp_path: Path, suffix: str) -> None:
    path = save("step_1", 1)
    left = tmp_path / (".checkpoint_step_2.pth.tar.9.tmp" if path.is_file() else ".checkpoint_step_2.dcp.tmp")
    if path.is_file():
        shutil.copy(path, left)
    else:
        shutil.copytree(path, left)
        shutil.copy(next(left.glob("shard-*")), left / "shard-00007-model-00001-of-00001.safetensors")
    assert newest_checkpoint(tmp_path) == path
    assert newest_checkpoint(tmp_path) != save("step_2", 2) == newest_checkpoint(tmp_path)
    ckpt.remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_links_and_pruning_know_both_kinds(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"checkpoint_step_{step}.dcp", checkpoint_payload(step))
    write_checkpoint(tmp_path / "checkpoint_step_4.pth.tar", checkpoint_payload(4))
    ckpt.link_checkpoint(tmp_path / "checkpoint_step_1.dcp", BEST)
    ckpt.link_checkpoint(tmp_path / "checkpoint_step_3.dcp", LAST)
    assert (tmp_path / "last.dcp").resolve().name == "checkpoint_step_3.dcp"
    ckpt.link_checkpoint(tmp_path / "checkpoint_step_4.pth.tar", LAST)
    assert not (tmp_path / "last.dcp").is_symlink()
    ckpt.prune_checkpoints(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint_step_1.dcp",
        "checkpoint_step_4.pth.tar",
        "checkpoint_step_4.pth.tar.sha256",
        "last.pth.tar",
        "model_best.dcp",
    ]
