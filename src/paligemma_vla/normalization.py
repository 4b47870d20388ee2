"""Normalisation: statistics of state and action, their JSON, and the one normaliser of the project.

All kinds are affine, `normalised = (value - center) / scale` per dimension, so inverting is exact:

    min_max     [min, max]  -> [-1, 1]            quantile    [q01, q99] -> [-1, 1]
    mean_std    mean -> 0, one standard deviation -> 1

lerobot_quantile and lerobot_mean_std are quantile and mean_std as LeRobot has them, for what was trained there: without the
care that ours takes of a dimension that hardly moves, which is divided by 1e-8.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, GetPydanticSchema, TypeAdapter, ValidationError
from pydantic_core import core_schema

from paligemma_vla.actions import ABSOLUTE, ActionTransform
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.schema import first_fault
from paligemma_vla.storage import atomic_write, read_json

LOW = 0.01
ORDER = (("min", "q01"), ("q01", "q99"), ("q99", "max"), ("min", "mean"), ("mean", "max"))
FLOAT32_MAX = float(np.finfo(np.float32).max)
TINY = 1e-8  # LeRobot's, in place of a spread of 0
ROUNDING = 1e-6  # relative; a mean of equal numbers may lie a little beside them
AGAIN = "compute the statistics again"
logger = logging.getLogger(__name__)


def _array_of(entry: Any) -> GetPydanticSchema:
    """For pydantic: an array (n,), float64, which is a list of `entry` in JSON."""
    write = core_schema.plain_serializer_function_ser_schema(np.ndarray.tolist)
    return GetPydanticSchema(
        lambda _, read: core_schema.no_info_after_validator_function(
            np.array, core_schema.list_schema(read(entry)), serialization=write
        )
    )


Numbers = Annotated[NDArray[np.float64], _array_of(Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX, strict=True)])]
Spreads = Annotated[NDArray[np.float64], _array_of(Annotated[float, Field(ge=0, le=FLOAT32_MAX, strict=True)])]


@dataclass(frozen=True)
class Statistics:
    """Statistics of one column over `count` rows; every array has one entry per dimension, float64."""

    min: Numbers
    max: Numbers
    mean: Numbers
    std: Spreads
    q01: Numbers
    q99: Numbers
    count: Annotated[int, Field(gt=0, strict=True)]

    def check(self, where: str) -> None:
        """Raise `DataError` for numbers that are no statistics of any data: a file may have been edited."""
        lengths = {name: len(value) for name, value in vars(self).items() if name != "count"}
        if len(set(lengths.values())) != 1:
            raise DataError(f"{where}: got {lengths}, expected lists of one length; {AGAIN}")
        slack = ROUNDING * np.maximum(np.abs(self.min), np.abs(self.max))
        for low, high in ORDER:
            below, above = getattr(self, low), getattr(self, high)
            for n in np.flatnonzero(above < below - slack):
                got = f"got {above[n]:g}, expected at least {low} = {below[n]:g}"
                raise DataError(f"{where}: {high}, dimension {n}: {got}; {AGAIN}")


class Accumulator:
    """Statistics of one column in a single streaming pass, mergeable, exact.

    Exact quantiles need only the tails: of `total` rows (known beforehand from the file footers), the q01 lies among the
    smallest hundredth and the q99 among the largest, so two percent of the numbers are kept.
    """

    def __init__(self, dimension: int, total: int) -> None:
        self.keep = math.ceil(LOW * total) + 2
        self.count = 0
        self.min = np.full(dimension, np.inf)
        self.max = np.full(dimension, -np.inf)
        self.mean = np.zeros(dimension)
        self.squares = np.zeros(dimension)  # sum of squared deviations from the mean
        self.low = np.empty((0, dimension), np.float32)
        self.high = np.empty((0, dimension), np.float32)

    def add(self, values: NDArray[np.float32]) -> None:
        """Take in rows (R, dimension)."""
        part = Accumulator(values.shape[1], 0)
        wide = values.astype(np.float64)
        part.count, part.min, part.max = len(values), wide.min(0), wide.max(0)
        part.mean = wide.mean(0)
        part.squares = ((wide - part.mean) ** 2).sum(0)
        part.low = part.high = values
        self.merge(part)

    def without_tails(self) -> Accumulator:
        """The same but for the kept numbers: small, and merged in an order, since sums of floats depend on it."""
        part = copy.copy(self)
        part.low = part.high = self.low[:0]
        return part

    def merge_tails(self, other: Accumulator) -> None:
        """Take in the kept numbers of another accumulator, in any order, and nothing else of it."""
        self.low = _smallest(np.concatenate([self.low, other.low]), self.keep)
        self.high = -_smallest(-np.concatenate([self.high, other.high]), self.keep)

    def merge(self, other: Accumulator) -> None:
        """Take in what another accumulator has seen (Chan et al. 1979 for the variance)."""
        total = self.count + other.count
        if other.count == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.squares = self.squares + other.squares + delta**2 * (self.count * other.count / total)
        self.min, self.max = np.minimum(self.min, other.min), np.maximum(self.max, other.max)
        self.merge_tails(other)
        self.count = total

    def result(self) -> Statistics:
        """Statistics of all rows seen. Raises `DataError` when there were none."""
        if self.count == 0:
            raise DataError("statistics: got 0 rows, expected at least one")
        position = LOW * (self.count - 1)
        below, above = np.sort(self.low, axis=0), -np.sort(-self.high, axis=0)
        return Statistics(
            min=self.min,
            max=self.max,
            mean=self.mean,
            std=np.sqrt(self.squares / self.count),
            q01=_interpolate(below, position),
            q99=_interpolate(above, position),
            count=self.count,
        )


def _smallest(values: NDArray[np.float32], keep: int) -> NDArray[np.float32]:
    return np.partition(values, keep - 1, axis=0)[:keep] if len(values) > keep else values


def _interpolate(ordered: NDArray[np.float32], position: float) -> NDArray[np.float64]:
    """Linear interpolation between order statistics, as `numpy.quantile` does."""
    lower = int(position)
    upper = min(lower + 1, len(ordered) - 1)
    share = position - lower
    value: NDArray[np.float64] = ordered[lower] * np.float64(1 - share) + ordered[upper] * np.float64(share)
    return value + 0.0  # no negative zero: which of two zeros comes first in an order is chance


@dataclass(frozen=True)
class DatasetStatistics:
    """What `normalization_stats.json` holds: state, action, and the data they were computed from.

    datasets: files. digests: of their contents, 16 characters each, in the same order; empty in older files.
    actions: what the numbers under `action` are of: the model sees no other.
    """

    version: Literal[1] = field(default=1, kw_only=True)
    state: Statistics
    action: Statistics
    datasets: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    actions: ActionTransform = ABSOLUTE  # as all were before there was a choice

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and for the checkpoint."""
        return dict(_adapter().dump_python(self, mode="json"))

    def save(self, path: str | Path) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(self.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({first_line(error)}); give a file in a folder you may write"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> DatasetStatistics:
        """Read the JSON; raises `DataError` naming the file and what is wrong with it."""
        raw = read_json(path, DataError, AGAIN, missing=f"write it with\n  {_command(path)}")
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: Any, where: str) -> DatasetStatistics:
        try:
            read = _adapter().validate_python(raw)
        except ValidationError as error:
            raise DataError(f"{where}: {first_fault(error)}; {AGAIN}") from error
        read.state.check(f"{where}: state")
        read.action.check(f"{where}: action")
        read.actions.check(f"{where}: actions", len(read.state.min), len(read.action.min))
        return read


