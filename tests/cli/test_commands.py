"""What every command owes a user: help, one message for what is wrong, exit status 2, and no traceback."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ConfigFactory
from paligemma_vla.cli import main as cli
from paligemma_vla.cli import train
from paligemma_vla.config import VLAConfig
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import DataError
from support import LENGTHS, METADATA, call, make_episode, read_rows

FLAGS_OF_COMMANDS = """
benchmark: config_path set workers tasks demonstrations episodes long data_dir seed
demo: config_path tasks demonstrations episodes control_episodes data_dir seed workers install_seconds set
stats: config_path output_path train_data_override set
plan: config_path device memory_gb nproc nproc_per_machine model_path_override set
train: config_path epochs batch_size lr experiment_name train_data_override val_data_override model_path_override
    resume_checkpoint force use_wandb wandb_project_name wandb_entity device set nproc max_restarts
consolidate: checkpoint_path output_path
evaluate: checkpoint_path weights eval_data_path output_dir save_predictions device max_samples batch_size num_steps seed
collect: env tasks episodes output_dir control action_repeat noise_scale within seed workers image_size
export: checkpoint_path output_dir dtype metrics torch_export push_to_hub private
replay: env data tasks episodes output_dir column tolerance workers
rollout: checkpoint_path weights env tasks episodes output_dir seed prompts resets num_steps execute image policy workers
    image_size max_videos record
serve: checkpoint_path device host port zmq_port api_key_env max_clients max_batch batch_wait_ms keys preset execute seed
    action_repeat set no_limits record certfile keyfile
data info: json
data check: json exclusion_list config_path allow_prompt_changes
data convert: from to input output_dir cameras episodes workers image_format jpeg_quality lerobot_version images codec crf
    fps
