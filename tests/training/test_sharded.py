"""Checkpoints in shards: written while their tensors change, and one file from any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paligemma_vla.errors import CheckpointError
from paligemma_vla.training.checkpoint import read_checkpoint, read_tensors
from paligemma_vla.training.sharded import ShardedWriter
from ranks import ALONE
from support import call, checkpoint_payload, identical, write_checkpoint


def test_what_learns_on_while_it_is_written_is_written_as_it_was(tmp_path: Path) -> None:
    """The writer returns when it has its copies."""
    writer, learning = ShardedWriter(ALONE), checkpoint_payload(1)
    learning["state_dict"]["big"] = torch.ones(3_000_000)
    expected = {name: tensor.clone() for name, tensor in learning["state_dict"].items()}
    writer.save(path := tmp_path / "checkpoint_step_1.dcp", learning, lambda: None)
    assert not path.exists()  # 12 MB and their digest are not done in no time
    for tensor in learning["state_dict"].values():
        tensor.fill_(float("nan"))
    writer.wait()
    assert identical(read_checkpoint(path, ("state_dict",))["state_dict"], expected)


def test_consolidate_writes_the_single_file(tmp_path: Path, capfd: Any) -> None:
    path, file = (
        write_checkpoint(tmp_path / "checkpoint_step_3.dcp", checkpoint_payload(3)),
        tmp_path / "elsewhere" / "one.pth.tar",
    )
    assert call(capfd, "consolidate", "--checkpoint_path", path, "--output_path", file)[0] == 0
    saved = torch.load(file, weights_only=True)
    assert identical(saved, checkpoint_payload(3))
    for wrong, words in [
        (["--checkpoint_path", tmp_path, "--output_path", file], "no checkpoint in shards"),
        (["--checkpoint_path", path, "--output_path", tmp_path / "x.bin"], "on this machine that ends with .pth.tar"),
        (["--checkpoint_path", path, "--output_path", "memory://x/y.pth.tar"], "on this machine that ends with .pth.tar"),
    ]:
        code, _, message = call(capfd, "consolidate", *wrong)
        assert code == 2
        assert words in message


def test_tensors_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint_step_1.dcp", checkpoint_payload(1))
    with pytest.raises(CheckpointError, match=r"checkpoint_step_1\.dcp: does not fit"):
        read_tensors(path, {"state_dict/a.weight": torch.empty(30, 30)})
