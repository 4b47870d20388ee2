"""The field's own clients against a running server: unmodified, in an environment of their own.

It has the clients without their dependencies, and finds NumPy, msgpack and websockets in the suite's: openpi-client asks for a
NumPy of years ago, which it does not need, and vla-eval for what draws videos.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from observations import draw, local

STOCK = Path(__file__).with_name("stock")
# Each with what neither the suite nor another of them has.
PACKAGES = ("openpi-client==0.1.2", "dm-tree>=0.1.8", "vla-eval==0.8.0", "lazyregistry>=0.4")

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run_stock(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run_stock(script, *arguments)` runs a file of `stock/`, and returns what it wrote."""
    folder = tmp_path_factory.mktemp("stock") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--retries", "1"]
    installed = subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", *PACKAGES], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"the stock clients cannot be installed here: {installed.stderr.strip()[-300:]}")
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(script: str, *arguments: str | Path) -> str:
        command = [str(python), str(STOCK / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=plain, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


def test_openpi_client_gets_the_local_action_and_a_fault_by_name(serve, policy, run_stock, tmp_path):
    drawn = draw(policy)
    sent = {"observation/image": drawn["image_1"], "observation/wrist_image": drawn["image_2"]}
    np.savez(tmp_path / "in.npz", **sent, **{"observation/state": drawn["state"], "prompt": drawn["prompt"]})
    said = run_stock("openpi_robot.py", serve(seed=5, limited=False).url, tmp_path / "in.npz", tmp_path / "out.npz")
    assert "observation/front: missing (image_1 of the policy, or observation/image" in said
    with np.load(tmp_path / "out.npz") as got:
        assert got["metadata_cameras"].tolist() == policy.metadata["cameras"]
        expected = local(policy, drawn, 5)
        np.testing.assert_array_equal(got["actions"], expected)
        np.testing.assert_array_equal(got["played"], expected)


def test_vla_eval_plays_a_benchmark_with_the_local_actions(serve, policy, run_stock, tmp_path):
    out = tmp_path / "out.npz"
    said = run_stock("vla_eval_benchmark.py", serve(seed=5, limited=False).url + "/vla-eval", out)
    (result,) = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert (result["mean_success"], result["server_info"]["model_server"]) == (1.0, "paligemma-vla")
    assert len(result["server_info"]["contract"]["fingerprint"]) == 64
    assert "Spec mismatch" not in said
    with np.load(out) as file:
        played = dict(file)
    for episode in range(4):
        for step in range(5):
            begin = f"{episode}/{step - step % 2}"  # half of the horizon of 4 is played
            images = {"image_1": played[f"{begin}/agentview"], "image_2": played[f"{begin}/wrist"]}
            seen = {**images, "state": played[f"{begin}/state"], "prompt": str(played[f"{begin}/prompt"])}
            np.testing.assert_array_equal(played[f"{episode}/{step}/action"], local(policy, seen, 5)[step % 2])
