"""The exported folder: equal answers, each fact once, and no damage that goes unnoticed."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import ConfigFactory
from paligemma_vla import Policy
from paligemma_vla.errors import CheckpointError
from paligemma_vla.export import folder as module
from paligemma_vla.export.folder import write_export
from paligemma_vla.policy import CONFIG, Trained, fingerprint, load_trained
from paligemma_vla.storage import POINTER, sha256
from support import identical, train_here


@pytest.fixture(scope="module")
def trained(checkpoint: Path) -> Trained:
    return load_trained(checkpoint)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """One of a test's own, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "policy"))


def write(output: Path, trained: Trained, **options: Any) -> Path:
    return write_export(output, Policy(trained, "test"), **options)


def answers(policy: Policy) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    answers = []
    for n, prompt in enumerate(("open the drawer", "push the window shut", "turn the faucet on")):
        pictures = rng.integers(0, 256, (2, 40, 28, 3), dtype=np.uint8)
        given = {"image_1": pictures[0], "state": rng.normal(size=3).astype(np.float32), "prompt": prompt}
        if n and len(policy.metadata["cameras"]) > 1:
            given["image_2"] = pictures[1]
        answers.append(policy.infer(given, seed=n)["actions"])
    return np.stack(answers)


def test_exported_folder_answers_as_the_checkpoint_to_the_last_bit(policy: Policy, exported: Path) -> None:
    again = Policy.from_checkpoint(exported)
    np.testing.assert_array_equal(answers(again), answers(policy))
    assert again.metadata == policy.metadata
    assert again.preprocessor.to_dict() == policy.preprocessor.to_dict()
    assert again.config == policy.config
    assert identical(dict(again.model.state_dict()), dict(policy.model.state_dict()))


def test_export_of_an_export_replaces_it_by_the_same(exported: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier export")
    (tmp_path / ".policy.export.tmp").mkdir()  # what a killed call left
    write(folder, load_trained(exported))
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    before, after = ({path.name: path.read_bytes() for path in place.iterdir()} for place in (exported, folder))
    assert after == before


def test_exported_files_hold_no_pickle_and_each_fact_once(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    files = "config model.safetensors normalization_stats tokenizer tokenizer_config processor_config README.md"
    assert names == {name if "." in name else f"{name}.json" for name in files.split()}
    raw = json.loads((exported / CONFIG).read_text())
    assert raw["preprocessor"].keys() == {"prompts", "image", "normalization"}
    assert "tokenizer_json" not in raw["preprocessor"]["prompts"]
    assert raw["preprocessor"]["image"] == {"resize": "stretch", "resizer": "torch"}
    assert raw["files"] == {name: sha256(exported / name) for name in names - {"config.json", "README.md"}}
    others = "".join(path.read_text() for path in exported.glob("*.json") if path.name != CONFIG)
    assert "model_name_or_path" not in others
    assert all(path.stat().st_mode & 0o044 for path in exported.iterdir())  # as readable as other files


def test_exported_processor_is_that_of_the_backbone(exported: Path, tiny_model_dir: Path, policy: Policy) -> None:
    """transformers reads the folder, and gives the ids and pixels of the backbone's own processor, and ours."""
    from transformers import AutoProcessor, PaliGemmaProcessor

    ours, original = (AutoProcessor.from_pretrained(place) for place in (exported, tiny_model_dir))
    assert isinstance(ours, PaliGemmaProcessor)
    rng = np.random.default_rng(1)
    for number, prompt in enumerate(("open the drawer", "Öffne  die Schublade, 2x!", "push", "abc <loc0001> xyz")):
        picture = Image.fromarray(rng.integers(0, 256, (30 + 9 * number, 50, 3), dtype=np.uint8))
        got, expected = (p(images=picture, text="<image>" + prompt, return_tensors="np") for p in (ours, original))
        assert got.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])
        ids, _ = policy.preprocessor.prompts.encode([prompt], np.ones((1, 1), bool))
        np.testing.assert_array_equal(got["input_ids"], ids)
        spec, vlm = policy.preprocessor.image, policy.model.paligemma_vlm
        for resizer in ("pillow", "torch"):
            pixels = torch.from_numpy(replace(spec, resizer=resizer).apply(np.asarray(picture))).float()
            levels = np.abs(got["pixel_values"][0] * vlm.pixel_std.numpy() + vlm.pixel_mean.numpy() - pixels.numpy())
            assert (levels > (1e-3 if resizer == "pillow" else 1.001)).mean() <= (0 if resizer == "pillow" else 0.03)


