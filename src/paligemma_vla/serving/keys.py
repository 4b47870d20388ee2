"""Which fields of a client's message are the policy's cameras, state and instruction.

Names in a message are the environment's. A map says for each of ours where it is taken from; the parts of a state are joined
with `+`. Nested maps are read as if their keys were joined with `/`. `action` is what the clients call the answer, where
their protocol asks for a name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paligemma_vla.errors import ConfigError, DataError, closest
from paligemma_vla.schema import ACTION, PROMPT, STATE

log = logging.getLogger(__name__)
ABSENT = "-"

PRESETS_ARE_OF = "openpi"  # the protocol whose clients send these names
PRESETS: dict[str, dict[str, str]] = {
    "droid": {
        "image_1": "observation/exterior_image_1_left",
        "image_2": "observation/wrist_image_left",
        STATE: "observation/joint_position+observation/gripper_position",
    },
    "roboarena": {
        "image_1": "observation/exterior_image_0_left",
        "image_2": "observation/wrist_image_left",
        STATE: "observation/joint_position+observation/gripper_position",
    },
    "libero": {"image_1": "observation/image", "image_2": "observation/wrist_image", STATE: "observation/state"},
    "aloha": {
        "image_1": "images/cam_high",
        "image_2": "images/cam_left_wrist",
        "image_3": "images/cam_right_wrist",
        STATE: "state",
    },
}


@dataclass(frozen=True)
class Names:
    """What the clients of a protocol usually send. usual: names by our key. cameras: what stands before a camera's own name."""

    protocol: str
    usual: Mapping[str, Sequence[str]]
    cameras: str


@dataclass
class KeyMap:
    """Our key -> the names that it may have in a message, the first one found counts; each name is a tuple of joined parts.

    action: the parts of `--keys action=...`; empty where it was not given.
    """

    sources: dict[str, tuple[tuple[str, ...], ...]]
    action: tuple[str, ...] = ()
    _ignored: set[str] = field(default_factory=set)

    def translate(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """An observation as `Policy` takes it. Raises `DataError` with every mapped field that is missing, and the nearest key.

        Other keys of the message are ignored, and logged once.
        """
        flat = dict(_flatten(message))
        observation: dict[str, Any] = {}
        used: set[str] = set()
        missing: list[tuple[str, str]] = []
        for key, names in self.sources.items():
            found = next((parts for parts in names if all(part in flat for part in parts)), None)
            if found is None:
                wanted = next((part for part in names[0] if part not in flat), names[0][0])
                others = "".join(f", or {'+'.join(parts)}" for parts in names[1:])
                missing.append((wanted, f"{wanted}: missing ({key} of the policy{others}); got {_names(flat)}"))
                continue
            used.update(found)
            observation[key] = flat[found[0]] if len(found) == 1 else _join([flat[part] for part in found], found)
        if missing:
            free = flat.keys() - used
            raise DataError("\n  ".join(["observation:", *(f"{text}{closest(wanted, free)}" for wanted, text in missing)]))
        for name in sorted(flat.keys() - used - self._ignored):
            if len(self._ignored) < MOST_IGNORED:
                self._ignored.add(name)
                log.info("%.80r: not mapped to a camera, state or prompt of the policy; ignored", name)
        return observation


MOST_IGNORED = 100  # names remembered: a client may send others each time


def build_key_maps(
    wires: Sequence[Names], cameras: Mapping[str, str], given: Sequence[str], preset: str | None
) -> dict[str, KeyMap]:
    """The map of each protocol.

    cameras: the policy's keys, and their names in its data (empty where it has none). A camera is found by its own name, then
    by the protocol's usual one unless that is another camera's own; our key is always taken too.
    given: `[PROTOCOL:]OURS=THEIRS[+THEIRS]`, THEIRS `-` for a camera that no client sends. preset: a name in `PRESETS`.
    Raises `ConfigError`.
    """
    ours, known = (*cameras, STATE, PROMPT, ACTION), [names.protocol for names in wires]
    for entry in given:
        where, _, theirs = entry.partition("=")
        scope, _, key = where.rpartition(":")
        if scope not in ("", *known):
            raise ConfigError(f"--keys {entry}: got protocol {scope!r}, expected one of {', '.join(known)}")
        if key not in ours or not theirs:
            raise ConfigError(f"--keys {entry}: expected [PROTOCOL:]NAME=THEIRS with NAME one of {', '.join(ours)}")
        if theirs == ABSENT and key not in list(cameras)[1:]:
            raise ConfigError(f"--keys {entry}: only a camera after the first can be absent")
    presets = {PRESETS_ARE_OF: dict(PRESETS.get(preset or "", {}))}
    for key in presets[PRESETS_ARE_OF].keys() - set(ours):
        log.warning(
            "--preset %s: the policy has no %s; what clients send as %s is ignored", preset, key, PRESETS[preset or ""][key]
        )
    if preset is not None and (unsent := [key for key in cameras if key not in PRESETS[preset]]):
        presets[PRESETS_ARE_OF] |= dict.fromkeys(unsent, ABSENT)
        log.warning("--preset %s: its clients send no %s: absent, unless --keys names it", preset, ", ".join(unsent))
    return {names.protocol: _key_map(names, cameras, given, presets.get(names.protocol, {})) for names in wires}


def _key_map(names: Names, cameras: Mapping[str, str], given: Sequence[str], preset: Mapping[str, str]) -> KeyMap:
    keys = (*cameras, STATE, PROMPT)
    chosen = {key: name for key, name in preset.items() if key in keys}
    for scope in ("", f"{names.protocol}:"):  # those of one protocol win
        entries = (entry.removeprefix(scope).partition("=") for entry in given if entry.startswith(scope))
        chosen.update({key: theirs for key, _, theirs in entries if ":" not in key})
    action = tuple(chosen.pop(ACTION).split("+")) if ACTION in chosen else ()
    own = {key: f"{names.cameras}{name.rpartition('.')[2]}" for key, name in cameras.items() if name}
    sources: dict[str, tuple[tuple[str, ...], ...]] = {}
    for key in keys:
        if key in chosen:
            if chosen[key] != ABSENT:
                sources[key] = (tuple(chosen[key].split("+")),)
        else:
            taken = {name for other, name in own.items() if other != key}
            usual = (name for name in names.usual.get(key, ()) if name not in taken)
            sources[key] = tuple((name,) for name in dict.fromkeys([*filter(None, [own.get(key)]), *usual, key]))
    return KeyMap(sources, action)


def _flatten(message: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in message.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}/")
        else:
            yield name, value


def _join(parts: Sequence[Any], names: Sequence[str]) -> Any:
    """Numbers side by side (P,)."""
    vectors = []
    for name, part in zip(names, parts, strict=True):
        try:
            vector = np.asarray(part)
        except ValueError:
            vector = np.array(None)
        if vector.dtype.kind not in "biuf" or vector.size != max(vector.shape, default=1):
            raise DataError(f"{name}: got {type(part).__name__}, expected numbers in one row")
        vectors.append(vector.reshape(-1))
    return np.concatenate(vectors)


def _names(flat: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name:.40}" for name in list(flat)[:12]) or "nothing"
    return shown + (f", ... ({len(flat)})" if len(flat) > 12 else "")
