"""The same run, however many processes hold it and in whatever way: DDP, FSDP2, HSDP; checkpoints go between all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ConfigFactory
from paligemma_vla import Policy
from paligemma_vla.config import VLAConfig
from paligemma_vla.errors import ConfigError
from paligemma_vla.training.checkpoint import load_checkpoint
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.preflight import check_processes
from ranks import Reference, assert_same_curve, last, train_on
from support import identical, read_metrics, write_episodes
from zygote import Zygote

# 33 samples: of each epoch's five batches of 8 the last has one, which leaves every rank but the first without any.
LENGTHS = (9, 2, 14, 8)
SETTINGS = {
    "data.batch_size": 8,
    "training.epochs": 4,
    "training.validate_every_n_steps": 10,
    "training.val_action_samples": 16,
    "training.gradient_accumulation_steps": 2,
    "training.stages": [{"train": "head", "steps": 3}, {"train": "all"}],
    "model.action_head_config.num_flow_samples": 3,
}
BRIEF = {"training.epochs": 2}  # ten steps
FSDP = {"training.parallel": "fsdp"}
HSDP = {"training.parallel": "hsdp", "training.shard_processes": 2}
HALF = {**BRIEF, "model.vlm_config.dtype": "bfloat16"}
ONE_PART = {"training.gradient_accumulation_steps": 1}
RECOMPUTED = "model.vlm_config.activation_checkpointing"
# What a run of one process is changed by, before others are compared with it.
REFERENCES: dict[str, dict[str, Any]] = {
    "whole": {},
    "indivisible": {**BRIEF, **ONE_PART, "data.batch_size": 7},
    "validating": {**BRIEF, "training.validate_every_n_steps": 1},
    "adapters": {**BRIEF, "model.vlm_config.lora": {"rank": 4}},
    "streamed": {**BRIEF, "data.reading": "streamed", "data.stream_block_mb": 0.01, "data.stream_window": 2},
    "longer": {**ONE_PART, "training.epochs": 40, "data.batch_size": 16, "data.num_workers": 1},
}


def case(name: str, reference: str, changes: dict[str, Any], world_size: int, long: bool = False) -> Any:
    return pytest.param(reference, changes, world_size, id=name, marks=[pytest.mark.long] * long)


@pytest.fixture(scope="module")
def whole(session_config: ConfigFactory, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("one")
    write_episodes(folder / "train", lengths=LENGTHS, cameras=2)
    write_episodes(folder / "val", lengths=(3, 38), cameras=2, seed=1)  # 41: a rank has more batches than the others
    data = {"data.train_parquet_files": str(folder / "train"), "data.val_parquet_files": str(folder / "val")}
    config = session_config({**SETTINGS, **data, "training.experiment_name": "whole"}, cameras=2)
    train_on(zygote, config, 1, folder)
    return Reference(config, folder, zygote)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("reference", "changes", "world_size"),
    [
        case("ddp-4", "whole", ONE_PART, 4),  # the other is accumulated of two parts
        case("fsdp-1", "whole", FSDP, 1),
        case("fsdp-2", "whole", FSDP, 2),
        case("fsdp-4", "whole", FSDP, 4, long=True),
        case("hsdp-2x2", "whole", HSDP, 4),
        case("indivisible-ddp-3", "indivisible", {}, 3),
        case("indivisible-fsdp-3", "indivisible", FSDP, 3, long=True),
        # A validation must not leave averaged weights gathered: one that finds nothing better saves nothing.
        case("offloaded-recomputed", "validating", {**FSDP, "training.cpu_offload": True, RECOMPUTED: "selective"}, 2),
        case("recomputed", "validating", {**FSDP, RECOMPUTED: True}, 2, long=True),
        case("adapters", "adapters", FSDP, 2),  # the frozen weights beside them are of another type
        case("streamed", "streamed", {}, 2),
        # Errors of rounding grow with the steps: the bound is the same.
        case("longer-ddp-8", "longer", {}, 8, long=True),
        case("longer-fsdp-8", "longer", FSDP, 8, long=True),
        case("longer-hsdp-2x4", "longer", {**HSDP, "training.shard_processes": 4}, 8, long=True),
    ],
)
def test_world_size_and_kind_of_parallelism_change_nothing(
    whole: Reference, request: pytest.FixtureRequest, reference: str, changes: dict[str, Any], world_size: int
) -> None:
    """Two stages, accumulation, three draws per context, masks of uneven weight, fillers, uneven numbers of batches."""
    one = whole.another(reference, REFERENCES[reference])
    if not one.run_dir.exists():
        whole.train(one, 1)
    many = whole.another(request.node.callspec.id, {**REFERENCES[reference], **changes})
    whole.train(many, world_size)
    assert_same_curve(many, one)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (({}, 1), (FSDP, 2)),
        pytest.param((FSDP, 2), ({}, 1), marks=pytest.mark.long),
        pytest.param((FSDP, 2), (FSDP, 4), marks=pytest.mark.long),
        ((HSDP, 4), ({}, 2)),
        pytest.param(({"training.checkpoint_format": "sharded"}, 2), (HSDP, 4), marks=pytest.mark.long),
        pytest.param(
            ({**FSDP, "training.checkpoint_format": "file"}, 2),
            ({"training.checkpoint_format": "sharded"}, 1),
            marks=pytest.mark.long,
        ),
    ],
    ids=["one-fsdp", "fsdp-one", "fsdp2-fsdp4", "hsdp-ddp", "sharded-hsdp", "file-sharded"],
)
def test_run_goes_on_with_other_processes_held_in_another_way(
    whole: Reference,
    request: pytest.FixtureRequest,
    before: tuple[dict[str, Any], int],
    after: tuple[dict[str, Any], int],
) -> None:
    """From the middle of an epoch; with `auto`, which finds checkpoints of both kinds."""
    name = request.node.callspec.id
    whole.train(whole.another(name, {**before[0], "training.stop_after_step": 8}), before[1])
    resumed = whole.another(name, after[0])
    results = whole.train(resumed, after[1], "--resume_checkpoint", "auto")
    assert "step 8" in results[0].stderr
    assert_same_curve(resumed, whole.config)


@pytest.mark.parametrize("changes", [{}, pytest.param(FSDP, marks=pytest.mark.long)], ids=["ddp", "fsdp"])
def test_run_goes_on_with_as_many_processes_to_the_last_bit(whole: Reference, changes: dict[str, Any]) -> None:
    """Four: with two, sums would come out the same in any order."""
    straight, stopped = (whole.another(f"{name}_{len(changes)}", {**BRIEF, **changes}) for name in ("straight", "stopped"))
    whole.train(straight, 4)
    whole.train(stopped, 4, "--set", "training.stop_after_step=7")
    whole.train(stopped, 4, "--resume_checkpoint", "auto")
    for key in ("state_dict", "ema", "optimizer", "watch", "best_metric"):
        assert identical(last(stopped)[key], last(straight)[key]), key
    assert read_metrics(stopped.run_dir) == read_metrics(straight.run_dir)


@pytest.fixture(scope="module")
def in_shards(whole: Reference) -> VLAConfig:
    config = whole.another("in_shards", {**BRIEF, **FSDP})
    whole.train(config, 2)
    return config


def test_single_file_of_a_run_in_shards_holds_what_the_shards_hold(in_shards: VLAConfig) -> None:
    folder = in_shards.run_dir / "checkpoints"
    file, shards = load_checkpoint(folder / "last.pth.tar"), load_checkpoint(folder / "last.dcp")
    for key in file.keys() - {"optimizer"}:
        assert identical(file[key], shards[key]), key
    plain = torch.load(folder / "last.pth.tar", weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in plain["state_dict"].values())
    answers = [policy_answer(folder / name) for name in ("model_best.pth.tar", "model_best.dcp")]
    assert torch.equal(*answers)


def policy_answer(path: Path) -> torch.Tensor:
    image = torch.arange(32 * 32 * 3, dtype=torch.uint8).view(32, 32, 3).numpy()
    observation = {"image_1": image, "image_2": image, "state": [0.1, 0.2, 0.3], "prompt": "open the drawer"}
    return torch.from_numpy(Policy.from_checkpoint(path).infer(observation, seed=0)["actions"])


def test_shard_that_another_process_finds_damaged_is_passed_over_by_all(whole: Reference, in_shards: VLAConfig) -> None:
    """Each process verifies some: the second of two the second shard."""
    newest = in_shards.run_dir / "checkpoints" / "checkpoint_epoch_2.dcp"
    newest.with_suffix(".pth.tar").unlink()  # made of it at the end of the run, and intact
    shard = sorted(newest.glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    first, second = whole.train(in_shards, 2, "--resume_checkpoint", "auto")
    assert first.stderr.count("passed over: ") == 1
    assert f"{shard.name}: damaged: its sha256 differs" in first.stderr
    assert "resumed" in first.stderr and "checkpoint_epoch_1.dcp: step 5," in first.stderr
    assert "passed over" not in second.stderr


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU computes bfloat16 in float32")
def test_bfloat16_in_shards_stays_near_that_of_one_process(whole: Reference) -> None:
    """What is gathered in bfloat16 is what autocast would have turned to it. Masters are float32."""
    one, two = whole.another("half_1", HALF), whole.another("half_2", {**HALF, **FSDP})
    whole.train(one, 1)
    whole.train(two, 2)
    curves = [[line["train/batch_loss"] for line in read_metrics(each.run_dir) if "train/lr" in line] for each in (one, two)]
    assert curves[1] == pytest.approx(curves[0], rel=0.005)  # 0.0005 measured over 50 steps
    assert {tensor.dtype for tensor in last(two)["state_dict"].values()} == {torch.float32}


def test_groups_that_the_processes_do_not_fill_are_refused(session_config: ConfigFactory) -> None:
    with pytest.raises(ConfigError, match=r"training\.shard_processes: got 2, expected a divisor of .*; give one of 1, 3"):
        check_processes(session_config(HSDP), Distributed(0, 3, torch.device("cpu")))
