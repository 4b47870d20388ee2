"""The same run, however many processes hold it and in whatever way: DDP, FSDP2, HSDP; checkpoints go between all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paligemma_vla import Policy
from paligemma_vla.config import VLAConfig
from paligemma_vla.errors import ConfigError
from paligemma_vla.training.checkpoint import load_checkpoint
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.parallel import check_shard_groups
from ranks import Reference, assert_same_curve, last, start_ranks, train_on
from support import identical, read_metrics, write_episodes
from zygote import Zygote

ConfigFactory = Callable[..., VLAConfig]
STEPS = 20
# 33 samples: of each epoch's five batches of 8 the last has one, which leaves every rank but the first without any.
LENGTHS = (9, 2, 14, 8)
SETTINGS = {
    "data.batch_size": 8,
    "training.epochs": 4,
    "training.validate_every_n_steps": STEPS // 2,
    "training.val_action_samples": 16,
    "training.gradient_accumulation_steps": 2,
    "training.stages": [{"train": "head", "steps": 3}, {"train": "all"}],
    "model.action_head_config.num_flow_samples": 3,
}
BRIEF = {"training.epochs": 2}  # ten steps
HSDP = {"training.parallel": "hsdp", "training.shard_processes": 2}
FSDP = {"training.parallel": "fsdp"}


@pytest.fixture(scope="module")
def whole(session_config: ConfigFactory, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("one")
    write_episodes(folder / "train", lengths=LENGTHS, cameras=2)
    write_episodes(folder / "val", lengths=(3, 38), cameras=2, seed=1)  # 41: a rank has more batches than the others
    data = {"data.train_parquet_files": str(folder / "train"), "data.val_parquet_files": str(folder / "val")}
    config = session_config({**SETTINGS, **data, "training.experiment_name": "whole"}, cameras=2)
    train_on(zygote, config, 1, folder)
    return Reference(config, folder, zygote)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [({}, 4), (FSDP, 2), pytest.param(FSDP, 4, marks=pytest.mark.long), (HSDP, 4), (FSDP, 1)],
    ids=["ddp-4", "fsdp-2", "fsdp-4", "hsdp-2x2", "fsdp-1"],
)
def test_world_size_and_kind_of_parallelism_change_nothing(
    whole: Reference, tmp_path: Path, changes: dict[str, Any], world_size: int
) -> None:
    """Two stages, accumulation, three draws per context, masks of uneven weight, fillers, uneven numbers of batches."""
    config = whole.another(f"{changes.get('training.parallel', 'ddp')}_{world_size}", changes)
    whole.train(config, world_size)
    assert_same_curve(config, whole.config)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("changes", "world_size"),
    [({}, 8), (FSDP, 8), ({**HSDP, "training.shard_processes": 4}, 8)],
    ids=["ddp-8", "fsdp-8", "hsdp-2x4"],
)
def test_world_size_changes_nothing_over_many_steps(
    whole: Reference, tmp_path: Path, changes: dict[str, Any], world_size: int
) -> None:
    """Errors of rounding grow with the steps: the bound is the same."""
    longer = {"training.epochs": 40, "data.batch_size": 16, "training.gradient_accumulation_steps": 1, "data.num_workers": 1}
    one, many = whole.another("longer", longer), whole.another(f"longer_{len(changes)}", {**longer, **changes})
    whole.train(one, 1)
    whole.train(many, world_size)
    assert_same_curve(many, one)


@pytest.mark.parametrize("changes", [{}, pytest.param(FSDP, marks=pytest.mark.long)], ids=["ddp", "fsdp"])
def test_batch_that_the_processes_do_not_divide_is_exact(whole: Reference, tmp_path: Path, changes: dict[str, Any]) -> None:
    odd = {"data.batch_size": 7, "training.gradient_accumulation_steps": 1, "training.epochs": 2}
    one, three = whole.another("odd_1", odd), whole.another("odd_3", {**odd, **changes})
    whole.train(one, 1)
    told = whole.train(three, 3)
    assert "data.batch_size: 7 is no multiple of processes * gradient_accumulation_steps = 3" in told[0].stderr
    assert_same_curve(three, one)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (({}, 1), (FSDP, 2)),
        ((FSDP, 2), ({}, 1)),
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
    whole: Reference, tmp_path: Path, before: tuple[dict[str, Any], int], after: tuple[dict[str, Any], int]
) -> None:
    """From the middle of an epoch; with `auto`, which finds checkpoints of both kinds."""
    name = "_".join(f"{changes.get('training.parallel', 'ddp')}{world}" for changes, world in (before, after))
    name += f"_{before[0].get('training.checkpoint_format', '')}"
    first = whole.another(name, {**before[0], "training.stop_after_step": 8})
    whole.train(first, before[1])
    second = whole.another(name, after[0])
    told = whole.train(second, after[1], "--resume_checkpoint", "auto")
    assert "step 8" in told[0].stderr
    assert_same_curve(second, whole.config)


@pytest.mark.parametrize("changes", [{}, pytest.param(FSDP, marks=pytest.mark.long)], ids=["ddp", "fsdp"])
def test_run_goes_on_with_as_many_processes_to_the_last_bit(whole: Reference, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Four: with two, sums would come out the same in any order."""
    kind = changes.get("training.parallel", "ddp")
    straight = whole.another(f"straight_{kind}", {**BRIEF, **changes})
    whole.train(straight, 4)
    stopped = whole.another(f"stopped_{kind}", {**BRIEF, **changes, "training.stop_after_step": 7})
    whole.train(stopped, 4)
    whole.train(whole.another(f"stopped_{kind}", {**BRIEF, **changes}), 4, "--resume_checkpoint", "auto")
    for key in ("state_dict", "ema", "optimizer", "watch", "best_metric"):
        assert identical(last(stopped)[key], last(straight)[key]), key
    assert read_metrics(stopped.run_dir) == read_metrics(straight.run_dir)


