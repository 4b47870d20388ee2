"""`paligemma-vla plan`: without data, weights or GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import errors

from support import call

HEAD = "model.action_head_config"
CONFIG = Path(__file__).parents[2] / "configs" / "vla_config_24gb.yaml"
PLAN = ("plan", "--config_path", CONFIG)
SMALL = (*PLAN, "--device", "cpu", "--set", f"{HEAD}.embed_dim=64", "--set", f"{HEAD}.num_layers=1", "--model_path_override")


@pytest.mark.long
def test_plan_of_the_published_model_for_a_card_that_is_not_here(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capfd, *PLAN, "--memory_gb", "24")
    assert (code, err) == (0, "")
    assert "google/paligemma-3b-pt-224 is not here; planned with its published sizes" in out
    assert "of 24.00 on cuda: fits" in out
    assert "activations of 8 samples at a time, 576 context tokens each:" in out


def test_plan_of_a_folder_fits_or_says_what_to_change(capfd: pytest.CaptureFixture[str], tiny_model_dir: Path) -> None:
    code, out, _ = call(capfd, *SMALL, tiny_model_dir)
    assert (code, "on cpu: fits" in out, "is not here" in out) == (0, True, False)
    code, out, _ = call(capfd, *SMALL, tiny_model_dir, "--memory_gb", "0.001", "--nproc", "2")
    assert (code, "of 0.00 on cpu: DOES NOT FIT" in out, "activations of 4 samples at a time" in out) == (1, True, True)
    assert "training.gradient_accumulation_steps: 2" in out


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError, "it is gated"),
        (errors.RepositoryNotFoundError, "neither a folder here nor a model on the hub that you may see"),
        (errors.RevisionNotFoundError, "no revision 'v9' of it: model.vlm_config.revision"),
        (errors.LocalEntryNotFoundError, "--model_path_override FOLDER"),
    ],
)
def test_model_that_cannot_be_had_says_what_to_do(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: type[Exception], words: str
) -> None:
    def download(*_: object, **__: object) -> None:
        raise error.__new__(error)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    code, _, err = call(capfd, *PLAN, "--model_path_override", "google/mine", "--set", "model.vlm_config.revision=v9")
    assert (code, "Traceback" in err, words in err, "cannot load 'google/mine'" in err) == (2, False, True, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--nproc 4 --set training.parallel=hsdp --set training.shard_processes=3",
            "shard_processes: got 3, expected a divisor",
        ),
        ("--nproc 4 --nproc_per_machine 3", "--nproc: got 4, expected a multiple of --nproc_per_machine (3)"),
        ("--nproc 1024", "data.batch_size: got 256, expected at least processes * gradient_accumulation_steps = 1024"),
        ("--memory_gb nan", "--memory_gb: got nan, expected gigabytes"),
    ],
)
def test_plan_refuses_what_training_would(capfd: pytest.CaptureFixture[str], flags: str, words: str) -> None:
    code, _, err = call(capfd, "plan", "--config_path", "configs/vla_config_ddp.yaml", *flags.split())
    assert (code, words in err) == (2, True)
