"""The model card: a head that the hub reads, the figures that were given, and no Markdown out of other people's names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from paligemma_vla import Policy
from paligemma_vla.cli.demo import CONDITIONS
from paligemma_vla.errors import ConfigError
from paligemma_vla.export.card import Measurement, model_card, read_measurement
from paligemma_vla.hub import is_hub_id
from paligemma_vla.policy import Trained, load_trained
from support import METADATA

HOSTILE = "a|b `c` <script>alert(1)</script>\n# Heading\n---\n[link](http://x) *bold* @all"


@pytest.fixture(scope="module")
def trained(checkpoint: Path) -> Trained:
    return load_trained(checkpoint)


def card_of(trained: Trained, dtype: str = "float32", measurements: Sequence[Measurement] = ()) -> str:
    return model_card(Policy(trained, "test"), dtype, measurements)


def head_and_body(card: str) -> tuple[dict[str, Any], str]:
    """As the hub parts them."""
    before, head, body = card.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(head), body


def cells(card: str, first: str) -> list[str]:
    """The cells of the row that begins with `first`."""
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_card_head_is_what_the_hub_reads(trained: Trained) -> None:
    from huggingface_hub import ModelCard

    assert "base_model" not in head_and_body(card_of(trained))[0], "the tiny backbone is a folder"
    config = json.loads(json.dumps(trained.config))
    config["model"]["vlm_config"]["model_name_or_path"] = "google/paligemma-3b-pt-224"
    card = card_of(replace(trained, config=config))
    expected = {"license": "gemma", "base_model": "google/paligemma-3b-pt-224", "library_name": "paligemma-vla"}
    head, _ = head_and_body(card)
    assert head == {**expected, "pipeline_tag": "robotics", "tags": head["tags"]}
    assert ModelCard(card).data.to_dict() == head
    names = {"google/paligemma2-3b-pt-224": True, "a": False, "a/b/c": False, "../a": False, "/a/b": False, "./b": False}
    assert {name: is_hub_id(name) for name in names} == names


def test_card_says_what_goes_in_and_comes_out(trained: Trained, policy: Policy) -> None:
    card = card_of(trained, "bfloat16")
    assert cells(card, r"image\_1")[1:] == ["camera 'front', RGB, upright", "(H, W, 3) uint8, resized to 32 x 32 (stretch)"]
    unsaid = replace(trained, metadata=replace(METADATA, image_orientation="").to_json())
    assert "RGB, orientation not recorded" in cells(card_of(unsaid), r"image\_1")[1]
    assert "may be left out" in cells(card, r"image\_2")[1]
    low, high = policy.preprocessor.statistics.action.min[0], policy.preprocessor.statistics.action.max[0]
    assert cells(card, "dx")[1] == f"{low:.4g} to {high:.4g}"
    assert cells(card, "actions (out)")[1:] == ["a chunk, real units; 12.5 a second", "(4, 2) float32"]
    assert METADATA.action_convention in card
    assert f"{policy.preprocessor.statistics.action.count:,} of" in card
    for path, digest in zip(policy.preprocessor.statistics.datasets, policy.preprocessor.statistics.digests, strict=True):
        assert f"| {Path(path).name} | {digest} |" in card and path not in card  # whose folders these are is nobody's business
    assert f"{trained.training['best_metric']:.4g}" in card
    assert "weights in bfloat16" in card
    assert cells(card, r"optimizer.weight\_decay")[1:] == ["0.01"]
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert '"image_2": image_2' in code


def test_card_escapes_what_others_wrote(trained: Trained) -> None:
    metadata = replace(METADATA, robot=HOSTILE, cameras=(HOSTILE, "w"), action_names=(HOSTILE, "b"), action_convention=HOSTILE)
    plain = card_of(trained)
    card = card_of(replace(trained, metadata=metadata.to_json()))
    assert head_and_body(card)[0] == head_and_body(plain)[0]

    def shape(text: str) -> list[str]:
        return [line.split(" ")[0] for line in text.splitlines() if line.startswith(("#", "---", "|--"))]

    assert shape(card) == shape(plain)
    for line in set(card.splitlines()) - set(plain.splitlines()):
        assert not re.search(r"(?<!\\)[<\[*@]", line)
    columns = [
        [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")] for text in (card, plain)
    ]
    assert columns[0] == columns[1]


def open_loop(sha: str | None = "ab" * 32) -> dict[str, Any]:
    return {
        "mae": 0.123,
        "mse": 0.0456,
        "velocity_loss": 0.0789,
        "per_dimension": [{"name": "dx", "mae": 0.111, "mse": 0.022}, {"name": "d|y", "mae": 0.135, "mse": 0.0692}],
        "baselines": {"mean_action": {"mae": 0.5, "mse": 0.6}, "zero_action": {"mae": 0.5, "mse": 0.6}},
        "samples": 40,
        "episodes": 7,
        "settings": {"num_steps": 10, "device": "cpu"},
        "data": {"training_files": 0},
        "checkpoint": {"sha256": sha, "weights": "int8"},
    }


def closed_loop(policy: str = "checkpoint") -> dict[str, Any]:
    task = {"successes": 18, "episodes": 20, "rate": 0.9, "ci95": [0.699, 0.972]}
    settings = {"env": "metaworld", "prompts": "own", "resets": "demo", "image": "camera", "policy": policy}
    return {
        "settings": {**settings, "checkpoint_sha256": "cd" * 32, "weights": "full"},
        "tasks": {"drawer-open": task},
        "mean_success": 0.9,
        "episodes": [],
    }


def demonstration() -> dict[str, Any]:
    return {"tasks": closed_loop()["tasks"], **dict.fromkeys((name for name, *_ in CONDITIONS), 0.125), "wall_s": {}}


def read(raw: Any, folder: Path) -> Measurement:
    path = folder / "figures.json"
    path.write_text(json.dumps(raw))
    return read_measurement(path)


def test_card_tells_every_figure_that_was_given(trained: Trained, tmp_path: Path) -> None:
    given = [read(raw, tmp_path) for raw in (open_loop(), closed_loop(), demonstration())]
    assert [measurement.checkpoint for measurement in given] == ["ab" * 32, "cd" * 32, None]
    card = card_of(trained, "float32", given)
    assert cells(card, "all")[1:] == ["0.123", "0.0456"]
    assert "| d\\|y | 0.135 | 0.0692 |" in card
    assert "40 samples of 7 episodes, 10 Euler steps, velocity loss 0.0789; weights int8" in card
    assert "| drawer-open | 18/20 | 0.90 | 0.70 to 0.97 |" in card
    assert "wrong\\_prompt\\_mean\\_success 0.125" in card
    assert "flatter" not in card
    assert read(closed_loop("random"), tmp_path).checkpoint is None
    assert "flatter" in read({**open_loop(), "data": {"training_files": 2}}, tmp_path).note


@pytest.mark.parametrize(
    "raw",
    [{}, [1, 2], {**open_loop(), "mae": "small"}, {**closed_loop(), "tasks": {"x": {}}}, {**demonstration(), "tasks": []}],
)
def test_file_that_holds_no_figures_of_ours_is_refused(raw: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--metrics .*figures\.json"):
        read(raw, tmp_path)
