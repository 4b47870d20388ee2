"""A new run from a policy's weights: it begins as that policy answers, keeps what fits, and refuses the rest by name."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ConfigFactory
from paligemma_vla import Policy
from paligemma_vla.config import VLAConfig, load_config
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import CheckpointError, VLAError
from paligemma_vla.model.tiny import TinySpec, write_tiny_paligemma
from paligemma_vla.policy import load_trained
from paligemma_vla.schema import Episode
from paligemma_vla.training.checkpoint import load_checkpoint, save_checkpoint
from paligemma_vla.training.trainer import Trainer
from ranks import ALONE, Reference, assert_same_curve
from support import LENGTHS, METADATA, call, identical, make_episode, observation_of, train_here, write_checkpoint
from zygote import Zygote

HEAD = "model.action_head_config"
LORA: dict[str, Any] = {"model.vlm_config.lora": {"rank": 4}}


def begin(config: VLAConfig) -> Trainer:
    return Trainer(config, ALONE)


def policy_of(trainer: Trainer, folder: Path) -> Policy:
    """What the run would answer before its first step."""
    save_checkpoint(folder / "step_0.pth.tar", trainer._payload())
    return Policy.from_checkpoint(folder / "step_0.pth.tar")


def write_other_robot(folder: Path, scale: float = 1.0) -> Path:
    """Episodes with state (z, x) and action (dy, grip, dx), and their statistics beside them; returns those."""
    rng = np.random.default_rng(3)
    names = {"state_names": ("z", "x"), "action_names": ("dy", "grip", "dx")}
    with EpisodeWriter(folder / "data", replace(METADATA, **names)) as writer:
        for number, length in enumerate(LENGTHS):
            known = make_episode(rng, length, number=number)
            action = np.stack([known.action[:, 1], rng.uniform(size=length), known.action[:, 0]], axis=1)
            writer.write(Episode(known.images, known.state[:, [2, 0]], action.astype(np.float32) * scale, known.prompt))
    compute_statistics(str(folder / "data"), "test").save(folder / "stats.json")
    return folder / "stats.json"


def other_robot(folder: Path) -> dict[str, Any]:
    statistics = str(write_other_robot(folder))
    data = {"data.train_parquet_files": str(folder / "data"), "data.normalization_stats_path": statistics, "data.state_dim": 2}
    return {**data, f"{HEAD}.per_action_dim": 3, "training.init_statistics": "own"}


@pytest.mark.parametrize("kind", ["file", "shards", "export"])
def test_run_begins_with_the_averaged_weights_and_nothing_else_of_the_policy(
    tiny_config: ConfigFactory, checkpoint: Path, exported: Path, tmp_path: Path, kind: str
) -> None:
    source = {"file": checkpoint, "shards": tmp_path / "policy.dcp", "export": exported}[kind]
    if kind == "shards":
        write_checkpoint(source, load_checkpoint(checkpoint))
    trainer = begin(tiny_config({"training.init_from": str(source)}, cameras=2))
    saved = load_checkpoint(checkpoint)
    weights = {**saved["state_dict"], **saved["ema"]["average"]}
    assert not identical(weights, saved["state_dict"])
    assert identical(dict(trainer.model.state_dict()), weights)
    assert trainer.ema is not None and trainer.ema.updates == 0
    assert identical(trainer.ema.average, saved["ema"]["average"])
    assert trainer.optimizer.state_dict()["state"] == {}
    assert (trainer.step, trainer.scheduler.last_epoch, trainer.best_metric) == (0, 0, float("inf"))


def test_run_answers_as_the_policy_before_its_first_step(
    tiny_config: ConfigFactory, exported: Path, policy: Policy, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """With another number of cameras, and neither the backbone nor a statistics file at hand."""
    gone = {"model.vlm_config.model_name_or_path": str(tmp_path / "no"), "data.normalization_stats_path": str(tmp_path / "no")}
    trainer = begin(tiny_config({"training.init_from": str(exported), **gone}))
    seen = {name: value for name, value in observation_of(rows[0]).items() if name != "image_2"}
    answer = policy_of(trainer, tmp_path).infer(seen, seed=5)["actions"]
    assert np.array_equal(answer, policy.infer(seen, seed=5)["actions"])
    assert trainer.begins_with is not None
    assert "number of cameras: got 1, expected 2" in trainer.begins_with


def test_weights_that_do_not_learn_are_rounded_only_where_products_are(tiny_config: ConfigFactory, checkpoint: Path) -> None:
    """Norms stay float32, as in a `Policy`."""
    frozen = {f"model.vlm_config.{key}": True for key in ("freeze_vision_tower", "freeze_language_model")}
    config = tiny_config({**frozen, "model.vlm_config.dtype": "bfloat16", "training.init_from": str(checkpoint)}, cameras=2)
    weights, state = load_trained(checkpoint).state_dict, begin(config).model.state_dict()
    assert identical(dict(state), {name: weights[name].to(tensor.dtype) for name, tensor in state.items()})
    assert {tensor.dtype for name, tensor in state.items() if "norm" in name} == {torch.float32}


def test_tensors_of_another_shape_keep_what_both_have(tiny_config: ConfigFactory, checkpoint: Path, tmp_path: Path) -> None:
    """Steps by number, dimensions by name; the rest is as in a run that begins with the backbone alone."""
    changes = {**other_robot(tmp_path), f"{HEAD}.horizon": 6}
    fresh = begin(tiny_config(changes)).model.state_dict()
    trainer = begin(tiny_config({**changes, "training.init_from": str(checkpoint)}))
    before, state = load_trained(checkpoint).state_dict, trainer.model.state_dict()
    expected = {name: tensor.clone() for name, tensor in before.items()}
    head = {name: fresh[f"action_head.{name}"] for name in ("velocity.weight", "velocity.bias")}
    for name, tensor in head.items():  # (3, D): dy, grip, dx of dx, dy
        expected[f"action_head.{name}"] = torch.stack(
            [before[f"action_head.{name}"][1], tensor[1], before[f"action_head.{name}"][0]]
        )
    for name, columns in (("action_encoder.weight", [1, None, 0]), ("state_encoder.0.weight", [2, 0])):
        old, new = before[f"action_head.{name}"], state[f"action_head.{name}"]
        expected[f"action_head.{name}"] = torch.stack([new[:, 1] if c is None else old[:, c] for c in columns], dim=1)
    expected["action_head.position"] = torch.cat([before["action_head.position"], state["action_head.position"][4:]])
    assert identical(dict(state), expected)
    assert not torch.equal(state["action_head.action_encoder.weight"][:, 1], before["action_head.action_encoder.weight"][:, 1])
    assert trainer.begins_with is not None
    for line in (
        "action_head.position: (4, 32) before, (6, 32) now, the first 4 kept",
        "action_head.velocity.weight: (2, 32) before, (3, 32) now, kept: dy, dx",
        "action_head.state_encoder.0.weight: (32, 3) before, (32, 2) now, kept: z, x",
        "statistics: " + str(tmp_path / "stats.json"),
        "action_names: got ('dy', 'grip', 'dx'), expected ('dx', 'dy')",
    ):
        assert line in trainer.begins_with
    trainer.run()


def test_state_input_comes_and_goes(tiny_config: ConfigFactory, checkpoint: Path) -> None:
    blind = {f"{HEAD}.use_state_input": False, "training.max_steps": 1, "training.experiment_name": "blind"}
    without = train_here(tiny_config({**blind, "training.init_from": str(checkpoint)}, cameras=2))
    assert "action_head.state_encoder.0.weight: (32, 3) before, left out" in without.begins_with
    last = str(without.config.run_dir / "checkpoints" / "last.pth.tar")
    again = begin(tiny_config({"training.init_from": last}, cameras=2))
    assert again.begins_with is not None
    assert "action_head.state_encoder.0.weight: (32, 3) now, made anew" in again.begins_with


@pytest.mark.parametrize("adapted", [False, True])
def test_adapters_of_the_policy_are_merged(
    tiny_config: ConfigFactory, rows: list[dict[str, Any]], tmp_path: Path, adapted: bool
) -> None:
    settings = {**LORA, "training.max_steps": 3, "optimizer.lr": 0.05, "training.experiment_name": "adapters"}
    source = train_here(tiny_config(settings, cameras=2)).config.run_dir / "checkpoints" / "last.pth.tar"
    trainer = begin(tiny_config({"training.init_from": str(source), **(LORA if adapted else {})}, cameras=2))
    expected = Policy.from_checkpoint(source)
    if not adapted:
        assert identical(dict(trainer.model.state_dict()), dict(expected.model.state_dict()))
    seen = observation_of(rows[0])
    answers = (each.infer(seen, seed=2)["actions"] for each in (policy_of(trainer, tmp_path), expected))
    assert np.array_equal(*answers)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({f"{HEAD}.embed_dim": 64, f"{HEAD}.num_heads": 4}, ["embed_dim: got 64, expected 32", "num_heads: got 4, expected 2"]),
        (
            {f"{HEAD}.num_layers": 2, f"{HEAD}.mlp_ratio": 2.0},
            ["num_layers: got 2, expected 1", "mlp_ratio: got 2.0, expected 4.0"],
        ),
        ({"data.normalization": "mean_std"}, ["data.normalization: got mean_std, expected min_max", "init_statistics: own"]),
        (
            {
                "data.actions.representation": "chunk_relative",
                "data.actions.dimensions": ["dx"],
                "data.actions.state_dimensions": ["x"],
            },
            ["data.actions: got chunk_relative", "take it back, or set training.init_statistics: own"],
        ),
    ],
)
def test_settings_that_the_weights_do_not_fit_are_refused(
    tiny_config: ConfigFactory, checkpoint: Path, changes: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(VLAError) as caught:
        begin(tiny_config({**changes, "training.init_from": str(checkpoint)}, cameras=2))
    for words in told:
        assert words in str(caught.value)


def test_another_backbone_is_refused_by_its_sizes(tiny_config: ConfigFactory, checkpoint: Path, tmp_path: Path) -> None:
    spec = TinySpec(image_size=32, patch_size=16, vision_layers=1, text_layers=2, width=16, heads=4, vocabulary=400)
    other = write_tiny_paligemma(tmp_path / "other", spec)
    config = tiny_config({"training.init_from": str(checkpoint), "model.vlm_config.model_name_or_path": str(other)}, cameras=2)
    with pytest.raises(VLAError, match=r"model_name_or_path: got .*/other with .*text_config\.hidden_size 16 instead of 32"):
        begin(config)


def test_weights_that_are_missing_are_refused_by_name(tiny_config: ConfigFactory, checkpoint: Path, tmp_path: Path) -> None:
    saved = load_checkpoint(checkpoint)
    name = next(name for name in saved["state_dict"] if name.startswith("paligemma_vlm."))
    for part in (saved["state_dict"], saved["ema"]["average"]):
        part.pop(name, None)
    save_checkpoint(tmp_path / "part.pth.tar", saved)
    with pytest.raises(CheckpointError, match=f"do not fit its own backbone: {name}"):
        begin(tiny_config({"training.init_from": str(tmp_path / "part.pth.tar")}, cameras=2))


def test_statistics_to_keep_have_to_be_of_the_datas_dimensions_and_range(
    tiny_config: ConfigFactory, checkpoint: Path, tmp_path: Path
) -> None:
    kept = {**other_robot(tmp_path), "training.init_from": str(checkpoint), "training.init_statistics": "kept"}
    with pytest.raises(VLAError) as caught:
        begin(tiny_config(kept))
    words = "kept: state: got 2 numbers, expected the policy's 3; action: got 3 numbers, expected the policy's 2; set training"
    assert words in str(caught.value)


def test_statistics_are_the_policys_or_own(
    tiny_config: ConfigFactory, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Data ten times as wide is refused with the policy's."""
    rng = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "data", METADATA) as writer:
        for length in LENGTHS:
            episode = make_episode(rng, length)
            writer.write(replace(episode, action=episode.action * 10))
    path = tmp_path / "stats.json"
    compute_statistics(str(tmp_path / "data"), "test").save(path)
    data = {"data.train_parquet_files": str(tmp_path / "data"), "data.normalization_stats_path": str(path)}
    settings = {**data, "training.init_from": str(checkpoint)}
    with pytest.raises(VLAError) as caught:
        begin(tiny_config(settings))
    assert f"training.init_statistics: kept: {checkpoint} is of other data: {tmp_path}" in str(caught.value)
    assert "column action, dimension 0 (dx): got" in str(caught.value)
    assert "set training.init_statistics: own, with the statistics of this data" in str(caught.value)

    with caplog.at_level(logging.WARNING):
        allowed = begin(tiny_config({**settings, "data.allow_other_statistics": True}))
        seen = {"data.normalization": "mean_std", "data.prompt_max_len": 40, "data.image_resize": "pad"}
        own = begin(tiny_config({**settings, **seen, "training.init_statistics": "own"}))
    assert not caplog.records
    before = load_trained(checkpoint).preprocessor["statistics"]
    assert allowed.preprocessor.statistics.to_dict() == before
    assert own.preprocessor.statistics.to_dict() == compute_statistics(str(tmp_path / "data"), "test").to_dict()
    preprocessor = own.preprocessor
    assert (preprocessor.normalization, preprocessor.prompts.max_len, preprocessor.image.resize) == ("mean_std", 40, "pad")
    assert own.begins_with is not None
    assert "data.image_resize: got pad, expected stretch" in own.begins_with
    assert identical(dict(own.model.state_dict()), dict(allowed.model.state_dict()))


