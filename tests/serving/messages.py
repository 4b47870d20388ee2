"""Observations as the clients of each protocol write them, and what the policy answers to them here."""

from __future__ import annotations

import numpy as np

from paligemma_vla import Policy

INSTRUCTION = "open the drawer"


def draw(policy: Policy, seed: int = 0) -> dict:
    """An observation by our keys, plausible for the policy."""
    rng = np.random.default_rng(seed)
    pictures = {key: rng.integers(0, 255, (40, 50, 3), np.uint8) for key in policy.metadata["cameras"]}
    state = np.asarray(policy.preprocessor.statistics.state.mean) + rng.normal(0, 0.01, policy.metadata["state_dim"])
    return {**pictures, "state": state, "prompt": INSTRUCTION}


def local(policy: Policy, observation: dict, seed: int) -> np.ndarray:
    return policy.infer(observation, seed=seed)["actions"]
