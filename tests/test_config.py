"""The configuration: what it accepts, and that it says everything that is wrong at once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from paligemma_vla.config import DataSource, VLAConfig, config_from_dict, load_config, parse_assignments, parse_yaml
from paligemma_vla.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
FROZEN = {"model.vlm_config.freeze_vision_tower": True, "model.vlm_config.freeze_language_model": True}
MINIMAL: dict[str, Any] = {
    "data": {"train_parquet_files": "episodes"},
    "model": {"vlm_config": {"model_name_or_path": "google/paligemma-3b-pt-224"}},
}


def faults(overrides: dict[str, Any], raw: dict[str, Any] = MINIMAL) -> list[str]:
    """The faults reported, one per line, after the heading."""
    with pytest.raises(ConfigError) as caught:
        config_from_dict(raw, overrides)
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith(f"config: {len(lines)} fault")
    return [line.strip() for line in lines]


def test_config_minimal_has_the_specifications_values() -> None:
    config = config_from_dict(MINIMAL)
    head = config.model.action_head_config
    assert (head.horizon, head.per_action_dim, head.action_dim, head.num_inference_timesteps) == (8, 7, 56, 50)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.lr_scheduler.type) == (1e-4, 0.01, "cosine")
    assert config.run_dir == Path("experiments/default")


def test_config_reports_every_fault_with_its_path_and_the_nearest_name() -> None:
    found = faults(
        {
            "data.batch_sise": 4,
            "data.num_workers": "two",
            "training.epochs": 0,
            "training.stages": [{"train": "haed", "steps": 3}, {"train": "all", "stepz": 3}],
            "modle": {},
            "optimizer.betas": [0.9],
            "model.action_head_config.horizon": 6,
            "model.action_head_config.action_dim": 56,
        }
    )
    expected = {
        "data.batch_sise": "did you mean 'batch_size'?",
        "data.num_workers": "got 'two'",
        "training.epochs": "got 0, expected: greater than 0",
        "training.stages.0.train": "'head' or 'all'",
        "training.stages.1.stepz": "did you mean 'steps'?",
        "modle": "did you mean 'model'?",
        "optimizer.betas.1": "missing",
        "model.action_head_config.action_dim": "got 56, expected horizon * per_action_dim = 6 * 7 = 42",
    }
    assert {fault.partition(": ")[0] for fault in found} == set(expected)
    for path, text in expected.items():
        assert any(fault.startswith(f"{path}: ") and text in fault for fault in found), (path, found)


def test_config_lists_the_known_names_when_none_is_near() -> None:
    (fault,) = faults({"wandb.zzz": 1})
    assert fault == "wandb.zzz: unknown key; known: enabled, entity, mode, project"
    assert "known: " in faults({"data.actions.rotation": {"representation": "rotvec", "dimensions": [0, 1, 2], "zz": 1}})[0]


def test_config_reports_contradictions_beside_missing_keys() -> None:
    head = {"horizon": 6, "action_dim": 56, "num_heads": 3}
    found = faults({"model.action_head_config": head}, {"data": {}, "model": {"vlm_config": {}}})
    assert [fault.partition(": ")[0] for fault in found] == [
        "data.train_parquet_files",
        "model.vlm_config.model_name_or_path",
        "model.action_head_config.action_dim",
        "model.action_head_config.num_heads",
    ]


def test_config_wrong_type_causes_no_second_made_up_fault() -> None:
    found = faults({"model.action_head_config.horizon": 10.0, "model.action_head_config.action_dim": 70})
    assert [fault.partition(": ")[0] for fault in found] == ["model.action_head_config.horizon"]


def test_config_action_dim_contradiction_says_where_got_expected_and_remedy() -> None:
    assert faults({"model.action_head_config.action_dim": 48}) == [
        "model.action_head_config.action_dim: got 48, expected horizon * per_action_dim = 8 * 7 = 56; delete it, or fix horizon"
    ]


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        ({"model.action_head_config.num_heads": 3}, "model.action_head_config.num_heads"),
        ({"model.vlm_config.num_cameras": 1, "model.vlm_config.use_aux_camera": True}, "model.vlm_config.num_cameras"),
        ({"training.gradient_accumulation_steps": 5}, "training.gradient_accumulation_steps"),
        ({"training.stages": [{"train": "head"}, {"train": "all"}]}, "training.stages.0.steps"),
        ({"training.stages": [{"train": "head", "steps": 4}]}, "training.stages.0.steps"),
        ({**FROZEN, "training.stages": [{"train": "all"}]}, "training.stages"),
        ({**FROZEN, "model.vlm_config.lora": {}}, "model.vlm_config.lora"),
        ({"model.vlm_config.lora": {"target_modules": "("}}, "model.vlm_config.lora.target_modules"),
        ({"training.best_metric": "val/action_mae", "training.val_action_samples": 0}, "training.best_metric"),
        ({"training.checkpoint_dir": "~/runs"}, "training.checkpoint_dir"),
        ({"training.checkpoint_dir": "s3://"}, "training.checkpoint_dir"),
        ({"training.cpu_offload": True}, "training.cpu_offload"),
        ({"training.shard_processes": 2}, "training.shard_processes"),
        ({"training.parallel": "fsdp", "optimizer.type": "adamw_8bit"}, "optimizer.type"),
        ({"training.checkpoint_format": "sharded", "training.checkpoint_dir": "s3://b/x"}, "training.checkpoint_format"),
        ({"data.actions.dimensions": [0]}, "data.actions.dimensions"),
        ({"data.actions.representation": "delta", "data.actions.state_dimensions": [0]}, "data.actions.state_dimensions"),
        ({"data.actions.rotation": {"representation": "rotvec", "dimensions": [0]}}, "data.actions.rotation.dimensions"),
        ({"model.action_head_config.mlp_ratio": 1e-9}, "model.action_head_config.mlp_ratio"),
        ({"model.action_head_config.num_flow_samples": 10**4}, "model.action_head_config.num_flow_samples"),
    ],
)
def test_config_refuses_contradictions(overrides: dict[str, Any], path: str) -> None:
    assert [fault.partition(": ")[0] for fault in faults(overrides)] == [path]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.batch_size", "32"),
        ("data.batch_size", 32.0),
        ("model.vlm_config.use_aux_camera", 1),
        ("training.experiment_name", 5),
        ("training.experiment_name", "a/b"),
        ("optimizer.lr", float("nan")),
        ("data.normalization", "minmax"),
        ("data.train_parquet_files", []),
        ("training", None),
    ],
)
def test_config_converts_nothing_silently(key: str, value: object) -> None:
    assert [fault.partition(": ")[0] for fault in faults({key: value})] == [key]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.batch_size", 2**31),
        ("data.train_parquet_files", ""),
        ("data.train_parquet_files", [{"path": "a", "weight": 1e300}]),
        ("model.action_head_config.embed_dim", 10**6),
        ("model.action_head_config.horizon", 10**30),
        ("optimizer.betas", [0.9, 1.0]),
        ("training.seed", 2**64),
        ("training.experiment_name", ".."),
        ("training.experiment_name", "x" * 300),
        ("training.checkpoint_dir", "\ud800"),
        ("data.actions.dimensions", [-1]),
    ],
)
def test_config_refuses_what_no_run_can_mean(key: str, value: object) -> None:
    (fault,) = faults({key: value})
    assert fault.startswith(key)
    assert len(fault) < 300


def test_config_names_a_key_that_is_no_text() -> None:
    with pytest.raises(ConfigError, match="2 faults"):
        config_from_dict({**MINIMAL, 1: 2, "a\nb": 3})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"'a\\nb': unknown key"):
        config_from_dict({**MINIMAL, "a\nb": 3})


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config_from_dict(MINIMAL).optimizer.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("files", "parsed"),
    [
        ("a.parquet", "a.parquet"),
        (["a", "b/*.parquet"], ("a", "b/*.parquet")),
        ([{"path": "a", "weight": 3}, {"path": "b"}], (DataSource(path="a", weight=3.0), DataSource(path="b", weight=1.0))),
        (["a", {"path": "b", "weight": 0.5}], ("a", DataSource(path="b", weight=0.5))),
    ],
)
def test_config_data_files_take_every_form(files: object, parsed: object) -> None:
    config = config_from_dict(MINIMAL, {"data.train_parquet_files": files, "data.val_parquet_files": files})
    assert config.data.train_parquet_files == parsed
    assert config.data.val_parquet_files == parsed


def test_config_data_files_faults_name_the_entry() -> None:
    found = faults(
        {"data.train_parquet_files": ["a", 1, {"path": "b", "wieght": 2}, {"path": "c", "weight": 0}, {"weight": 1.0}]}
    )
    assert [fault.partition(": ")[0] for fault in found] == [
        "data.train_parquet_files.1",
        "data.train_parquet_files.2.wieght",
        "data.train_parquet_files.3.weight",
        "data.train_parquet_files.4.path",
    ]
    assert "did you mean 'weight'?" in found[1]


@pytest.mark.parametrize(("vlm", "cameras"), [({}, 1), ({"use_aux_camera": True}, 2), ({"num_cameras": 4}, 4)])
def test_config_cameras(vlm: dict[str, Any], cameras: int) -> None:
    overrides = {f"model.vlm_config.{key}": value for key, value in vlm.items()}
    assert config_from_dict(MINIMAL, overrides).model.vlm_config.cameras == cameras


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E+3", 1e3), (".5e1", 5.0), ("-2e0", -2.0), ("1.0", 1.0), ("12", 12), ("e4", "e4")],
)
def test_yaml_reads_scientific_numbers(text: str, value: object) -> None:
    got = parse_yaml(f"x: {text}", "f.yaml")["x"]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "s:\n  a: 1\n  a: 1\n", "l:\n- a: 1\n  a: 2\n"])
def test_yaml_refuses_a_key_given_twice(text: str) -> None:
    with pytest.raises(ConfigError, match=r"f\.yaml: .*'a' is given twice.*line [34]"):
        parse_yaml(text, "f.yaml")


def test_yaml_merge_keys_give_defaults_that_other_keys_replace() -> None:
    text = "base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\n"
    assert parse_yaml(text, "f.yaml")["more"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    "text",
    ["a: [1", "a: !!python/object/apply:os.system [ls]", "\t- a", "a: b: c", "? [1]\n: 2\n", "[" * 10_000, "a: &a [*a]"]
    + [f"a: {value}" for value in ("!!bool x", "!!int ''", "!!timestamp x", "!!binary é", "2024-13-45", "1" * 5000, '"\\0"')],
)
def test_yaml_faults_name_the_file(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^f\.yaml: not valid YAML: ."):
        parse_yaml(text, "f.yaml")


def test_values_too_large_to_show_cost_nothing() -> None:
    aliases = "\n".join(["l0: &l0 [x]", *(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 40))])
    found = faults({"wandb.entity": parse_yaml(aliases, "f.yaml")["l39"], "data.batch_size": 16**5000})
    assert all(len(fault) < 300 for fault in found)


def test_set_assignments_are_yaml() -> None:
    assert parse_assignments(["a.b=1e-3", "c=[x, 2]", "d=", "e.f=null", "g=a=b", "h={p: true}"]) == {
        "a.b": 1e-3,
        "c": ["x", 2],
        "d": None,
        "e.f": None,
        "g": "a=b",
        "h": {"p": True},
    }


@pytest.mark.parametrize("assignment", ["optimizer.lr", "=3", " =3", "a=[1"])
def test_set_refuses_what_is_no_assignment(assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_assignments([assignment])


def test_overrides_are_checked_like_the_file_and_leave_it_alone() -> None:
    raw = copy.deepcopy(MINIMAL)
    config = config_from_dict(raw, {"optimizer.lr": 3e-4, "data.augmentation.enabled": False, "data.batch_size": 3})
    assert (config.optimizer.lr, config.data.augmentation.enabled, config.data.batch_size) == (3e-4, False, 3)
    assert raw == MINIMAL


def test_load_config_reads_a_file_and_its_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    sections = ("data: {train_parquet_files: a}", "model: {vlm_config: {model_name_or_path: m}}", "optimizer: {lr: 2e-4}")
    path.write_text("\n".join(sections), encoding="utf-8")
    assert load_config(path).optimizer.lr == 2e-4
    assert load_config(path, {"optimizer.lr": 1.0}).optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"", "got NoneType"),
        (b"- a", "got list"),
        (b"a" * 2**21, "more than 1 MB"),
    ],
)
def test_load_config_names_a_file_it_cannot_use(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))


ROUND_TRIPS: list[dict[str, Any]] = [
    {},
    {"optimizer.lr": 1e-8, "optimizer.eps": 1.234567890123e-30},
    {"data.train_parquet_files": [{"path": "ä: #x", "weight": 2.5}, "b"], "data.val_parquet_files": "v"},
    {"training.stages": [{"train": "head", "steps": 3}, {"train": "all"}], "training.max_steps": 7},
    {"training.experiment_name": "2024-01-01", "model.vlm_config.revision": "0x1f"},
    {"training.experiment_name": "007", "model.vlm_config.revision": "null"},
    {"training.experiment_name": "1e-4", "model.vlm_config.revision": "12345e7"},
]


@pytest.mark.parametrize("overrides", ROUND_TRIPS)
def test_config_to_yaml_round_trip_is_the_identity(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config = config_from_dict(MINIMAL, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config
    assert set(yaml.safe_load(config.to_yaml())) == set(VLAConfig.model_fields)


def key_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of every key, by walking the section classes."""
    paths = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            paths += key_paths(kind, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load_and_are_the_real_thing(path: Path) -> None:
    vlm = load_config(path).model.vlm_config
    assert path.name == "demo.yaml" or (vlm.model_name_or_path, vlm.dtype) == ("google/paligemma-3b-pt-224", "bfloat16")


def test_vla_config_yaml_shows_every_key() -> None:
    raw = parse_yaml((CONFIGS / "vla_config.yaml").read_text(encoding="utf-8"), "vla_config.yaml")

    def flat(value: Any, prefix: str = "") -> set[str]:
        if not isinstance(value, dict):
            return {prefix.rstrip(".")}
        return set().union(*(flat(child, f"{prefix}{key}.") for key, child in value.items())) if value else set()

    assert sorted(set(key_paths(VLAConfig)) - flat(raw)) == []


def test_json_schema_file_is_the_schema() -> None:
    path = CONFIGS / "vla_config.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == VLAConfig.model_json_schema()
