"""What every command owes a user: help, one message for what is wrong, exit status 2, and no traceback."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_vla.cli import main as cli
from paligemma_vla.cli import train
from paligemma_vla.config import VLAConfig
from paligemma_vla.errors import DataError
from support import LENGTHS, call, read_rows

COMMANDS = [name for name in cli.COMMANDS if find_spec(f"paligemma_vla.cli.{name}") is not None]


@pytest.fixture
def config_file(tiny_config, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(tiny_config().to_yaml(), encoding="utf-8")
    return path


def test_import_is_light() -> None:
    code = (
        "import sys, paligemma_vla\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'pydantic', 'PIL', 'mujoco', 'metaworld'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(paligemma_vla.__all__) <= set(paligemma_vla._EXPORTS)\n"
        "import paligemma_vla.cli.main, paligemma_vla.cli.train, paligemma_vla.config\n"  # --help and a wrong flag are quick
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_package_exports_what_it_names() -> None:
    import paligemma_vla

    for name in paligemma_vla.__all__:
        assert getattr(paligemma_vla, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Polciy'"):
        _ = paligemma_vla.Polciy
    assert all(paligemma_vla.versions().values())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(capfd: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = call(capfd, command, "--help")
    assert code == 0
    assert out.startswith(f"usage: paligemma-vla {command}")
    assert "--debug" in out


def test_help_lists_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "--help")
    assert code == 0
    for name, text in cli.COMMANDS.items():
        assert name in out
        assert text.split()[0] in out


def test_help_of_train_names_the_specifications_flags(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capfd, "train", "--help")
    flags = (
        "--config_path --epochs --batch_size --lr --experiment_name --train_data_override --val_data_override "
        "--model_path_override --resume_checkpoint --use_wandb --wandb_project_name --wandb_entity --device --set --nproc"
    )
    for flag in flags.split():
        assert flag in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --config_path missing.yaml", "run from the project's folder, or name it with --config_path"),
        ("train --config_path {config} --set data.batch_sise=3", "data.batch_sise: unknown key; did you mean 'batch_size'?"),
        ("train --config_path {config} --set nonsense", "--set nonsense: expected dotted.key=value"),
        ("train --config_path {config} --epochs 0", "training.epochs: got 0, expected: greater than 0"),
        ("train --config_path {config} --train_data_override missing/", "data.train_parquet_files: missing/: no Parquet file"),
        ("train --config_path {config} --val_data_override missing/", "data.val_parquet_files: missing/: no Parquet file"),
        ("train --config_path {config} --model_path_override missing", "model_name_or_path: cannot load 'missing'"),
        ("train --config_path {config} --set data.normalization_stats_path=no.json", "no.json: no such statistics file"),
        ("train --config_path {config} --resume_checkpoint no.pth.tar", "no.pth.tar: no such"),
        ("train --config_path {config} --resume_checkpoint {junk}", "junk.pth.tar"),
        ("train --config_path {config} --nproc 0", "--nproc: got 0, expected at least 1"),
        ("train --config_path {config} --device mps", "--device mps: not available here"),
        ("train --config_path {config} --set data.state_dim=9", "data.state_dim: got 9, expected 3"),
        ("train --config_path {config} --experiment_name a/b", "training.experiment_name: got 'a/b'"),
        ("train --config_path {junk}", "junk.pth.tar"),
        ("train", "--config_path"),
        ("train --config_path {config} --epochs two", "invalid int value: 'two'"),
        ("train --config_path {config} --no_such_flag", "--no_such_flag"),
        ("stats --config_path {config} --output_path {tmp}/s.json --train_data_override nothing*", "no Parquet file there"),
        ("stats --config_path {config} --output_path {tmp}/s.json --train_data_override {junk}", "cannot be read as Parquet"),
        ("stats --config_path {config} --output_path {tmp}", "{tmp}"),
        ("data info missing.parquet", "missing.parquet: no Parquet file there"),
        ("data info {junk}", "cannot be read as Parquet"),
        ("data", "ACTION"),
        ("tiny --output_dir {tmp}/t --image_size 30 --patch_size 16", "--image_size 30 --patch_size 16"),
        ("train --config_path {config} --set optimizer.lr=.inf", "optimizer.lr: got inf, expected: a finite number"),
        ("train --config_path {config} --set training.checkpoint_dir={junk}", "a folder is expected there"),
        ("collect --tasks drawer-open --episodes -1 --output_dir {tmp}/c", "got -1, expected a whole number of at least 1"),
        ("collect --tasks drawer-open --episodes 1 --output_dir {junk}", "junk.pth.tar: File exists"),
        (
            "rollout --tasks drawer-open --episodes 1 --seed -1 --output_dir {tmp}/r",
            "got -1, expected a whole number of at least 0",
        ),
        ("rollout --tasks drawer-open --episodes 1 --policy random --output_dir {junk}", "junk.pth.tar: File exists"),
        ("demo --demonstrations 0", "got 0, expected a whole number of at least 1"),
        ("demo", "configs/demo.yaml: cannot read the configuration"),
        ("nonsense", "nonsense"),
        ("", "COMMAND"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    capfd: pytest.CaptureFixture[str], config_file: Path, tmp_path: Path, arguments: str, message: str, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.pth.tar").write_bytes(b"junk \xff\xfe" * 10)
    names = {"config": config_file, "junk": tmp_path / "junk.pth.tar", "tmp": tmp_path}
    code, out, err = call(capfd, *arguments.format(**names).split())
    assert code == 2, err
    assert message.format(**names) in err
    assert "Traceback" not in out + err
    assert err.count("error:") == 1


def test_debug_shows_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capfd, "train", "--config_path", "missing.yaml", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "ConfigError" in err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (DataError("a.parquet: row 3"), 2, "error: a.parquet: row 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left on device", "a/b"), 2, "error: a/b: No space left on device; free some space, or"),
        (ZeroDivisionError("oops"), 1, "internal error: ZeroDivisionError: oops"),
    ],
)
def test_guarded_turns_errors_into_status_and_message(
    capfd: pytest.CaptureFixture[str], raised: BaseException, code: int, message: str
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise raised

    assert cli.guarded(run, argparse.Namespace(debug=False)) == code
    err = capfd.readouterr().err
    assert err.startswith(message)
    assert "Traceback" not in err


def test_terminated_command_says_so_and_closes_what_is_open(capfd: pytest.CaptureFixture[str]) -> None:
    closed = []

    def run(args: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            closed.append(True)
        return 0

    assert cli.guarded(run, argparse.Namespace(debug=False)) == 143
    assert closed
    assert capfd.readouterr().err == "terminated\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def resolved(config_file: Path, *flags: str) -> VLAConfig:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return train.resolve_config(parser.parse_args(["--config_path", str(config_file), *flags]))


def test_every_flag_of_train_reaches_its_key(config_file: Path) -> None:
    config = resolved(
        config_file,
        *[
            "--epochs",
            "7",
            "--batch_size",
            "12",
            "--lr",
            "3e-4",
            "--experiment_name",
            "e",
            "--train_data_override",
            "t",
            "--val_data_override",
            "v",
        ],
        *["--model_path_override", "m", "--use_wandb", "--wandb_project_name", "p", "--wandb_entity", "w"],
    )
    assert (config.training.epochs, config.data.batch_size, config.optimizer.lr) == (7, 12, 3e-4)
    assert (config.training.experiment_name, config.data.train_parquet_files, config.data.val_parquet_files) == ("e", "t", "v")
    assert config.model.vlm_config.model_name_or_path == "m"
    assert (config.wandb.enabled, config.wandb.project, config.wandb.entity) == (True, "p", "w")


def test_set_wins_over_flags_and_file(config_file: Path) -> None:
    assert resolved(config_file, "--lr", "1.0", "--set", "optimizer.lr=2.0").optimizer.lr == 2.0
    assert resolved(config_file).optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("folder", "given"),
    [
        ("", "exp/demo/checkpoints/last.pth.tar"),
        ("exp", "demo/checkpoints/last.pth.tar"),
        ("exp/demo", "checkpoints/last.pth.tar"),
        ("exp/demo/checkpoints", "last.pth.tar"),
        ("other", "../exp/demo/checkpoints/last.pth.tar"),
    ],
)
def test_resumed_run_goes_on_in_the_folder_of_its_checkpoint(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, given: str
) -> None:
    (tmp_path / "exp" / "demo" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / folder)
    assert resolved(config_file, "--resume_checkpoint", given).run_dir.resolve() == tmp_path / "exp" / "demo"
    named = resolved(config_file, "--resume_checkpoint", given, "--experiment_name", "fork")
    assert named.training.experiment_name == "fork"
    assert resolved(config_file).training.experiment_name == "run"  # no checkpoint named, wherever one stands
    assert resolved(config_file, "--resume_checkpoint", "auto").training.experiment_name == "run"


def test_data_info_counts_what_is_there(capfd: pytest.CaptureFixture[str], two_camera_dir: Path) -> None:
    code, out, _ = call(capfd, "data", "info", two_camera_dir, "--json")
    assert code == 0
    facts: dict[str, Any] = json.loads(out)
    rows = read_rows(two_camera_dir)
    assert (facts["files"], facts["episodes"], facts["steps"]) == (3, len(LENGTHS), len(rows))
    expected = {"min": min(LENGTHS), "median": float(np.median(LENGTHS)), "max": max(LENGTHS)}
    assert facts["episode_length"] == expected
    assert (facts["cameras"], facts["state_dim"], facts["action_dim"]) == (2, 3, 2)
    assert facts["camera_names"] == ["front", "wrist"]
    assert facts["instructions"] == dict(Counter(row["prompt"] for row in rows if row["is_first"]))
    size = sum(len(row[name] or b"") for row in rows for name in ("image_1_bytes", "image_2_bytes"))
    assert facts["megabytes"] == pytest.approx(size / 1e6, rel=0.1, abs=0.06)
    code, out, _ = call(capfd, "data", "info", two_camera_dir)
    assert code == 0
    for text in ("episodes", "toy arm", "dx, dy", "open the drawer"):
        assert text in out


def test_data_info_does_not_read_images(capfd: pytest.CaptureFixture[str], episode_dir: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = Path(shutil.copy(sorted(episode_dir.glob("*.parquet"))[0], tmp_path))
    column = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = (
        b"\xff" * column.total_compressed_size
    )
    path.write_bytes(content)
    assert call(capfd, "data", "info", path)[0] == 0


def test_stats_command_is_the_script(
    capfd: pytest.CaptureFixture[str], config_file: Path, tmp_path: Path, episode_dir: Path
) -> None:
    code, _, err = call(capfd, "stats", "--config_path", config_file, "--output_path", tmp_path / "s.json")
    assert code == 0, err
    assert json.loads((tmp_path / "s.json").read_text())["action"]["count"] == len(read_rows(episode_dir))


def test_tiny_command_writes_a_backbone_that_loads_and_is_reproducible(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from paligemma_vla.preprocess import load_prompt_and_image_spec

    sizes = ["--image_size", "32", "--patch_size", "8", "--width", "16", "--vision_layers", "1", "--text_layers", "1"]
    folders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        code, _, err = call(capfd, "tiny", "--output_dir", tmp_path / name, *sizes, "--seed", seed)
        assert code == 0, err
        folders.append(load_file(tmp_path / name / "model.safetensors"))
    first, again, other = folders
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)
    prompts, image = load_prompt_and_image_spec(str(tmp_path / "a"), None, 64, "error", "stretch")
    assert (image.size, prompts.image_tokens) == (32, 16)