def test_single_file_of_a_run_in_shards_holds_what_the_shards_hold(whole: Reference, tmp_path: Path) -> None:
    config = whole.another("single", {**FSDP, "training.epochs": 1})
    whole.train(config, 2)
    folder = config.run_dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint_epoch_1.dcp",
        "checkpoint_epoch_1.pth.tar",
        "checkpoint_epoch_1.pth.tar.sha256",
        "last.dcp",
        "last.pth.tar",
        "model_best.dcp",
        "model_best.pth.tar",
    ]
    file, shards = load_checkpoint(folder / "last.pth.tar"), load_checkpoint(folder / "last.dcp")
    for key in file.keys() - {"optimizer"}:
        assert identical(file[key], shards[key]), key
    plain = torch.load(folder / "last.pth.tar", weights_only=True)
    assert plain["state_dict"].keys() == last(whole.config)["state_dict"].keys()
    assert all(type(tensor) is torch.Tensor for tensor in plain["state_dict"].values())
    assert all(part.suffix == ".safetensors" or part.name == "record.pt" for part in (folder / "last.dcp").iterdir())
    answers = [policy_answer(folder / name) for name in ("last.pth.tar", "last.dcp")]
    assert torch.equal(*answers)


def test_shard_that_another_process_finds_damaged_is_passed_over_by_all(whole: Reference, tmp_path: Path) -> None:
    """Each process verifies some: the second of two the second shard."""
    config = whole.another("damaged", {**BRIEF, **FSDP})
    whole.train(config, 2)
    newest = config.run_dir / "checkpoints" / "checkpoint_epoch_2.dcp"
    newest.with_suffix(".pth.tar").unlink()  # made of it at the end of the run, and whole
    shard = sorted(newest.glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    named = [rank.wait(60) for rank in start_ranks(whole.zygote, config, 2, tmp_path, "--resume_checkpoint", str(newest))]
    assert [result.status for result in named] == [2, 2]
    assert all(f"{shard.name}: damaged: its sha256 differs" in result.stderr for result in named)
    first, second = whole.train(config, 2, "--resume_checkpoint", "auto")
    assert first.stderr.count("passed over: ") == 1
    assert "resumed" in first.stderr and "checkpoint_epoch_1.dcp: step 5," in first.stderr
    assert "passed over" not in second.stderr


def policy_answer(path: Path) -> torch.Tensor:
    policy = Policy.from_checkpoint(path)
    image = torch.arange(32 * 32 * 3, dtype=torch.uint8).view(32, 32, 3).numpy()
    observation = {"image_1": image, "image_2": image, "state": [0.1, 0.2, 0.3], "prompt": "open the drawer"}
    return torch.from_numpy(policy.infer(observation, seed=0)["actions"])


@pytest.fixture(scope="module")
def brief(whole: Reference) -> VLAConfig:
    """Ten steps of one process, with a validation after each."""
    config = whole.another("brief", {**BRIEF, "training.validate_every_n_steps": 1})
    whole.train(config, 1)
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training.cpu_offload": True},
        pytest.param({"model.vlm_config.activation_checkpointing": True}, marks=pytest.mark.long),
        {"model.vlm_config.activation_checkpointing": "selective"},
    ],
    ids=["plain", "offload", "recompute", "selective"],
)
def test_what_saves_memory_changes_nothing(whole: Reference, brief: VLAConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Nor does a validation leave averaged weights gathered: one that finds nothing better saves nothing, and a save would have
    the shards gathered anew."""
    often = {**BRIEF, **FSDP, "training.validate_every_n_steps": 1, **changes}
    config = whole.another(f"saving_{'_'.join(map(str, changes.values()))}", often)
    whole.train(config, 2)
    assert_same_curve(config, brief)


def test_adapters_learn_the_same_in_shards(whole: Reference, tmp_path: Path) -> None:
    """Their frozen weights beside them are of another type."""
    adapters = {"model.vlm_config.lora": {"rank": 4}, **BRIEF}
    runs = [whole.another("lora_1", adapters), whole.another("lora_2", {**adapters, **FSDP})]
    for config, world_size in zip(runs, (1, 2), strict=True):
        whole.train(config, world_size)
    assert_same_curve(runs[1], runs[0])


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU computes bfloat16 in float32")
def test_bfloat16_in_shards_stays_near_that_of_one_process(whole: Reference, tmp_path: Path) -> None:
    """What is gathered in bfloat16 is what autocast would have turned to it. Masters are float32."""
    runs = [
        whole.another(f"half_{kind}", {**BRIEF, "model.vlm_config.dtype": "bfloat16", **how})
        for kind, how in (("one", {}), ("two", FSDP))
    ]
    for config, world_size in zip(runs, (1, 2), strict=True):
        whole.train(config, world_size)
    curves = [[line["train/batch_loss"] for line in read_metrics(config.run_dir) if "train/lr" in line] for config in runs]
    assert curves[1] == pytest.approx(curves[0], rel=0.005)  # 0.0005 measured over 50 steps
    assert {tensor.dtype for tensor in last(runs[1])["state_dict"].values()} == {torch.float32}


class Uneven(Distributed):
    """A process of a run whose machines have two processes and one."""

    def all_gather(self, value: Any) -> list[Any]:
        return [2, 2, 1]


@pytest.mark.parametrize(
    ("size", "words"),
    [(2, "got 2, expected a divisor of the 3 processes; give one of 1, 3"), (None, "the machines have 1")],
)
def test_groups_that_the_processes_do_not_fill_are_refused(session_config: ConfigFactory, size: int | None, words: str) -> None:
    config = session_config({**HSDP, "training.shard_processes": size})
    with pytest.raises(ConfigError, match=rf"training\.shard_processes: .*{words}"):
        check_shard_groups(config.training, Uneven(0, 3, torch.device("cpu")))