@lru_cache
def _adapter() -> TypeAdapter[DatasetStatistics]:
    return TypeAdapter(DatasetStatistics)


def recompute(path: str | Path) -> str:
    """What to do about a statistics file that is of something else."""
    return f"{AGAIN}: {_command(path)}"


def _command(path: str | Path) -> str:
    return f"paligemma-vla stats --config_path CONFIG --output_path {path} (with the --set of the training)"


class Normalizer:
    """Normalise and invert one column: `(value - center) / scale` per dimension, in float32.

    A constant dimension has no scale of its own: it maps to 0 and back to its value (scale 1). A dimension whose quantile
    range is less than a hundredth of its full range (a gripper that hardly moves) would blow up under `quantile`; it is
    scaled by its full range instead, which is logged by name.
    """

    def __init__(self, statistics: Statistics, kind: str, name: str) -> None:
        low, high = statistics.min, statistics.max
        self.offset = 0.0  # of what is normalised
        if kind.startswith("lerobot_"):
            mean_std = kind == "lerobot_mean_std"
            spread = statistics.std + TINY if mean_std else statistics.q99 - statistics.q01
            self.center = (statistics.mean if mean_std else statistics.q01).astype(np.float32)
            self.scale = (spread if mean_std else np.where(spread == 0, TINY, spread) / 2).astype(np.float32)
            self.offset = 0.0 if mean_std else -1.0
            return
        if kind == "mean_std":
            center, scale = statistics.mean, statistics.std
        else:
            if kind == "quantile":
                narrow = (statistics.q99 - statistics.q01) < 0.01 * (high - low)
                for dimension in np.flatnonzero(narrow):
                    logger.warning("%s[%d]: 98 %% of its values lie in 1 %% of its range; min_max is used", name, dimension)
                low, high = np.where(narrow, low, statistics.q01), np.where(narrow, high, statistics.q99)
            center, scale = (low + high) / 2, (high - low) / 2
        constant = scale <= 1e-7 * np.maximum(1.0, np.abs(center))
        self.center = np.where(constant, statistics.mean, center).astype(np.float32)
        self.scale = np.where(constant, 1.0, scale).astype(np.float32)

    @property
    def dimension(self) -> int:
        return len(self.center)

    def normalize(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Real units (..., dimension) to normalised."""
        normalised = (values - self.center) / self.scale
        return (normalised + self.offset if self.offset else normalised).astype(np.float32)

    def denormalize(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised (..., dimension) to real units."""
        values = values - self.offset if self.offset else values
        return (values * self.scale + self.center).astype(np.float32)
