"""From a checkpoint to a service: loaded once, warmed up, with its contract, key maps and limits."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from paligemma_vla import versions
from paligemma_vla.config import EXPERTS, FLOW_HEAD, VLAConfig, config_from_dict, parse_assignments
from paligemma_vla.control.limits import build_limits
from paligemma_vla.errors import ConfigError
from paligemma_vla.policy import Continuation, Policy, RealTime, fingerprint
from paligemma_vla.schema import PROMPT, STATE, chunk_coverage
from paligemma_vla.serving.keys import KeyMap, build_key_maps
from paligemma_vla.serving.protocols import groot, openpi, vla_eval
from paligemma_vla.serving.service import PolicyService

log = logging.getLogger(__name__)
WIRES = (openpi.NAMES, vla_eval.NAMES, groot.NAMES)
CHANGEABLE = ("control.", "data.actions.rotation")  # the latter says only where rotations are


def build_service(  # noqa: PLR0913 - the command's arguments
    checkpoint_path: str,
    device: str,
    *,
    keys: Sequence[str],
    preset: str | None,
    seed: int | None,
    limited: bool,
    assignments: Sequence[str] = (),
    record: Path | None = None,
    graphs: int = 0,
) -> PolicyService:
    """Load the policy, warm it up, and say what it expects. Arguments as those of `paligemma-vla serve`.

    assignments: of `--set`. graphs: most observations at once that CUDA graphs answer; 0: none.
    Raises `CheckpointError` for a checkpoint that cannot be loaded, `ConfigError` for keys and limits that do not fit.
    """
    policy = Policy.from_checkpoint(checkpoint_path, device=device, compile=graphs > 0)
    cameras = policy.metadata["cameras"]
    own_names = dict(zip_longest(cameras, policy.metadata["camera_names"][: len(cameras)], fillvalue=""))
    key_maps = build_key_maps(WIRES, own_names, keys, preset)
    groot.action_parts(key_maps[groot.NAMES.protocol], policy.metadata["action_dim"])
    greeting = None
    if preset == openpi.ROBOARENA:
        greeting = openpi.roboarena_configuration(key_maps[openpi.NAMES.protocol], policy.metadata["action_convention"])
    began = time.monotonic()
    warm_up(policy, graphs, set(cameras) - key_maps[openpi.NAMES.protocol].sources.keys())
    coverage = chunk_coverage(policy.metadata["horizon"], policy.metadata["control_hz"])
    log.info("warmed up in %.2f s%s", time.monotonic() - began, f"; {coverage}" if coverage else "")
    contract = {
        **policy.metadata,
        "checkpoint": Path(checkpoint_path).name,
        "fingerprint": fingerprint(checkpoint_path),
        "server_versions": versions(),
        "keys": {name: named(found) for name, found in key_maps.items()},
    }
    limits = None
    if limited:
        limits = build_limits(policy.preprocessor, policy.robot, changed_config(policy.config, assignments))
    return PolicyService(policy, contract, limits, seed, key_maps, greeting, record)


def warm_up(policy: Policy, graphs: int, absent: Collection[str] = ()) -> None:
    """Answer as clients will ask, so that none of them waits for what is done once: anew, by a prefix and by guidance, and up
    to `graphs` observations at once. absent: cameras that they do not send."""
    seen = {key: value for key, value in example(policy).items() if key not in absent}
    going_on = Continuation(policy.infer(seen, seed=0)["actions"], delay=1)
    learned: list[RealTime] = ["prefix"] if policy.metadata["rtc_max_delay"] else []
    guidance: list[RealTime] = ["guidance"] if policy.config.model.action_head_config.head in (FLOW_HEAD, *EXPERTS) else []
    asked: list[tuple[int, RealTime | None]] = [(1, method) for method in (*learned, *guidance)]
    asked += [(size, method) for size in range(2, graphs + 1) for method in (None, *learned)]
    for size, method in asked:
        continuation = None if method is None else going_on
        policy.infer_batch([seen] * size, [0] * size, None, [continuation] * size, method)


def changed_config(config: VLAConfig, assignments: Sequence[str]) -> VLAConfig:
    """A checkpoint's configuration with other limits. Raises `ConfigError` for what training has decided."""
    overrides = parse_assignments(assignments)
    for key in overrides:
        if not key.startswith(CHANGEABLE):
            raise ConfigError(f"--set {key}: decided by training; expected a key of {' or '.join(CHANGEABLE)}")
    return config_from_dict(config.model_dump(mode="json"), overrides, "--set")


def example(policy: Policy) -> dict[str, Any]:
    """An observation of the right form."""
    size = policy.metadata["image_size"]
    images = {key: np.zeros((size, size, 3), np.uint8) for key in policy.metadata["cameras"]}
    return {**images, STATE: np.asarray(policy.preprocessor.statistics.state.mean, np.float32), PROMPT: "wait"}


def named(key_map: KeyMap) -> dict[str, list[str]]:
    """The names that a client may use, by ours."""
    return {key: ["+".join(parts) for parts in names] for key, names in key_map.sources.items()}