def test_resume_of_such_a_run_reads_no_policy(
    tiny_config: ConfigFactory, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`auto` begins with the policy where nothing was saved; later it goes on without it, also where it is not named again."""
    source = Path(shutil.copy(checkpoint, tmp_path / "policy.pth.tar"))
    config = tiny_config({"training.experiment_name": "new"}, cameras=2)
    given = tmp_path / "given.yaml"
    given.write_text(config.to_yaml(), encoding="utf-8")
    command = ("train", "--config_path", given, "--device", "cpu", "--resume_checkpoint", "auto")
    status, _, log = call(capfd, *command, "--init_from", source, "--set", "training.stop_after_step=2")
    assert (status, f"begins with the weights of {source} (step 10, averaged)" in log) == (0, True)
    assert "statistics: the policy's (training.init_statistics: kept)" in log
    assert load_config(config.run_dir / "config.yaml").training.init_from == str(source)
    source.unlink()
    status, _, log = call(capfd, *command, "--init_from", source, "--set", "training.stop_after_step=3")
    assert (status, f"training.init_from ({source}) is not read" in log) == (0, True)
    assert call(capfd, *command)[0] == 0
    assert load_config(config.run_dir / "config.yaml").training.init_from == str(source)

    whole = train_here(tiny_config({"training.init_from": str(checkpoint), "training.experiment_name": "whole"}, cameras=2))
    ended = load_checkpoint(config.run_dir / "checkpoints" / "last.pth.tar")
    assert identical(ended["state_dict"], dict(whole.model.state_dict()))
    status, _, log = call(
        capfd, "train", "--config_path", given, "--init_from", config.run_dir / "checkpoints" / "last.pth.tar"
    )
    assert (status, "training.experiment_name: got new, the run of this policy, which would be moved aside" in log) == (2, True)


def test_ranks_begin_with_the_same_weights(
    session_config: ConfigFactory, checkpoint: Path, zygote: Zygote, tmp_path: Path
) -> None:
    """Also those that are made anew, in shards."""
    changes = {"training.init_from": str(checkpoint), f"{HEAD}.horizon": 6, "training.max_steps": 1, "data.val_fraction": 0.0}
    config = session_config({**changes, "training.experiment_name": "alone_from"}, cameras=2)
    train_here(config)
    reference = Reference(config, tmp_path, zygote)
    sharded = reference.another("sharded_from", {"training.parallel": "fsdp"})
    reference.train(sharded, 2)
    assert_same_curve(sharded, config)
