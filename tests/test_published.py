"""pi0 and pi0.5 as LeRobot writes them: read, answered with, trained on, refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from websockets.sync.client import connect

from conftest import ConfigFactory
from no_waiting import NoWaiting
from observations import local
from paligemma_vla import Policy, published
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.loader import load_batches
from paligemma_vla.data.order import RunSampler
from paligemma_vla.errors import CheckpointError, ConfigError, ModelError
from paligemma_vla.evaluation.envs import make_environment
from paligemma_vla.evaluation.episode import Condition, check_compatible, play
from paligemma_vla.evaluation.open_loop import OpenLoopConfig, evaluate
from paligemma_vla.export.folder import write_export
from paligemma_vla.export.lerobot import write_lerobot
from paligemma_vla.export.programs import export_program
from paligemma_vla.model import architectures, graphs
from paligemma_vla.model.graphs import GraphedModel
from paligemma_vla.model.tiny import train_tokenizer
from paligemma_vla.model.vla_model import arguments_from_batch
from paligemma_vla.policy import Continuation, RealTime, fingerprint, load_trained
from paligemma_vla_client import pack, unpack
from pi0_fixture import FIXTURES
from running_server import RunningServer
from support import ACTION_DIM, STATE_DIM, call, identical, train_here

KINDS = ("pi0", "pi05")
STATISTICS = {"min": -3.0, "max": 3.0, "mean": 0.5, "std": 2.0, "q01": -2.0, "q99": 2.5}


@pytest.fixture(autouse=True)
def tiny_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixtures' config.json names the real sizes; these are its own (sizes.json)."""
    sizes = json.loads((FIXTURES / "pi0" / "sizes.json").read_text())
    names = ("width", "mlp_dim", "depth", "num_heads", "num_kv_heads", "head_dim")
    variants = {"gemma_2b": sizes["paligemma_text"], "gemma_300m": sizes["action_expert"]}
    monkeypatch.setattr(published, "VARIANTS", {key: tuple(each[name] for name in names) for key, each in variants.items()})
    monkeypatch.setattr(published, "VISION", {name: sizes["vision"][name] for name in published.VISION})
    monkeypatch.setattr(architectures, "IMAGE_TOKEN", sizes["vocab_size"])


def write(folder: Path, kind: str, statistics: bool = True) -> Path:
    """A folder as LeRobot 0.6.1 saves it, with a small tokenizer of its own."""
    shutil.copytree(FIXTURES / kind, folder)
    tokenizer = train_tokenizer(400)
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    step: dict[str, Any] = {"registry_name": "normalizer_processor", "config": {"eps": 1e-8}}
    if statistics:
        step["state_file"] = "policy_preprocessor_step_6_normalizer_processor.safetensors"
        names = ("observation.state", "action")
        save_file(
            {f"{name}.{part}": torch.full((7,), value) for name in names for part, value in STATISTICS.items()},
            folder / step["state_file"],
        )
    tokens = {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "google/paligemma-3b-pt-224"}}
    (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": [tokens, step]}))
    return folder


def observation() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = {f"image_{n}": rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for n in (1, 2)}
    return {**images, "state": np.linspace(-1, 1, 7, dtype=np.float32), "prompt": "open the drawer"}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "published", request.param)


def test_a_published_policy_answers(folder: Path) -> None:
    policy = Policy.from_checkpoint(folder)
    assert list(policy.metadata["cameras"]) == ["image_1", "image_2", "image_3"]
    assert list(policy.metadata["camera_names"]) == ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
    actions = policy.infer(observation(), seed=0)["actions"]
    assert actions.shape == (6, 7) and np.isfinite(actions).all()
    moved = {**observation(), "state": np.full(7, 0.9, np.float32)}
    assert np.abs(policy.infer(moved, seed=0)["actions"] - actions).max() > 1e-3  # in the prompt, or a token


