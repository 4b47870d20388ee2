"""The configuration: what it accepts, and that it says everything that is wrong at once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from paligemma_vla.config import DataSource, VLAConfig, config_from_dict, load_config, parse_assignments, parse_yaml
from paligemma_vla.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
VLM, HEAD, ACTIONS = "model.vlm_config", "model.action_head_config", "data.actions"
FROZEN = {f"{VLM}.freeze_vision_tower": True, f"{VLM}.freeze_language_model": True}
MINIMAL: dict[str, Any] = {
    "data": {"train_parquet_files": "episodes"},
    "model": {"vlm_config": {"model_name_or_path": "google/paligemma-3b-pt-224"}},
}


def faults(overrides: dict[str, Any], raw: dict[str, Any] = MINIMAL) -> dict[str, str]:
    """The faults reported: message by key."""
    with pytest.raises(ConfigError) as caught:
        config_from_dict(raw, overrides)
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith(f"config: {len(lines)} fault")
    assert all(len(line) < 300 for line in lines)
    found = dict(line.strip().split(": ", 1) for line in lines)
    assert len(found) == len(lines)
    return found


def test_config_minimal_has_the_specifications_values() -> None:
    config = config_from_dict(MINIMAL)
    head = config.model.action_head_config
    assert (head.horizon, head.per_action_dim, head.action_dim, head.num_inference_timesteps) == (8, 7, 56, 50)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.lr_scheduler.type) == (1e-4, 0.01, "cosine")
    assert config_from_dict(MINIMAL, {f"{HEAD}.action_dim": None}) == config
    assert config.run_dir == Path("experiments/default")
    for key, value, cameras in (("lora", None, 1), ("use_aux_camera", True, 2), ("num_cameras", 4, 4)):
        assert config_from_dict(MINIMAL, {f"{VLM}.{key}": value}).model.vlm_config.cameras == cameras
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0  # type: ignore[misc]


def test_config_reports_every_fault_with_its_path_and_the_nearest_name() -> None:
    expected = {
        "data.batch_sise": (4, "did you mean 'batch_size'?"),
        "data.num_workers": ("two", "got 'two'"),
        "training.epochs": (0, "got 0, expected: greater than 0"),
        "modle": ({}, "did you mean 'model'?"),
        "wandb.zzz": (1, "known: enabled, entity, mode, project"),
        "data.actions.rotation": ({"representation": "rotvec", "dimensions": [0, 1, 2], "zz": 1}, None),
        "data.actions.rotation.zz": (None, "known: dimensions, representation"),
        "optimizer.betas": ([0.9], None),
        "optimizer.betas.1": (None, "missing"),
        "training.stages": ([{"train": "haed", "steps": 3}, {"train": "all", "stepz": 3}], None),
        "training.stages.0.train": (None, "'head' or 'all'"),
        "training.stages.1.stepz": (None, "did you mean 'steps'?"),
        "data.train_parquet_files": (["a", 1, {"path": "b", "wieght": 2}, {"path": "c", "weight": 0}, {"weight": 1.0}], None),
        "data.train_parquet_files.1": (None, "got 1"),
        "data.train_parquet_files.2.wieght": (None, "did you mean 'weight'?"),
        "data.train_parquet_files.3.weight": (None, "got 0"),
        "data.train_parquet_files.4.path": (None, "missing"),
        f"{HEAD}.horizon": (6, None),
        f"{HEAD}.num_heads": (3, "got 3"),
        f"{HEAD}.action_dim": (56, "got 56, expected horizon * per_action_dim = 6 * 7 = 42; delete it, or fix horizon"),
    }
    found = faults({key: value for key, (value, _) in expected.items() if value is not None})
    assert set(found) == {key for key, (_, message) in expected.items() if message is not None}
    for key, (_, message) in expected.items():
        assert message is None or message in found[key]
    found = faults({HEAD: {"horizon": 6, "action_dim": 56}}, {"data": {}, "model": {"vlm_config": {}}})
    assert set(found) == {"data.train_parquet_files", f"{VLM}.model_name_or_path", f"{HEAD}.action_dim"}


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        # contradictions between keys
        (f"{HEAD}.num_heads", {f"{HEAD}.num_heads": 3}),
        (f"{VLM}.num_cameras", {f"{VLM}.num_cameras": 1, f"{VLM}.use_aux_camera": True}),
        (f"{VLM}.lora", {**FROZEN, f"{VLM}.lora": {}}),
        (f"{VLM}.lora.target_modules", {f"{VLM}.lora": {"target_modules": "("}}),
        ("training.gradient_accumulation_steps", {"training.gradient_accumulation_steps": 5}),
        ("training.stages.0.steps", {"training.stages": [{"train": "head"}, {"train": "all"}]}),
        ("training.stages.0.steps", {"training.stages": [{"train": "head", "steps": 4}]}),
        ("training.stages", {**FROZEN, "training.stages": [{"train": "all"}]}),
        ("training.best_metric", {"training.best_metric": "val/action_mae", "training.val_action_samples": 0}),
        ("training.checkpoint_dir", {"training.checkpoint_dir": "~/runs"}),
        ("training.checkpoint_dir", {"training.checkpoint_dir": "s3://"}),
        ("training.cpu_offload", {"training.cpu_offload": True}),
        ("training.shard_processes", {"training.shard_processes": 2}),
        ("training.checkpoint_format", {"training.checkpoint_format": "sharded", "training.checkpoint_dir": "s3://b/x"}),
        ("optimizer.type", {"training.parallel": "fsdp", "optimizer.type": "adamw_8bit"}),
        (f"{ACTIONS}.dimensions", {f"{ACTIONS}.dimensions": [0]}),
        (f"{ACTIONS}.state_dimensions", {f"{ACTIONS}.representation": "delta", f"{ACTIONS}.state_dimensions": [0]}),
        (f"{ACTIONS}.rotation.dimensions", {f"{ACTIONS}.rotation": {"representation": "rotvec", "dimensions": [0]}}),
        # nothing is converted silently; a wrong type causes no second fault
        *((f"{HEAD}.horizon", {f"{HEAD}.horizon": 10.0, **dim}) for dim in ({}, {f"{HEAD}.action_dim": 70})),
        *((key, {key: value}) for key, value in [("data.batch_size", "32"), (f"{VLM}.use_aux_camera", 1), ("training", None)]),
        # values that no run can have
        ("data.batch_size", {"data.batch_size": 2**31}),
        ("data.train_parquet_files", {"data.train_parquet_files": []}),
        ("data.train_parquet_files.0.weight", {"data.train_parquet_files": [{"path": "a", "weight": 1e300}]}),
        ("optimizer.lr", {"optimizer.lr": float("nan")}),
        ("optimizer.betas.1", {"optimizer.betas": [0.9, 1.0]}),
        *(("training.experiment_name", {"training.experiment_name": name}) for name in ("a/b", "..", "x" * 300, "\ud800")),
        (f"{ACTIONS}.dimensions.0", {f"{ACTIONS}.dimensions": [-1]}),
        ("data.exclude_episodes", {"data.exclude_episodes": "a\0b"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config_refuses(key: str, overrides: dict[str, Any]) -> None:
    assert set(faults(overrides)) == {key}


@pytest.mark.parametrize(
    ("files", "parsed"),
    [
        ("a.parquet", "a.parquet"),
        (["a", "b/*.parquet"], ("a", "b/*.parquet")),
        (
            ["a", {"path": "b", "weight": 3}, {"path": "c"}],
            ("a", DataSource(path="b", weight=3.0), DataSource(path="c", weight=1.0)),
        ),
    ],
)
def test_config_data_files_take_every_form(files: object, parsed: object) -> None:
    config = config_from_dict(MINIMAL, {"data.train_parquet_files": files, "data.val_parquet_files": files})
    assert config.data.train_parquet_files == config.data.val_parquet_files == parsed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-4", 1e-4), ("1E+3", 1e3), (".5e1", 5.0), ("-2e0", -2.0), ("1.0", 1.0), ("12", 12), ("e4", "e4")),
        ("{<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
    ],
)
def test_yaml_reads_scientific_numbers_and_merge_keys(text: str, value: object) -> None:
    got = parse_yaml(f"x: {text}", "f.yaml")["x"]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "s:\n  a: 1\n  a: 1\n", "l:\n- a: 1\n  a: 2\n"])
def test_yaml_refuses_a_key_given_twice(text: str) -> None:
    with pytest.raises(ConfigError, match=r"f\.yaml: .*'a' is given twice.*line [34]"):
        parse_yaml(text, "f.yaml")


@pytest.mark.parametrize("text", ["[1", "!!python/name:os.system", "b: c", "[" * 9999, "&a [*a]", "!!bool x", "1" * 5000])
def test_yaml_faults_name_the_file(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^f\.yaml: not valid YAML: ."):
        parse_yaml(f"a: {text}", "f.yaml")


def test_set_assignments_are_yaml() -> None:
    expected = {"a.b": 1e-3, "c": ["x", 2], "d": None, "e.f": None, "g": "a=b", "h": {"p": True}}
    assert parse_assignments(["a.b=1e-3", "c=[x, 2]", "d=", "e.f=null", "g=a=b", "h={p: true}"]) == expected
    for assignment in ("optimizer.lr", "=3", " =3", "a=[1"):
        with pytest.raises(ConfigError, match="--set"):
            parse_assignments([assignment])


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"", b"- a"])
def test_load_config_names_a_file_it_cannot_use(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{path}: "):
        load_config(path)


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer.lr": 1e-8, "optimizer.eps": 1.234567890123e-30, "data.augmentation.enabled": False},
        {"data.train_parquet_files": [{"path": "ä: #x", "weight": 2.5}, "b"], "data.val_parquet_files": "v"},
        {"training.stages": [{"train": "head", "steps": 3}, {"train": "all"}], "training.max_steps": 7},
        {"training.experiment_name": "2024-01-01", f"{VLM}.revision": "0x1f"},
        {"training.experiment_name": "007", f"{VLM}.revision": "null"},
        {"training.experiment_name": "1e-4", f"{VLM}.revision": "12345e7"},
    ],
)
def test_config_to_yaml_round_trip_is_the_identity(tmp_path: Path, overrides: dict[str, Any]) -> None:
    raw = copy.deepcopy(MINIMAL)
    config = config_from_dict(raw, overrides)
    assert raw == MINIMAL  # overrides leave it alone
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config != load_config(tmp_path / "config.yaml", {"optimizer.lr": 1.0})
    assert set(yaml.safe_load(config.to_yaml())) == set(VLAConfig.model_fields)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load_and_are_the_real_thing(path: Path) -> None:
    vlm = load_config(path).model.vlm_config
    assert path.name in ("demo.yaml", "libero.yaml", "mt50.yaml") or (vlm.model_name_or_path, vlm.dtype) == (
        "google/paligemma-3b-pt-224",
        "bfloat16",
    )


def test_vla_config_yaml_shows_every_key_and_the_schema_is_current() -> None:
    def keys(value: Any, prefix: str = "") -> set[str]:
        if not isinstance(value, dict) or not value:
            return {prefix}
        return set().union(*(keys(child, f"{prefix}.{key}") for key, child in value.items()))

    shown = keys(parse_yaml((CONFIGS / "vla_config.yaml").read_text("utf-8"), "vla_config.yaml"))
    assert keys(config_from_dict(MINIMAL).model_dump(mode="json")) <= {key.removesuffix(".") for key in shown}
    assert json.loads((CONFIGS / "vla_config.schema.json").read_text("utf-8")) == VLAConfig.model_json_schema()
