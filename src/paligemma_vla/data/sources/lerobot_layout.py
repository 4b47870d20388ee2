"""What a LeRobot data set that we write looks like: paths, info.json, the types of its columns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from paligemma_vla.errors import DataError
from paligemma_vla.schema import Layout

CHUNK = 1000  # files per folder
SUCCESS = "next.success"
PATHS = {
    "v2.1": {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    },
    "v3.0": {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
}
INDEX_TYPES = {
    "timestamp": pa.float32(),
    "frame_index": pa.int64(),
    "episode_index": pa.int64(),
    "index": pa.int64(),
    "task_index": pa.int64(),
}


@dataclass(frozen=True)
class Format:
    """version: v2.1 or v3.0. video: frames in videos rather than images in Parquet. fps: steps per second."""

    version: str
    video: bool
    codec: str
    crf: int
    fps: float
    layout: Layout

    @property
    def camera_keys(self) -> list[str]:
        """A feature per camera. Raises `DataError` for names that LeRobot cannot have."""
        names = [
            self.layout.metadata.cameras[number] if number < len(self.layout.metadata.cameras) else f"image_{number + 1}"
            for number in range(self.layout.cameras)
        ]
        for name in names:
            if not name or "/" in name or names.count(name) > 1:
                text = f"metadata cameras: got {names}, expected different names without a slash"
                raise DataError(f"{text}; choose with --cameras")
        return [f"observation.images.{name}" for name in names]

    def path(self, kind: str, number: int, **values: object) -> str:
        """Path, in the data set, of file or episode `number`. kind: `data_path` or `video_path`."""
        chunk = number // CHUNK
        places = {"episode_chunk": chunk, "episode_index": number, "chunk_index": chunk, "file_index": number % CHUNK}
        return PATHS[self.version][kind].format(**places, **values)

    def features(self, sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """`features` of info.json. sizes: height and width of each camera's images."""
        metadata, features = self.layout.metadata, dict[str, Any]()
        for key, (height, width) in sizes.items():
            dtype = "video" if self.video else "image"
            features[key] = {"dtype": dtype, "shape": [height, width, 3], "names": ["height", "width", "channels"]}
            if self.video:
                features[key]["info"] = self._video_info(height, width)
        for key, dimension, names in [
            ("observation.state", self.layout.state_dim, metadata.state_names),
            ("action", self.layout.action_dim, metadata.action_names),
        ]:
            features[key] = {"dtype": "float32", "shape": [dimension], "names": list(names) or None}
        scalars = {SUCCESS: "bool", "timestamp": "float32", **dict.fromkeys(list(INDEX_TYPES)[1:], "int64")}
        features.update({key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in scalars.items()})
        return features

    def _video_info(self, height: int, width: int) -> dict[str, Any]:
        return {
            "video.height": height,
            "video.width": width,
            "video.codec": self.codec,
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": json_number(self.fps),
            "video.channels": 3,
            "has_audio": False,
        }

    def schema(self) -> pa.Schema:
        """Of a data file, with the note by which LeRobot's loader knows images and the lengths of lists."""
        fields, noted = list[pa.Field](), dict[str, Any]()
        if not self.video:
            image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            fields += [pa.field(key, image) for key in self.camera_keys]
            noted.update({key: {"_type": "Image"} for key in self.camera_keys})
        for key, dimension in (("observation.state", self.layout.state_dim), ("action", self.layout.action_dim)):
            if dimension == 1:  # LeRobot keeps a single number as one, not as a list of one
                fields.append(pa.field(key, pa.float32()))
                noted[key] = {"dtype": "float32", "_type": "Value"}
            else:
                fields.append(pa.field(key, pa.list_(pa.float32(), dimension)))
                value = {"dtype": "float32", "_type": "Value"}
                noted[key] = {"feature": value, "length": dimension, "_type": "Sequence"}
        for key, kind in {SUCCESS: pa.bool_(), **INDEX_TYPES}.items():
            fields.append(pa.field(key, kind))
            noted[key] = {"dtype": {"float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}
        note = json.dumps({"info": {"features": noted}})
        return pa.schema(fields, metadata={b"huggingface": note.encode()})

    def info(self, lengths: list[int], tasks: int, sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """info.json. What LeRobot has no place for is under `paligemma_vla`."""
        metadata, episodes = self.layout.metadata, len(lengths)
        counts = {"total_episodes": episodes, "total_frames": sum(lengths), "total_tasks": tasks}
        if self.version == "v2.1":
            videos = episodes * len(sizes) if self.video else 0
            counts |= {"total_videos": videos, "total_chunks": -(-episodes // CHUNK), "chunks_size": CHUNK}
        else:
            counts |= {"chunks_size": CHUNK, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
        return {
            "codebase_version": self.version,
            "robot_type": metadata.robot or None,
            **counts,
            "fps": json_number(self.fps),
            "splits": {"train": f"0:{episodes}"},
            "data_path": PATHS[self.version]["data_path"],
            "video_path": PATHS[self.version]["video_path"] if self.video else None,
            "features": self.features(sizes),
            "paligemma_vla": json.loads(metadata.to_json()),
        }


def json_number(value: float) -> int | float:
    """Whole numbers as such: LeRobot's own fps are."""
    return int(value) if value == int(value) else value