def test_exported_shards_are_read_as_one(
    trained: Trained, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", "40KB")
    output = write(tmp_path / "shards", trained)
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 2
    assert (output / "model.safetensors.index.json").is_file()
    assert identical(load_trained(output).state_dict, load_trained(exported).state_dict)
    next(output.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*no such file; fetch or export it again"):
        Policy.from_checkpoint(output)


def test_exported_in_bfloat16_takes_half_and_answers_nearly_the_same(
    trained: Trained, policy: Policy, exported: Path, tmp_path: Path
) -> None:
    output = write(tmp_path / "half", trained, dtype="bfloat16")
    sizes = [(place / "model.safetensors").stat().st_size for place in (output, exported)]
    assert sizes[0] < 0.6 * sizes[1]
    for name, value in load_trained(output).state_dict.items():
        assert torch.equal(value, policy.model.state_dict()[name].bfloat16())
    again = Policy.from_checkpoint(output)
    assert {value.dtype for value in again.model.state_dict().values()} == {torch.float32}
    difference = np.abs(answers(again) - answers(policy)).max()
    assert 0 < difference < 0.02 * np.abs(answers(policy)).max()


def test_fingerprint_tells_exports_apart(exported: Path, folder: Path, checkpoint: Path) -> None:
    assert fingerprint(folder) == fingerprint(exported) == sha256(exported / CONFIG)
    assert fingerprint(checkpoint) == sha256(checkpoint)
    (folder / CONFIG).write_text((folder / CONFIG).read_text() + " ")
    assert fingerprint(folder) != fingerprint(exported)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    change(raw)
    (folder / CONFIG).write_text(json.dumps(raw))


def without_a_weight(path: Path) -> None:
    weights = load_file(path)
    weights.pop("action_head.velocity.weight")
    save_file(weights, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(format=99), "got format 99, expected 1"),
        (lambda raw: raw["preprocessor"].pop("prompts"), "does not describe a policy"),
        (lambda raw: raw["configuration"]["data"].update(state_dimm=3), "state_dimm: unknown key"),
        (lambda raw: raw["configuration"]["data"].update(state_dim=5), "do not fit: size mismatch"),
        (lambda raw: raw["metadata"].update(control_hz="fast"), "control_hz: got"),
        (("model.safetensors", Path.unlink), "model.safetensors: no such file"),
        (("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])), "does not describe a policy"),
        (("model.safetensors", without_a_weight), "action_head.velocity.weight"),
        (("tokenizer.json", lambda path: path.write_text("{}")), "does not describe a policy"),
        (("normalization_stats.json", lambda path: path.write_text("{}")), "state: got"),
    ],
)
def test_damaged_folder_is_a_checkpoint_error(folder: Path, change: Any, message: str) -> None:
    """config.json edited, or another file: then its sha256 tells, or the content once the sha256 was corrected."""
    if callable(change):
        edit(folder, change)
    else:
        name, damage = change
        damage(folder / name)
        with pytest.raises(CheckpointError, match=f"{name}: (damaged or edited|no such file)"):
            Policy.from_checkpoint(folder)
        if (folder / name).exists():
            edit(folder, lambda raw: raw["files"].update({name: sha256(folder / name)}))
    with pytest.raises(CheckpointError) as caught:
        Policy.from_checkpoint(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("name", [CONFIG, "model.safetensors", "tokenizer.json", "normalization_stats.json"])
def test_pointer_of_git_lfs_in_a_folder_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{folder / name}: .*a pointer of git-lfs.*`git lfs pull`"):
        Policy.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("run", r"config\.json: no such file.*checkpoints/\*\.pth\.tar"),
        ("runs/last.pth.tar", "no such checkpoint"),
        ("nothing", "no such checkpoint"),
        ("org/name@v1", r"org/name@v1: no such file or folder here, (.|\n)*hf auth login(.|\n)*without a network"),
    ],
)
def test_location_where_nothing_is_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match=message):
        Policy.from_checkpoint(location)


