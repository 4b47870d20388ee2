"""What a file says about itself is read back exactly, or refused."""

from __future__ import annotations

import json

import pytest

from paligemma_vla.errors import DataError
from paligemma_vla.schema import DatasetMetadata
from support import METADATA


def test_metadata_round_trip_is_exact() -> None:
    for metadata in (METADATA, DatasetMetadata(), DatasetMetadata(extra={"operator": "A"}, control_hz=3)):
        assert DatasetMetadata.from_json(metadata.to_json()) == metadata
        assert DatasetMetadata.from_json(metadata.to_json().encode()) == metadata


def test_metadata_leaves_unknown_fields_aside() -> None:
    assert DatasetMetadata.from_json('{"robot": "a", "colour": [1]}') == DatasetMetadata(robot="a")


@pytest.mark.parametrize("text", [b"", b"\xff", b"[1]", b"3", b"null", b'"robot"', b"{", b"[" * 100_000])
def test_metadata_that_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(DataError, match=r"^x\.parquet: not a JSON object of dataset metadata"):
        DatasetMetadata.from_json(text, "x.parquet")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("robot", 3, "a string"),
        ("robot", None, "a string"),
        ("cameras", "front", "a list of strings"),
        ("cameras", [["front"]], "a list of strings"),
        ("state_names", [1, 2], "a list of strings"),
        ("action_names", {"a": "b"}, "a list of strings"),
        ("control_hz", "10", "a number of at least 0"),
        ("control_hz", True, "a number of at least 0"),
        ("control_hz", float("nan"), "a number of at least 0"),
        ("control_hz", float("inf"), "a number of at least 0"),
        ("control_hz", -1.0, "a number of at least 0"),
        ("image_orientation", ["upright"], "a string"),
        ("extra", {"operator": {"name": "A"}}, "an object of strings"),
        ("extra", ["a"], "an object of strings"),
    ],
)
def test_metadata_of_another_type_names_the_field(name: str, value: object, expected: str) -> None:
    with pytest.raises(DataError, match=rf"^x\.parquet: {name}: got .*, expected {expected}$"):
        DatasetMetadata.from_json(json.dumps({name: value}), "x.parquet")
