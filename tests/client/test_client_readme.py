"""The README of the client: its examples run against a real server."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

README = Path(__file__).parents[2] / "packages" / "client" / "README.md"
BLOCKS = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_examples_run_against_a_server(server, policy, capsys):
    horizon, size = policy.metadata["horizon"], policy.metadata["action_dim"]
    moves: list[np.ndarray] = []
    picture = np.zeros((40, 50, 3), np.uint8)
    robot = SimpleNamespace(
        action_names=policy.metadata["action_names"],
        control_hz=policy.metadata["control_hz"],
        camera=lambda: picture,
        wrist_camera=lambda: picture,
        state=lambda: np.zeros(policy.metadata["state_dim"]),
        move=moves.append,
        done=lambda: len(moves) == goal,
    )
    names = {"robot": robot}
    goal = 0
    server.service.contract["action_representation"] = "absolute"  # the episodes of the suite do not say it
    for code in BLOCKS.findall(README.read_text("utf-8")):
        assert "ws://192.168.1.5:8000" in code
        goal = len(moves) + 3
        here = code.replace("ws://192.168.1.5:8000", server.url).replace("execute=8", f"execute={min(2, horizon)}")
        exec(compile(here, str(README), "exec"), names)
    assert [move.shape for move in moves] == [(size,)] * 6
    shown = capsys.readouterr().out
    assert f"({horizon}, {size})" in shown and ": missing (image_1 of the policy" in shown
