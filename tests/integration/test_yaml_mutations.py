"""Damaged configurations: each is used, or refused with one message and exit status 2; never a traceback."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paligemma_vla.cli.main import main
from paligemma_vla.config import config_from_dict, load_config
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.errors import ConfigError
from support import config_dict, write_episodes
from zygote import Zygote

SNIPPETS = (
    *("\t", "- ", "[", "{", "&a ", "*a", "<<: *a\n", "---\n", '"', "|", "%", "\0", "é", "\r", "0x", "!!int ", "!x "),
    *("!!bool x", "!!binary é", "!!python/name:os.system ", "2024-13-45", "1" * 5000, "[" * 5000, "&a [*a]", "\ufeff"),
)  # fmt: skip
PATHS = ("", ".", "..", "/nonexistent/x", "/etc/passwd", "/dev/null", "x" * 5000, "~", "*", "[", "os:system", "torch.nn:Linear")
TEXT = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(PATHS) | st.binary(max_size=3)
FURTHER = st.sampled_from([0, 1, -1, 10**6, 2**31, 2**63, 10**30, 1e300, datetime.date(2024, 1, 2), "a\0b", "\ud800"])
VALUES = SCALARS | FURTHER | st.lists(SCALARS, max_size=3) | st.dictionaries(SCALARS, SCALARS, max_size=2)


def mutate_tree(draw: Any, text: str) -> bytes:
    """Change, lose, add or rename a key, or several, at any depth."""
    tree = yaml.safe_load(text)
    for _ in range(draw(st.integers(1, 3))):
        section = tree
        while (key := draw(st.sampled_from(sorted(section, key=str)))) and isinstance(section[key], dict) and section[key]:
            if draw(st.integers(0, 4)) == 0:
                break
            section = section[key]
        kind = draw(st.sampled_from(["change", "change", "lose", "add", "rename"]))
        if kind in ("lose", "rename") and len(section) > 1:
            value = section.pop(key)
            if kind == "rename":
                section[f"{key}{draw(TEXT)}"] = value
        else:
            section[draw(TEXT | st.integers() | st.none()) if kind == "add" else key] = draw(VALUES)
    return str(yaml.dump(tree, sort_keys=False)).encode("utf-8", "surrogatepass")


def mutate_text(draw: Any, text: str) -> bytes:
    """Replace a part of the text, or a line, by a snippet or by itself twice; or change the encoding."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.sampled_from([start, start + 1, start + 20, text.find("\n", start) + 1, len(text)]))
        text = text[:start] + draw(st.sampled_from([*SNIPPETS, "", text[start:stop] * 2]) | TEXT) + text[stop:]
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig"])), "surrogatepass")


def write_mutated(draw: Any) -> None:
    mutate = draw(st.sampled_from([mutate_text, mutate_tree]))
    Path("mutated.yaml").write_bytes(mutate(draw, Path("sound.yaml").read_text("utf-8")))


@pytest.fixture(scope="module")
def workplace(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with a few short episodes, their statistics and sound.yaml: a run of three steps."""
    folder = tmp_path_factory.mktemp("workplace")
    write_episodes(folder / "data", lengths=(6, 2, 9, 4, 1), per_file=5)
    compute_statistics(str(folder / "data"), "test").save(folder / "statistics.json")
    raw = config_dict(tiny_model_dir, folder / "data", folder / "statistics.json", Path("experiments"))
    raw["data"]["batch_size"] = 6
    raw["wandb"] = {"mode": "offline"}
    raw["data"]["actions"] = {"representation": "delta", "dimensions": [0], "state_dimensions": [1]}
    raw["training"]["stages"] = [{"train": "head", "steps": 1}, {"train": "all"}]
    (folder / "sound.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    with contextlib.chdir(folder):
        yield folder


def check(status: int, printed: str) -> None:
    """What a user must not meet."""
    assert status in (0, 2), printed
    assert "Traceback" not in printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == (status == 2), printed
    assert len(printed) < 10_000


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_yaml_is_used_or_refused(workplace: Path, data: st.DataObject) -> None:
    write_mutated(data.draw)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        status = main(["stats", "--config_path", "mutated.yaml", "--output_path", "mutated.json"])
    check(status, printed.getvalue())
    try:
        config = load_config("mutated.yaml")
    except ConfigError:
        assert status == 2
    else:
        assert config_from_dict(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_training_from_mutated_yaml_runs_or_is_refused(workplace: Path, zygote: Zygote, data: st.DataObject) -> None:
    write_mutated(data.draw)
    command = ["train", "--config_path", "mutated.yaml", "--device", "cpu", "--set", "training.max_steps=3"]
    result = zygote.run(command, Path(os.getcwd()), timeout=60)
    assert not result.hung
    check(result.status, result.stderr)


def test_sound_yaml_trains(workplace: Path, zygote: Zygote) -> None:
    assert main(["stats", "--config_path", "sound.yaml", "--output_path", "statistics.json"]) == 0
    result = zygote.run(
        ["train", "--config_path", "sound.yaml", "--device", "cpu", "--set", "training.max_steps=3"], workplace, 60
    )
    assert result.status == 0, result.stderr
