"""Checkpoints in shards: written while their tensors change, whole or not there, readable without pickle."""

from __future__ import annotations

import errno
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from paligemma_vla.errors import CheckpointError, UnreadableCheckpointError
from paligemma_vla.training import checkpoint as ckpt
from paligemma_vla.training import sharded
from paligemma_vla.training.checkpoint import link_checkpoint, load_checkpoint, newest_checkpoint
from paligemma_vla.training.sharded import IN_SHARDS, RECORD, ShardedWriter, fill, read_whole, split
from ranks import ALONE
from support import call, identical


def payload(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(40, 30, generator=generator), "a.scale": torch.tensor(2.0)}
    moments = {0: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(40, 30, generator=generator)}, 3: {}}
    eight_bits = {"codes": torch.arange(256, dtype=torch.uint8), "signed": True}
    return {
        **dict.fromkeys((*ckpt.SPEC_KEYS, *ckpt.RESUME_KEYS), 0),
        "step": step,
        "state_dict": weights,
        "optimizer": {"state": {**moments, 4: {"exp_avg": eight_bits}}, "param_groups": [{"lr": 0.1, "params": [0, 3, 4]}]},
        "ema": {"average": {"a.weight": torch.randn(40, 30, generator=generator)}, "updates": step},
        "rng": {"torch": torch.get_rng_state()},
    }


def save(path: Path, step: int = 1) -> Path:
    writer = ShardedWriter(None)
    writer.save(path, payload(step), lambda: None)
    writer.wait()
    return path


def test_split_and_fill_are_inverse_and_notes_are_plain() -> None:
    whole = payload(7)
    tensors, record = split(whole)
    assert set(tensors) == {
        "state_dict/a.weight",
        "optimizer/state/0/exp_avg",
        "optimizer/state/4/exp_avg/codes",
        "ema/average/a.weight",
    }
    assert identical(fill(record, tensors), whole)
    assert record["state_dict"]["a.weight"] == {"tensor": "state_dict/a.weight", "shape": [40, 30], "dtype": "float32"}


def test_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint_step_7.dcp", 7)
    assert identical(read_whole(path, IN_SHARDS), payload(7))
    assert sorted(part.name for part in path.iterdir()) == [RECORD, "shard-00001-model-00001-of-00001.safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_what_learns_on_while_it_is_written_is_written_as_it_was(tmp_path: Path) -> None:
    """The writer returns when it has its copies."""
    writer, learning = ShardedWriter(None), payload(1)
    learning["state_dict"]["big"] = torch.ones(3_000_000)
    expected = {name: tensor.clone() for name, tensor in learning["state_dict"].items()}
    writer.save(path := tmp_path / "checkpoint_step_1.dcp", learning, lambda: None)
    assert not path.exists()  # 12 MB and their digest are not done in no time
    for tensor in learning["state_dict"].values():
        tensor.fill_(float("nan"))
    writer.wait()
    assert identical(read_whole(path, ("state_dict",))["state_dict"], expected)


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """A limit on file sizes stands for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_save_that_fails_is_told_and_leaves_the_ones_before(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    whole, failed = save(tmp_path / "checkpoint_step_1.dcp", 1), tmp_path / "checkpoint_step_2.dcp"
    writer = ShardedWriter(None)
    request.getfixturevalue("small_files_only")
    writer.save(failed, payload(2), lambda: pytest.fail("it is not complete"))
    with pytest.raises(CheckpointError, match=r"checkpoint_step_2\.dcp: cannot be written \(.*File too large"):
        writer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not failed.exists()
    assert newest_checkpoint(tmp_path, ALONE) == whole
    writer.save(failed, payload(2), lambda: None)
    writer.wait()
    assert newest_checkpoint(tmp_path, ALONE) == failed


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    """One bit in what the largest entry of an archive holds, or in the middle of another file."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    if path.name == RECORD:
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        place = largest.header_offset + largest.file_size // 2
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("part", ["shard", "record"])
def test_damage_is_found_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str, damage: Callable[[Path], None]
) -> None:
    older, newer = save(tmp_path / "checkpoint_step_1.dcp", 1), save(tmp_path / "checkpoint_step_2.dcp", 2)
    victim = newer / RECORD if part == "record" else next(newer.glob("*.safetensors"))
    damage(victim)
    with pytest.raises(CheckpointError, match=r"checkpoint_step_2\.dcp"):
        load_checkpoint(newer)
    assert newest_checkpoint(tmp_path, ALONE) == older
    assert "passed over: " in caplog.text


