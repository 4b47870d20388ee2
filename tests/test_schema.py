"""What a file says about itself is read back exactly, or refused."""

from __future__ import annotations

import json

import pytest

from paligemma_vla.errors import DataError
from paligemma_vla.schema import DatasetMetadata, chunk_coverage
from support import METADATA

ARM = DatasetMetadata(
    state_units=("m", "rad"), action_units=("m", ""), action_representation="delta", action_rotation="quaternion_wxyz"
)


def test_metadata_round_trip_is_exact() -> None:
    for metadata in (METADATA, DatasetMetadata(), DatasetMetadata(extra={"operator": "A"}, control_hz=3), ARM):
        assert DatasetMetadata.from_json(metadata.to_json()) == metadata
        assert DatasetMetadata.from_json(metadata.to_json().encode()) == metadata


def test_metadata_of_before_units_and_representations_is_read_as_saying_nothing_of_them() -> None:
    old = (
        '{"action_convention": "delta, +1 = 1 cm", "action_names": ["dx", "dy"], "cameras": ["front", "wrist"], '
        '"control_hz": 12.5, "extra": {}, "image_orientation": "upright", "robot": "toy arm", "state_names": ["x", "y", "z"]}'
    )
    assert DatasetMetadata.from_json(old) == METADATA
    assert DatasetMetadata.from_json('{"robot": "a"}').image_orientation == "", "nothing said how pictures stand"
    assert DatasetMetadata.from_json('{"robot": "a", "colour": [1]}') == DatasetMetadata(robot="a")  # and of later versions
    assert METADATA.state_units == () and METADATA.action_representation == METADATA.action_rotation == ""


@pytest.mark.parametrize("text", [b"", b"\xff", b"[1]", b"null", b"{", b"[" * 100_000])
def test_metadata_that_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(DataError, match=r"^x\.parquet: got "):
        DatasetMetadata.from_json(text, "x.parquet")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("robot", [3, None]),
        ("cameras", ["front", [["front"]]]),
        ("control_hz", ["10", float("nan"), float("inf"), -1.0]),
        ("action_units", [{"a": "b"}, ["m", None]]),
        ("action_representation", ["relative"]),
        ("action_rotation", ["euler", {}]),
        ("extra", [["a"], {"operator": {"name": "A"}}]),
    ],
)
def test_metadata_of_another_type_names_the_field(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(DataError, match=rf"^x\.parquet: {name}(\..+)?: got "):
            DatasetMetadata.from_json(json.dumps({name: value}), "x.parquet")


def test_chunk_covers_what_its_rate_says() -> None:
    assert chunk_coverage(24, 80.0) == "a chunk of 24 actions covers 0.30 s at 80 Hz"
    assert chunk_coverage(8, 0.0) == "", "the rate is not known"
