"""`paligemma-vla export`, and the commands that take what it wrote."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from paligemma_vla import Policy
from paligemma_vla.evaluation.rollout import load_checkpoint
from paligemma_vla.export import folder
from paligemma_vla.policy import fingerprint
from support import call


def evaluated(capfd: pytest.CaptureFixture[str], place: Path, data: Path, output: Path, *flags: str) -> dict[str, Any]:
    paths = ("--checkpoint_path", place, "--eval_data_path", data, "--output_dir", output)
    code, _, err = call(capfd, "evaluate", *paths, "--max_samples", "12", "--device", "cpu", *flags)
    assert code == 0, err
    assert "torchao" not in err
    return dict(json.loads((output / "metrics.json").read_text()))


def test_export_then_evaluate_gives_the_checkpoints_figures(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, exported: Path, two_camera_dir: Path, tmp_path: Path
) -> None:
    before, after = (evaluated(capfd, place, two_camera_dir, tmp_path / place.name) for place in (checkpoint, exported))
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == ["metrics.json", "report.html"]
    page = (tmp_path / "policy" / "report.html").read_text()
    assert "Open loop" in page and "Data" in page
    assert "<h2>Training</h2>" in (tmp_path / checkpoint.name / "report.html").read_text()
    for name in ("mae", "mse", "velocity_loss", "per_dimension", "baselines"):
        assert after[name] == before[name]
    facts = after["checkpoint"]
    assert facts["sha256"] == fingerprint(exported) != before["checkpoint"]["sha256"]
    assert facts["weights"] == "full"
    for name in ("step", "epoch", "averaged_weights", "weights_mb", "parameters", "experiment"):
        assert facts[name] == before["checkpoint"][name]


def test_evaluate_with_quantised_weights_says_so(
    capfd: pytest.CaptureFixture[str], exported: Path, two_camera_dir: Path, tmp_path: Path
) -> None:
    assert evaluated(capfd, exported, two_camera_dir, tmp_path, "--weights", "int8")["checkpoint"]["weights"] == "int8"
    assert load_checkpoint(str(exported), "int8").metadata["weights"] == "int8"  # the loader of rollout's workers


def test_figures_of_the_checkpoint_reach_the_card_and_those_of_another_do_not(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, exported: Path, two_camera_dir: Path, tmp_path: Path
) -> None:
    metrics = evaluated(capfd, checkpoint, two_camera_dir, tmp_path)
    flags = ("--checkpoint_path", checkpoint, "--output_dir", tmp_path / "card", "--metrics", tmp_path / "metrics.json")
    code, out, err = call(capfd, "export", *flags)
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'card'}: ")
    card = (tmp_path / "card" / "README.md").read_text()
    assert f"| all | {metrics['mae']:.4g} | {metrics['mse']:.4g} |" in card
    assert "the figures flatter" in card  # it was trained on these episodes
    code, _, err = call(capfd, "export", "--checkpoint_path", exported, *flags[2:])
    assert code == 2 and "measured with another checkpoint" in err
    assert (tmp_path / "card" / "README.md").read_text() == card


def test_export_adds_a_program_on_request_and_goes_where_a_link_leads(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(folder, "save_program", lambda folder, kind, *rest: made.append(kind))
    (tmp_path / "link").symlink_to("large_disk")
    flags = ("--checkpoint_path", checkpoint, "--output_dir", tmp_path / "link", "--torch_export", "--dtype", "bfloat16")
    code, _, err = call(capfd, "export", *flags)
    assert code == 0, err
    assert made == ["sampler"]
    assert json.loads((tmp_path / "large_disk" / "config.json").read_text())["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large_disk", "link"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--checkpoint_path missing.pth.tar --output_dir {tmp}/o", "missing.pth.tar: no such checkpoint"),
        ("--checkpoint_path {checkpoint} --output_dir {tmp}", "holds notes.txt, which no export wrote"),
        ("--checkpoint_path {checkpoint} --output_dir {tmp}/notes.txt", "notes.txt: a file is there"),
        ("--checkpoint_path {checkpoint} --output_dir /proc/nothing", "/proc/nothing: cannot be written"),
        ("--checkpoint_path {checkpoint} --output_dir {tmp}/o --metrics {tmp}/notes.txt", "notes.txt: cannot be read"),
        ("--checkpoint_path {checkpoint} --output_dir {tmp}/o --private", "means something with --push_to_hub"),
        ("--checkpoint_path {checkpoint} --output_dir {tmp}/o --push_to_hub 'a b/c'", "expected org/name"),
        ("--checkpoint_path {checkpoint} --output_dir {tmp}/o --push_to_hub org/arm", "hf auth login"),
    ],
)
def test_export_that_cannot_be_is_one_message(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, arguments: str, message: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    words = [word.format(tmp=tmp_path, checkpoint=checkpoint) for word in shlex.split(arguments)]
    code, out, err = call(capfd, "export", *words)
    assert code == 2 and message in err and err.count("error:") == 1
    assert "Traceback" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


class Hub:
    """What is asked of huggingface_hub's client, written down. error: what the upload raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.error = error

    def __call__(self) -> Hub:
        return self

    def whoami(self) -> None: ...

    def create_repo(self, name: str, **rest: Any) -> str:
        self.asked.append((name, rest))
        return f"https://huggingface.co/{name}"

    def upload_folder(self, **rest: Any) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append((rest["repo_id"], sorted(path.name for path in rest["folder_path"].iterdir())))


def pushed(capfd: pytest.CaptureFixture[str], hub: Hub, checkpoint: Path, output: Path, *flags: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi", hub)
        arguments = ("--checkpoint_path", checkpoint, "--output_dir", output, "--push_to_hub", "org/arm")
        return call(capfd, "export", *arguments, *flags)


def test_push_puts_the_whole_folder_on_the_hub(capfd: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    hub = Hub()
    code, out, err = pushed(capfd, hub, checkpoint, tmp_path / "out", "--private")
    assert code == 0, err
    assert out.endswith("https://huggingface.co/org/arm\n")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert hub.asked == [("org/arm", {"private": True, "exist_ok": True}), ("org/arm", files)]


def test_push_that_fails_leaves_the_folder_whole_and_says_how_to_go_on(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    hub = Hub(ConnectionError("the network went away"))
    code, _, err = pushed(capfd, hub, checkpoint, tmp_path / "out")
    assert code == 2 and "the network went away" in err
    assert f"`hf upload org/arm {tmp_path / 'out'}` goes on" in err
    assert Policy.from_checkpoint(tmp_path / "out").metadata["action_dim"] == 2