@pytest.mark.parametrize("change", ["lost", "added", "reshaped"])
def test_every_tensor_is_accounted_for(folder: Path, change: str) -> None:
    file, name = folder / "model.safetensors", "action_in_proj.weight"
    tensors = load_file(file)
    if change == "lost":
        del tensors[name]
    elif change == "added":
        tensors[name := "fast_head.weight"] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:, :16].contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{name.replace('.', '[.]')}"):
        Policy.from_checkpoint(folder)


def test_a_base_without_statistics_answers_nobody(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", "pi0", statistics=False)
    with pytest.raises(CheckpointError, match=r"got no mean, std of observation.state.*init_statistics: own"):
        Policy.from_checkpoint(folder)


def test_an_export_of_openpi_answers_as_lerobot_does(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["tokenizer_max_length"] = {"pi0": 48, "pi05": 200}[raw["type"]]
    (folder / "config.json").write_text(json.dumps(raw))
    other = tmp_path / "openpi"
    (other / "assets" / "arm").mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(folder / name, other)
    sizes = {"action_dim": 32, "action_horizon": raw["chunk_size"], "precision": "float32"}
    variants = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    (other / "config.json").write_text(json.dumps({**sizes, **variants}))
    stats = {part: [STATISTICS[part]] * 7 for part in ("mean", "std", "q01", "q99")}
    (other / "assets" / "arm" / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": stats, "actions": stats}}))
    monkeypatch.setattr(published, "RESOLUTION", (56, 56))
    answers = [Policy.from_checkpoint(place).infer(observation(), seed=0)["actions"] for place in (folder, other)]
    assert np.array_equal(*answers)
    said = {**sizes, **variants, "use_relative_actions": True, "discrete_state_input": False}
    (other / "config.json").write_text(json.dumps(said))
    policy, moved = Policy.from_checkpoint(other), observation()["state"] + np.float32(0.5)
    first, second = (policy.infer({**observation(), "state": each}, seed=0)["actions"] for each in (moved - 0.5, moved))
    if raw["type"] == "pi05":  # the state is then in no prompt, so only what is added to the actions moves
        np.testing.assert_allclose(second, first + 0.5, atol=1e-5)
    else:
        np.testing.assert_allclose(first, answers[0] + observation()["state"], atol=1e-5)
    assert policy.preprocessor.prompts.text(" open_the drawer\n", moved) == "open the drawer"
    (other / "assets" / "droid").mkdir()
    shutil.copy(other / "assets" / "arm" / "norm_stats.json", other / "assets" / "droid")
    with pytest.raises(CheckpointError, match=r"statistics of assets/arm, assets/droid, expected those of one robot"):
        Policy.from_checkpoint(other)


def test_files_saved_by_lerobot_have_another_prefix(folder: Path) -> None:
    expected = Policy.from_checkpoint(folder).infer(observation(), seed=0)["actions"]
    file = folder / "model.safetensors"
    save_file({f"model.{name}": value for name, value in load_file(file).items()}, file)
    assert np.array_equal(Policy.from_checkpoint(folder).infer(observation(), seed=0)["actions"], expected)


def training(folder: Path, make: ConfigFactory, experiment: str, **changes: Any) -> VLAConfig:
    """A run that begins with the published weights, on two cameras of another robot."""
    raw = published.configuration(json.loads((folder / "config.json").read_text()))
    head = {f"model.action_head_config.{key}": value for key, value in raw["model"]["action_head_config"].items()}
    keys = ("image_resize", "pad_action_dim", "prompt_max_len", "prompt_overflow")
    data = {f"data.{key}": raw["data"][key] for key in keys}
    run = {"training.init_from": str(folder), "training.init_statistics": "own", "training.experiment_name": experiment}
    sizes = {"training.max_steps": 6, "model.action_head_config.num_flow_samples": 1}
    run["model.vlm_config.model_name_or_path"] = raw["model"]["vlm_config"]["model_name_or_path"]  # which is not there
    return make({**head, **data, **run, **sizes, "training.stages": [], **changes}, cameras=2)


def test_training_begins_with_the_published_weights_and_resumes_exactly(folder: Path, tiny_config: ConfigFactory) -> None:
    straight = train_here(training(folder, tiny_config, "straight"))
    assert straight.step == 6
    cut = training(folder, tiny_config, "cut", **{"training.stop_after_step": 3})
    train_here(cut)
    (checkpoint,) = (cut.run_dir / "checkpoints").glob("checkpoint_step_3.pth.tar")
    rest = train_here(training(folder, tiny_config, "cut"), checkpoint)
    assert identical(dict(rest.model.state_dict()), dict(straight.model.state_dict()))
    name = "action_in_proj.weight"
    moved = straight.model.state_dict()[f"action_head.{name}"] - load_file(folder / "model.safetensors")[name]
    assert 0 < moved.abs().max() < 0.1
    policy = Policy.from_checkpoint(cut.run_dir / "checkpoints" / "last.pth.tar")
    answer = policy.infer({**observation(), "state": np.zeros(3, np.float32)}, seed=0)["actions"]
    assert answer.shape == (6, 2) and np.isfinite(answer).all()


def test_an_export_answers_as_the_published_policy(folder: Path, tmp_path: Path) -> None:
    write_export(tmp_path / "export", Policy(load_trained(folder), str(folder)))
    answers = [Policy.from_checkpoint(place).infer(observation(), seed=0)["actions"] for place in (folder, tmp_path / "export")]
    assert np.array_equal(*answers)


@pytest.mark.parametrize("realtime", ["prefix", "guidance"])
def test_a_chunk_continues_the_last_one(folder: Path, tiny_config: ConfigFactory, realtime: RealTime) -> None:
    config = training(folder, tiny_config, "rtc", **{"training.rtc_max_delay": 3, "training.max_steps": 2})
    train_here(config)
    policy = Policy.from_checkpoint(config.run_dir / "checkpoints" / "last.pth.tar")
    asked = {**observation(), "state": np.zeros(3, np.float32)}
    plain = policy.infer(asked, seed=0)["actions"]
    going_on = Continuation(plain[:5] + np.float32(0.3), delay=2)
    continued = policy.infer(asked, seed=0, continuation=going_on, realtime=realtime)["actions"]
    assert np.isfinite(continued).all() and np.abs(continued - plain).max() > 1e-3
    if realtime == "prefix":  # how far guidance leads depends on the velocity, which is random here
        assert np.abs(continued[:2] - going_on.actions[:2]).max() < 1e-5


PARTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "adapters": {"model.vlm_config.lora": {"rank": 2}},
    "adapters in both": {"model.vlm_config.lora": {"rank": 2}, "model.action_head_config.lora": {"rank": 2}},
    "insulated": {"model.action_head_config.detach_context": True},
    "expert only": {"model.vlm_config.freeze_vision_tower": True, "model.vlm_config.freeze_language_model": True},
}


@pytest.mark.parametrize("parts", PARTS)
def test_memory_is_planned_and_what_is_free_learns(folder: Path, tiny_config: ConfigFactory, parts: str) -> None:
    config = training(folder, tiny_config, "plan", **{"training.max_steps": 1, **PARTS[parts]})
    trainer = train_here(config)
    assert trainer.plan.total > 0
    for name, parameter in trainer.model.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.isfinite().all()), name
    learning = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    backbone = {name for name in learning if name.startswith("paligemma_vlm.")}
    assert all("lora_" in name for name in backbone) == (parts != "everything")
    assert bool(backbone) == (parts in ("everything", "adapters", "adapters in both"))
    head = {f"action_head.{name}" for name, _ in trainer.model.action_head.named_parameters()}
    assert learning - backbone == {name for name in head if ".base_layer." not in name}
    assert any("lora_" in name for name in head) == (parts == "adapters in both")


def test_adapters_are_merged_where_a_policy_answers(folder: Path, tiny_config: ConfigFactory, tmp_path: Path) -> None:
    changes = {"training.max_steps": 3, "training.ema_decay": 0.0}
    config = training(folder, tiny_config, "lora", **PARTS["adapters in both"], **changes)
    trainer = train_here(config)
    path = config.run_dir / "checkpoints" / "last.pth.tar"
    policy = Policy.from_checkpoint(path)
    assert not any("lora" in name for name in policy.model.state_dict())
    batch = next(load_batches(trainer.data.train, RunSampler(trainer.data.order, 0, 1, 0, 1, 1), config, pin_memory=False))
    trainer.model.eval()
    with torch.no_grad():
        answers = [model(**arguments_from_batch(batch, sample=True)) for model in (trainer.model, policy.model)]
    assert (answers[0] - answers[1]).abs().max() < 1e-4
    again = train_here(training(folder, tiny_config, "next", **{"training.init_from": str(path), "training.max_steps": 1}))
    assert again.step == 1


def test_an_export_for_lerobot_is_what_it_was_read_from(folder: Path, tmp_path: Path) -> None:
    policy = Policy(load_trained(folder), str(folder))
    output = write_lerobot(tmp_path / "back", policy)
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, output))
    assert after == {key: before[key] for key in after}
    tensors, again = (load_file(place / "model.safetensors") for place in (folder, output))
    assert {name: tuple(value.shape) for name, value in again.items()} == {name: tuple(v.shape) for name, v in tensors.items()}
    assert all(torch.equal(tensors[name], value) for name, value in again.items() if "gemma_expert.lm_head" not in name)
    shutil.copy(folder / "tokenizer.json", output)
    answers = [Policy.from_checkpoint(place).infer(observation(), seed=0)["actions"] for place in (folder, output)]
    assert np.abs(answers[0] - answers[1]).max() < 1e-5


