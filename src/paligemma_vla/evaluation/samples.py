"""Recorded steps as a robot would present them to a policy, with the actions that followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paligemma_vla import schema
from paligemma_vla.data.formats import decode_picture
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.loader import VLADataset
from paligemma_vla.errors import DataError
from paligemma_vla.policy import Policy
from paligemma_vla.schema import Observation

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One step of an episode: what the policy sees, and the chunk that followed.

    actions (K, A) in real units, the last one repeated past the episode's end; mask (K,) is False there.
    """

    index: int
    episode: int
    step: int
    observation: Observation
    actions: Floats
    mask: NDArray[np.bool_]


class Samples:
    """Steps of episodes as a robot would present them, read from the files behind a `VLADataset`."""

    def __init__(self, dataset: VLADataset, policy: Policy) -> None:
        self.dataset, self.index = dataset, dataset.index
        self.cameras, self.horizon = len(policy.metadata["cameras"]), int(policy.metadata["horizon"])
        self.first = np.cumsum(self.index.length, dtype=np.int64) - self.index.length  # sample index of each episode's start

    def read(self, sample: int) -> Sample:
        """Decode one step. Raises `DataError` naming file, row and column."""
        episode, step = self.dataset.locate(sample)
        file, row = int(self.index.file[episode]), int(self.index.start[episode]) + step
        rows, place = self.dataset.reader.group_of(file, row)
        where = f"{self.index.paths[file]}: row {row}"
        observation: dict[str, Any] = {"state": rows.state[place], "prompt": rows.prompt[place].as_py()}
        for camera, column in enumerate(rows.images[: self.cameras], start=1):
            if column is not None and column.present(place):
                image = decode_picture(column, place, f"{where}, column {schema.image_column(camera)}")
                observation[schema.image_key(camera)] = np.asarray(image)
        real = min(self.horizon, int(self.index.length[episode]) - step)
        actions = self._actions(file, row, row + real)
        padded = np.concatenate([actions, np.repeat(actions[-1:], self.horizon - real, axis=0)])
        mask = np.arange(self.horizon) < real
        return Sample(sample, episode, step, observation, padded, mask)  # type: ignore[arg-type]

    def actions(self, episode: int) -> Floats:
        """All actions (L, A) of an episode."""
        start = int(self.index.start[episode])
        return self._actions(int(self.index.file[episode]), start, start + int(self.index.length[episode]))

    def _actions(self, file: int, start: int, stop: int) -> Floats:
        """Actions of some rows, with rotations written as the policy writes them, so that the two can be compared."""
        return self.dataset.preprocessor.actions.canonical(self.dataset.reader.actions(file, start, stop))


def check_same_robot(index: EpisodeIndex, policy: Policy) -> None:
    """Raise `DataError` with every way in which data and checkpoint are of different robots, cameras or rates."""
    layout, expected = index.layout, schema.described_layout(policy.metadata)
    faults = [f"{name}: {text}" for name, text in schema.robot_differences(layout, expected, expected.cameras).items()]
    if layout.cameras < expected.cameras:
        wanted = f"got {layout.cameras}, the checkpoint takes {expected.cameras}"
        faults.append(f"cameras: {wanted}; add columns (null where one is absent)")
    if faults:
        remedy = "evaluate on episodes of the robot that the checkpoint was trained for"
        raise DataError("\n  ".join([f"{index.paths[0]}: data and checkpoint do not fit; {remedy}", *faults]))
