"""`paligemma-vla plan`: without data, weights or GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from support import call

HEAD = "model.action_head_config"
SMALL = ("--device", "cpu", "--set", f"{HEAD}.embed_dim=64", "--set", f"{HEAD}.num_layers=1")
CONFIG = Path(__file__).parents[2] / "configs" / "vla_config_24gb.yaml"


@pytest.mark.long
def test_plan_of_the_published_model_for_a_card_that_is_not_here(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capfd, "plan", "--config_path", CONFIG, "--memory_gb", "24")
    assert (code, err) == (0, "")
    assert "google/paligemma-3b-pt-224 is not here; planned with its published sizes" in out
    assert "of 24.00 on cuda: fits" in out
    assert "activations of 8 samples at a time, 576 context tokens each:" in out


def test_plan_that_does_not_fit_says_what_to_change(capfd: pytest.CaptureFixture[str], tiny_model_dir: Path) -> None:
    small = (*SMALL, "--model_path_override", tiny_model_dir, "--memory_gb", "0.001", "--nproc", "2")
    code, out, _ = call(capfd, "plan", "--config_path", CONFIG, *small, "--set", "model.vlm_config.lora=null")
    assert code == 1
    assert "of 0.00 on cpu: DOES NOT FIT" in out
    assert "activations of 4 samples at a time" in out
    assert "training.gradient_accumulation_steps: 2" in out


def test_plan_of_a_folder_counts_that_model(capfd: pytest.CaptureFixture[str], tiny_model_dir: Path) -> None:
    code, out, _ = call(capfd, "plan", "--config_path", CONFIG, *SMALL, "--model_path_override", tiny_model_dir)
    assert code == 0
    assert "is not here" not in out
    assert "on cpu: fits" in out


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: gated, missing, without a revision."""

    def do_HEAD(self) -> None:
        name = self.path.split("/resolve/")[0].strip("/")
        status, code = {"google/gated": (403, "GatedRepo"), "google/paligemma": (404, "RevisionNotFound")}.get(
            name, (401, "RepoNotFound")
        )
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


UNAVAILABLE: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("google/gated", None): ("'google/gated' (it is gated)", "licence accepted at https://huggingface.co/google/gated"),
    ("google/nothing", None): ("neither a folder here nor a model on the hub that you may see", "hf auth login"),
    ("google/paligemma", "v9"): ("'google/paligemma'", "no revision 'v9' of it: model.vlm_config.revision"),
    ("no/such/folder", None): ("cannot load 'no/such/folder'", "a local folder must", "--model_path_override FOLDER"),
}


def test_model_that_cannot_be_had_says_what_to_do(hub: str, tmp_path: Path) -> None:
    commands = [
        ["plan", "--config_path", str(CONFIG), "--model_path_override", name, "--set", f"model.vlm_config.revision={revision}"]
        for name, revision in ((name, revision or "null") for name, revision in UNAVAILABLE)
    ]
    code = "import sys; from paligemma_vla.cli.main import main; print([main(argv) for argv in eval(sys.argv[1])])"
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, repr(commands)],  # a process of its own: the hub's library reads these when it is imported
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout == "[2, 2, 2, 2]\n", done.stderr
    assert "Traceback" not in done.stderr
    messages = done.stderr.split("error: ")[1:]
    assert len(messages) == len(UNAVAILABLE)
    for message, words in zip(messages, UNAVAILABLE.values(), strict=True):
        assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--nproc", "4", "--set", "training.parallel=hsdp", "--set", "training.shard_processes=3"],
            "--nproc: got 4, expected a",
        ),
        (["--nproc", "4", "--nproc_per_machine", "3"], "--nproc: got 4, expected a multiple of --nproc_per_machine (3)"),
        (["--nproc", "1024"], "--nproc: got 1024, expected at most data.batch_size (256)"),
        (["--memory_gb", "-1"], "--memory_gb: got -1.0, expected gigabytes"),
        (["--memory_gb", "nan"], "--memory_gb: got nan, expected gigabytes"),
    ],
)
def test_plan_refuses_what_training_would(capfd: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    code, _, told = call(capfd, "plan", "--config_path", "configs/vla_config_ddp.yaml", *flags)
    assert code == 2
    assert words in told