def test_a_policy_trained_here_goes_to_lerobot_and_back(folder: Path, tiny_config: ConfigFactory, tmp_path: Path) -> None:
    """With normalisation of ours, which becomes statistics that lead to the same numbers there."""
    config = training(folder, tiny_config, "mine", **{"training.max_steps": 2})
    train_here(config)
    trained = Policy.from_checkpoint(config.run_dir / "checkpoints" / "last.pth.tar")
    output = write_lerobot(tmp_path / "out", Policy(load_trained(config.run_dir / "checkpoints" / "last.pth.tar"), "run"))
    shutil.copy(folder / "tokenizer.json", output)
    asked = {**observation(), "state": np.array([0.3, -0.2, 0.1], np.float32)}
    answers = [policy.infer(asked, seed=0)["actions"] for policy in (trained, Policy.from_checkpoint(output))]
    assert np.abs(answers[0] - answers[1]).max() < 1e-4


def test_what_lerobot_cannot_compute_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)--format lerobot: .*FlowmatchingActionHead.*an expert of pi0 or pi0.5"):
        write_lerobot(tmp_path / "out", Policy(load_trained(checkpoint), str(checkpoint)))


def test_an_expert_is_exported_as_a_program_with_its_backbone(folder: Path) -> None:
    policy = Policy(load_trained(folder), str(folder))
    head = policy.config.model.action_head_config
    with pytest.raises(ModelError, match=r"take --torch_export model"):
        export_program("sampler", policy.model, policy.preprocessor, head)
    program = export_program("model", policy.model, policy.preprocessor, head).module()
    present = np.array([[True, True]])
    ids, mask = (torch.from_numpy(array) for array in policy.preprocessor.prompts.encode(["open the drawer"], present))
    images = torch.rand(2, 3, 56, 56) * 2 - 1
    noise, state = torch.randn(1, 6, 32), torch.rand(1, 7) if head.use_state_input else None
    with torch.no_grad():
        context = policy.model.paligemma_vlm.fuse(images, ids, mask)
        expected = policy.model.action_head.get_action(context, state, mask, noise, head.num_inference_timesteps)
        assert torch.allclose(program(images, ids, mask, state, noise), expected, atol=1e-5)