@pytest.mark.parametrize("name", ["shard-00009-model-00001-of-00001.safetensors", "junk.safetensors"])
def test_shard_that_was_not_written_with_the_others_is_refused(tmp_path: Path, name: str) -> None:
    """All that are there would be read, and which of two counts is chance."""
    older, newer = save(tmp_path / "checkpoint_step_1.dcp", 1), save(tmp_path / "checkpoint_step_2.dcp", 2)
    shutil.copy(next(older.glob("*.safetensors")), newer / name)
    with pytest.raises(CheckpointError, match=rf"checkpoint_step_2\.dcp: {name} is not one of the shards"):
        load_checkpoint(newer)
    assert newest_checkpoint(tmp_path, ALONE) == older


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), MemoryError("no memory"), PermissionError(errno.EACCES, "denied")]
)
@pytest.mark.parametrize("kind", ["shards", "file"])
def test_checkpoint_that_may_be_whole_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
) -> None:
    """A run that began afresh beside it would be the worse for it."""
    if kind == "shards":
        save(tmp_path / "checkpoint_step_1.dcp", 1)
    else:
        ckpt.save_checkpoint(tmp_path / "checkpoint_step_1.pth.tar", payload(1))

    def fails(path: Path) -> str:
        raise error

    monkeypatch.setattr(sharded, "sha256", fails)
    monkeypatch.setattr(ckpt, "sha256", fails)
    with pytest.raises(UnreadableCheckpointError, match="it may be whole: see to that"):
        newest_checkpoint(tmp_path, ALONE)


def test_record_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint_step_1.dcp")
    torch.save({"step": 1, "shards": {}, "bomb": pytest.fail}, path / RECORD)
    with pytest.raises(CheckpointError, match=r"checkpoint_step_1\.dcp: cannot be read"):
        load_checkpoint(path)


def test_links_and_pruning_know_both_kinds(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / f"checkpoint_step_{step}.dcp", step)
    ckpt.save_checkpoint(tmp_path / "checkpoint_step_4.pth.tar", payload(4))
    link_checkpoint(tmp_path / "checkpoint_step_1.dcp", ckpt.BEST)
    link_checkpoint(tmp_path / "checkpoint_step_3.dcp", ckpt.LAST)
    assert (tmp_path / "last.dcp").resolve().name == "checkpoint_step_3.dcp"
    link_checkpoint(tmp_path / "checkpoint_step_4.pth.tar", ckpt.LAST)
    assert not (tmp_path / "last.dcp").is_symlink()
    ckpt.prune_checkpoints(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint_step_1.dcp",
        "checkpoint_step_4.pth.tar",
        "checkpoint_step_4.pth.tar.sha256",
        "last.pth.tar",
        "model_best.dcp",
    ]


def test_leftovers_of_a_killed_save_go_and_never_come_into_the_next(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint_step_1.dcp")
    left = tmp_path / ".checkpoint_step_2.dcp.tmp"
    shutil.copytree(path, left)
    (left / "shard-00001-model-00001-of-00001.safetensors").rename(left / "shard-00007-model-00001-of-00001.safetensors")
    save(tmp_path / "checkpoint_step_2.dcp", 2)
    assert identical(read_whole(tmp_path / "checkpoint_step_2.dcp", IN_SHARDS), payload(2))
    shutil.copytree(path, left)
    ckpt.remove_leftovers(tmp_path)
    assert not left.exists()


def test_consolidate_writes_the_single_file(tmp_path: Path, capfd: Any) -> None:
    path, file = save(tmp_path / "checkpoint_step_3.dcp", 3), tmp_path / "elsewhere" / "one.pth.tar"
    assert call(capfd, "consolidate", "--checkpoint_path", path, "--output_path", file)[0] == 0
    saved = torch.load(file, weights_only=True)
    assert identical(saved, payload(3))
    for wrong, words in [
        (["--checkpoint_path", tmp_path, "--output_path", file], "no checkpoint in shards"),
        (["--checkpoint_path", path, "--output_path", tmp_path / "x.bin"], "on this machine that ends with .pth.tar"),
        (["--checkpoint_path", path, "--output_path", "memory://x/y.pth.tar"], "on this machine that ends with .pth.tar"),
    ]:
        code, _, told = call(capfd, "consolidate", *wrong)
        assert code == 2
        assert words in told


def test_tensors_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint_step_1.dcp")
    with pytest.raises(CheckpointError, match=r"checkpoint_step_1\.dcp: does not fit"):
        sharded.read_tensors(path, {"state_dict/a.weight": torch.empty(30, 30)})