tiny: output_dir image_size patch_size width vision_layers text_layers seed
"""
FLAGS = dict(line.split(": ") for line in FLAGS_OF_COMMANDS.replace("\n    ", " ").strip().splitlines())


@pytest.fixture
def config_file(tiny_config, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(tiny_config().to_yaml(), encoding="utf-8")
    return path


def test_package_exports_what_it_names() -> None:
    import paligemma_vla

    for name in paligemma_vla.__all__:
        assert getattr(paligemma_vla, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Polciy'"):
        _ = paligemma_vla.Polciy
    assert all(paligemma_vla.versions().values())


def test_text_that_the_terminal_lacks_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "数据", METADATA) as writer:
        writer.write(replace(make_episode(rng, 3), prompt="打开抽屉 é"))
    out, err = (io.TextIOWrapper(io.BytesIO(), "ascii", "surrogateescape") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert cli.main(["data", "info", str(tmp_path / "数据")]) == 0
    assert cli.main(["data", "info", str(tmp_path / "没有")]) == 2
    for stream, text in ((out, r"1  \u6253\u5f00\u62bd\u5c49 \xe9"), (err, r"\u6ca1\u6709: ")):
        stream.flush()
        assert text in stream.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize("command", FLAGS)
def test_help_of_every_command_names_its_flags(capfd: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = call(capfd, *command.split(), "--help")
    assert code == 0
    assert out.startswith(f"usage: paligemma-vla {command}")
    assert not {f"--{flag}" for flag in FLAGS[command].split()} - set(re.findall(r"--\w+", out))


def test_help_lists_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "--help")
    installed = subprocess.run([Path(sys.executable).with_name("paligemma-vla"), "--help"], capture_output=True, check=True)
    assert installed.stdout.decode() == out
    assert code == 0
    assert {name.split()[0] for name in FLAGS} == set(cli.COMMANDS)
    assert all(name in out for name in cli.COMMANDS)
    assert "--debug" in call(capfd, "train", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --config_path missing.yaml", "missing.yaml"),
        ("train --config_path {config} --set data.batch_sise=3", "data.batch_sise: "),
        ("train --config_path {config} --epochs 0", "training.epochs: got 0"),
        ("train --config_path {config} --train_data_override missing/", "data.train_parquet_files: missing/"),
        ("train --config_path {config} --model_path_override missing", "model_name_or_path: "),
        ("train --config_path {config} --set data.normalization_stats_path=no.json", "no.json: "),
        ("train --config_path {config} --resume_checkpoint {junk}", "junk.pth.tar"),
        ("train --config_path {config} --nproc 0", "--nproc: got 0"),
        ("train --config_path {config} --device mps", "--device mps: "),
        ("train --config_path {config} --set data.state_dim=9", "data.state_dim: got 9"),
        ("train --config_path {junk}", "junk.pth.tar"),
        ("train --config_path {config} --epochs two", "invalid int value: 'two'"),
        ("stats --config_path {config} --output_path {tmp}/s.json --train_data_override nothing*", "nothing*"),
        ("stats --config_path {config} --output_path {tmp}", "{tmp}"),
        ("data info {junk}", "junk.pth.tar"),
        ("tiny --output_dir {tmp}/t --image_size 30 --patch_size 16", "--image_size 30 --patch_size 16"),
        ("train --config_path {config} --set training.checkpoint_dir={junk}", "junk.pth.tar"),
        ("collect --tasks drawer-open --episodes -1 --output_dir {tmp}/c", "got -1"),
        ("rollout --tasks drawer-open --episodes 1 --policy random --output_dir {junk}", "junk.pth.tar"),
        ("demo", "configs/demo.yaml"),
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
    assert (code, "Traceback" in err, "ConfigError" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (DataError("a.parquet: row 3"), 2, "error: a.parquet: row 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "full", "a/b"), 2, "error: a/b: full; check this path, its rights and the space on its disk"),
        (OSError(errno.ENOSPC, "full"), 2, "error: full; free some in /dev/shm (docker run --shm-size=8g)"),
        (OSError(errno.EMFILE, "too many", "a"), 2, "error: a: too many; raise the limit (`ulimit -n` shows it"),
        (OSError(errno.ESTALE, "reason"), 2, "error: reason; check this path"),
        (UnicodeEncodeError("ascii", "数", 0, 1, "reason"), 2, "error: this locale has no name for a file"),
        (MemoryError(), 2, "error: out of memory; lower data.batch_size"),
        (ZeroDivisionError("oops"), 1, "internal error: ZeroDivisionError: oops"),
        (DataError("a\x1b[31m\0b\n  é 🤖\ud800"), 2, "error: a\\x1b[31m\\x00b\n  é 🤖\\ud800\n"),  # no control characters
    ],
)
def test_error_becomes_a_status_and_a_message(
    capfd: pytest.CaptureFixture[str], raised: BaseException, code: int, message: str
) -> None:
    assert guarded(raised) == code
    err = capfd.readouterr().err
    assert err.startswith(message)
    assert "Traceback" not in err


def test_message_is_no_longer_than_a_screen(capfd: pytest.CaptureFixture[str]) -> None:
    guarded(DataError("\n  ".join(["x" * 100_000] * 1000)))
    lines = capfd.readouterr().err.splitlines()
    assert (len(lines), max(map(len, lines)), lines[-1]) == (41, 503, "  ... and 960 more")


def guarded(raised: BaseException) -> int:
    def run(args: argparse.Namespace) -> int:
        raise raised

    return cli.guarded(run, argparse.Namespace(debug=False))


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
    flags = (
        "--epochs 7 --batch_size 12 --lr 3e-4 --experiment_name e --train_data_override t --val_data_override v "
        "--model_path_override m --use_wandb --wandb_project_name p --wandb_entity w"
    )
    config = resolved(config_file, *flags.split())
    assert (config.training.epochs, config.data.batch_size, config.optimizer.lr) == (7, 12, 3e-4)
    assert (config.training.experiment_name, config.data.train_parquet_files, config.data.val_parquet_files) == ("e", "t", "v")
    assert config.model.vlm_config.model_name_or_path == "m"
    assert (config.wandb.enabled, config.wandb.project, config.wandb.entity) == (True, "p", "w")
    assert resolved(config_file, "--lr", "1.0", "--set", "optimizer.lr=2.0").optimizer.lr == 2.0  # --set wins
    assert resolved(config_file).optimizer.lr == 1e-3


@pytest.mark.parametrize("folder", ["", "exp", "exp/demo", "exp/demo/checkpoints", "other"])
def test_resumed_run_goes_on_in_the_folder_of_its_checkpoint(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / "exp" / "demo" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / folder)
    given = os.path.relpath(tmp_path / "exp" / "demo" / "checkpoints" / "last.pth.tar")
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
    with path.open("r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * column.total_compressed_size)
    assert call(capfd, "data", "info", path)[0] == 0


def test_tiny_command_writes_a_backbone_that_loads(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, tiny_config: ConfigFactory
) -> None:
    from paligemma_vla.model.tiny import TinySpec, write_tiny_paligemma
    from paligemma_vla.preprocess import load_prompt_and_image_spec

    sizes = ["--image_size", "32", "--patch_size", "8", "--width", "16", "--vision_layers", "1", "--text_layers", "1"]
    code, _, err = call(capfd, "tiny", "--output_dir", tmp_path / "a", *sizes, "--seed", "1")
    assert code == 0, err
    spec = TinySpec(image_size=32, patch_size=8, width=16, vision_layers=1, text_layers=1, seed=1)
    weights = [folder / "model.safetensors" for folder in (tmp_path / "a", write_tiny_paligemma(tmp_path / "b", spec))]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    prompts, image = load_prompt_and_image_spec(tiny_config(), str(tmp_path / "a"))
    assert (image.size, prompts.image_tokens) == (32, 16)