def test_a_graph_of_an_expert_answers_equally_and_never_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(run: graphs.Run, inputs: Sequence[torch.Tensor], pool: Any) -> graphs.Replay:
        with NoWaiting():
            answer = run(inputs)
        return lambda: answer

    monkeypatch.setattr(graphs, "capture", watch)
    policy = Policy.from_checkpoint(folder)
    whole = {**observation(), "image_3": observation()["image_2"]}
    # Three cameras are known, and two there; for what lacks a camera beside what has it there is no graph.
    asked = ([observation()], [whole], [observation(), whole])
    expected = [policy.infer_batch(each, [0] * len(each)) for each in asked]
    prompts = policy.preprocessor.prompts
    policy.graphs = GraphedModel(policy.model, 3 * prompts.image_tokens + prompts.max_len, fused=False)
    for each, answers, graphs_now in zip(asked, expected, (1, 2, 2), strict=True):
        assert np.abs(policy.infer_batch(each, [0] * len(each)) - answers).max() < 1e-5
        assert len(policy.graphs.captured) == graphs_now and None not in policy.graphs.captured.values()


def test_policies_of_other_weights_have_other_fingerprints(folder: Path) -> None:
    before = fingerprint(folder)
    file = folder / "model.safetensors"
    save_file({name: value + 0.1 for name, value in load_file(file).items()}, file)
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("pi0", ("min", "max", "mean", "std")),
        ("pi0", ("mean", "std")),
        ("pi05", ("q01", "q99")),
        ("pi05", ("min", "max", "q01", "q99")),
    ],
)
def test_only_statistics_of_the_normalisation_must_be_there(tmp_path: Path, kind: str, known: tuple[str, ...]) -> None:
    folder = write(tmp_path / "published", kind)
    expected = Policy.from_checkpoint(folder).infer(observation(), seed=0)["actions"]
    file = next(folder.glob("*normalizer_processor.safetensors"))
    save_file({name: value for name, value in load_file(file).items() if name.rpartition(".")[2] in known}, file)
    assert np.array_equal(Policy.from_checkpoint(folder).infer(observation(), seed=0)["actions"], expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_period", 10.0), ("image_resolution", [56, 112]), ("action_expert_variant", "gemma_2b_lora")),
        *(("normalization_mapping", {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}), ("chunk_size", None)),
        *(("input_features", None), ("type", [])),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(folder: Path, field: str, value: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    if value is None and field == "chunk_size":
        del raw[field]
    else:
        raw[field] = value
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=field if field != "type" else "model of type"):
        Policy.from_checkpoint(folder)


def test_what_lerobot_would_answer_otherwise_is_not_exported(tmp_path: Path) -> None:
    policy = Policy(load_trained(write(tmp_path / "pi0", "pi0")), "pi0")
    head = policy.config.model.action_head_config.model_copy(update={"use_state_input": False, "noise": "uniform"})
    model = policy.config.model.model_copy(update={"action_head_config": head})
    policy.config = policy.config.model_copy(update={"model": model})
    with pytest.raises(ConfigError, match=r"(?s)use_state_input: got false.*noise: got uniform"):
        write_lerobot(tmp_path / "out", policy)


def test_data_is_checked_with_the_tokenizer_of_the_published_policy(
    folder: Path, tiny_config: ConfigFactory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which is the only one here; and what pi0.5 reads is longer than the instruction."""
    kind, path = json.loads((folder / "config.json").read_text())["type"], tmp_path / "run.yaml"
    printed = {}
    for tokens in (100, 24):
        changes = {"data.prompt_max_len": tokens, "data.prompt_overflow": "error"}
        config = training(folder, tiny_config, "checked", **changes)
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        printed[tokens] = call(capfd, "data", "check", config.data.train_parquet_files, "--config_path", path)
    assert printed[100][0] == 0, printed
    assert printed[24][0] == (kind == "pi05") and ("State: 255 255" in printed[24][1]) == (kind == "pi05"), printed


def test_a_published_policy_is_served_and_recorded_as_any_other(folder: Path, tmp_path: Path) -> None:
    message = {"observation/exterior_image_1_left": "image_1", "observation/wrist_image_left": "image_2"}
    seen = observation()
    sent = {name: seen[key] for name, key in message.items()}
    sent |= {"observation/joint_position": seen["state"][:6], "observation/gripper_position": seen["state"][6:]}
    server = RunningServer(str(folder), preset="droid", seed=0, limited=False, record=tmp_path / "recorded")
    try:
        with connect(server.url) as connection:
            connection.recv()
            connection.send(pack(sent | {"prompt": seen["prompt"]}))
            actions = unpack(connection.recv())["actions"]
            connection.send(
                pack({"endpoint": "reset", "record": {"executed": actions[:1], "actor": "policy", "success": True}})
            )
            connection.recv()
    finally:
        server.close()
    np.testing.assert_array_equal(actions, local(Policy.from_checkpoint(folder), seen, 0))
    (episode,) = [pq.read_table(path).to_pylist() for path in (tmp_path / "recorded").glob("*.parquet")]
    assert len(episode) == 1 and np.array_equal(episode[0]["state"], seen["state"])


def resize(folder: Path, state: int, action: int) -> None:
    """Make it one for another robot."""
    raw = json.loads((folder / "config.json").read_text())
    raw["input_features"]["observation.state"]["shape"], raw["output_features"]["action"]["shape"] = [state], [action]
    (folder / "config.json").write_text(json.dumps(raw))
    file = next(folder.glob("policy_preprocessor_*.safetensors"))
    sizes = {"observation.state": state, "action": action}
    save_file({name: torch.full((sizes[name.rpartition(".")[0]],), float(v[0])) for name, v in load_file(file).items()}, file)


def test_a_published_policy_is_compared_with_episodes_of_fewer_cameras(
    folder: Path, two_camera_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resize(folder, STATE_DIM, ACTION_DIM)
    metrics = evaluate(
        Policy.from_checkpoint(folder), str(two_camera_dir), OpenLoopConfig(max_samples=8, episodes_shown=0)
    ).metrics
    assert np.isfinite(metrics["velocity_loss"]) and metrics["samples"] == 8
    assert "right_wrist_0_rgb is here, in this order, front, wrist" in caplog.text


def test_a_published_policy_plays_in_a_simulator(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    resize(folder, 4, 4)
    policy = Policy.from_checkpoint(folder)
    with closing(make_environment("metaworld")) as env:
        check_compatible(policy.metadata, env.spec)
        assert (
            "what the checkpoint calls base_0_rgb, left_wrist_0_rgb, right_wrist_0_rgb is here, in this order, table"
            in caplog.text
        )
        outcomes = [play(env, policy, "drawer-open", 0, Condition(max_steps=8)) for _ in range(2)]
    assert [outcome.steps for outcome in outcomes] == [8, 8]
    assert np.array_equal(*(outcome.actions for outcome in outcomes))


RELATIVE = {"use_relative_actions": True, "relative_exclude_joints": ["Gripper"]}
JOINTS = [*(f"joint_{n}" for n in range(6)), "left_gripper"]


def test_relative_actions_go_from_the_state_but_for_the_gripper(folder: Path, tmp_path: Path) -> None:
    """LeRobot adds the state, in real units, to what the statistics of relative actions give; and reads it so from us."""
    absolute = Policy.from_checkpoint(folder).infer(observation(), seed=0)["actions"]
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **RELATIVE, "action_feature_names": JOINTS}))
    relative = Policy.from_checkpoint(folder).infer(observation(), seed=0)["actions"]
    np.testing.assert_array_equal(relative[:, 6], absolute[:, 6])
    np.testing.assert_allclose(relative[:, :6] - absolute[:, :6], np.tile(observation()["state"][:6], (6, 1)), atol=1e-6)
    output = write_lerobot(tmp_path / "back", Policy(load_trained(folder), str(folder)))
    written = json.loads((output / "config.json").read_text())
    assert written["use_relative_actions"] and written["relative_exclude_joints"] == written["action_feature_names"][6:]
    steps = [json.loads((output / f"policy_{name}processor.json").read_text())["steps"] for name in ("pre", "post")]
    names = [[step["registry_name"] for step in each] for each in steps]
    assert names[0].index("normalizer_processor") == names[0].index("relative_actions_processor") + 1
    assert names[1].index("absolute_actions_processor") == names[1].index("unnormalizer_processor") + 1
    shutil.copy(folder / "tokenizer.json", output)
    np.testing.assert_allclose(Policy.from_checkpoint(output).infer(observation(), seed=0)["actions"], relative, atol=1e-5)