def test_policy_on_the_hub_is_read_from_its_snapshot(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    """The hub's cache, as a download leaves it, without a network."""
    import huggingface_hub
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    stored = cache / "models--org--arm"
    (stored / "refs").mkdir(parents=True)
    (stored / "snapshots").mkdir()
    for branch in ("main", "v1"):
        (stored / "refs" / branch).write_text(commit)
    shutil.move(folder, stored / "snapshots" / commit)
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    for place in ("org/arm", "org/arm@v1"):
        np.testing.assert_array_equal(answers(Policy.from_checkpoint(place)), answers(policy))
    with pytest.raises(CheckpointError, match="org/arm@v2"):
        Policy.from_checkpoint("org/arm@v2")


@pytest.mark.parametrize(("name", "content"), [("notes.txt", ""), (CONFIG, '{"model_type": "paligemma"}')])
def test_export_does_not_replace_what_it_did_not_write(trained: Trained, folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    before = {path: path.read_bytes() for path in folder.parent.rglob("*.*")}
    with pytest.raises(CheckpointError, match=r"which no export wrote|got a model of type 'paligemma'"):
        write(folder, trained)
    assert {path: path.read_bytes() for path in folder.parent.rglob("*.*")} == before


@pytest.mark.parametrize("before", ["nothing", "an export", "an export that was set aside"])
def test_export_that_fails_leaves_what_was_there(trained: Trained, folder: Path, tmp_path: Path, before: str) -> None:
    """A kill between the two renames leaves the earlier export set aside; the next call brings it back, even if it fails."""
    if before == "nothing":
        shutil.rmtree(folder)
    elif before == "an export that was set aside":
        folder.rename(folder.with_name(".policy.export.old"))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # files may grow as little as a full disk lets them
    try:
        with pytest.raises(CheckpointError, match=r"policy: cannot be written \("):
            write(folder, trained, dtype="bfloat16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ([] if before == "nothing" else ["policy"])
    if before != "nothing":
        assert json.loads((folder / CONFIG).read_text())["dtype"] == "float32"


@pytest.mark.parametrize("kind", ["adapted", "bfloat16"])
def test_export_answers_as_the_checkpoint_of_a_run_with(session_config: ConfigFactory, tmp_path: Path, kind: str) -> None:
    """Adapters are merged into the weights; weights that are held in bfloat16 in training are float32 in the checkpoint."""
    changes = {
        "adapted": {"model.vlm_config.lora": {"rank": 2, "alpha": 8.0}, "optimizer.vlm_lr": 0.03},
        "bfloat16": {"model.vlm_config.dtype": "bfloat16"},
    }
    config = session_config({**changes[kind], "training.experiment_name": kind, "training.max_steps": 3}, cameras=2)
    train_here(config)
    checkpoint = config.run_dir / "checkpoints" / "last.pth.tar"
    trained = load_trained(checkpoint)
    folder = write(tmp_path / "policy", trained)
    again, policy = Policy.from_checkpoint(folder), Policy.from_checkpoint(checkpoint)
    np.testing.assert_array_equal(answers(again), answers(policy))
    assert again.config == policy.config and again.config.model.vlm_config.lora is None
    if kind == "bfloat16":
        assert identical(load_trained(folder).state_dict, trained.state_dict), "nothing is rounded"
    else:
        assert any(".lora_" in name for name in trained.state_dict)
        assert not any("lora_" in name for name in load_trained(folder).state_dict)
