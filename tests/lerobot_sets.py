"""LeRobot data sets written by hand, straight from the format: what the reader is held against."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CAMERAS = ("front", "wrist")
TASKS = ("open the drawer", "close the drawer")
LENGTHS = (5, 2, 9, 4)
FPS = 10
HEIGHT, WIDTH = 32, 48


@dataclass
class Truth:
    """What a set holds: per episode state, action, task and success; per camera and row pixels, and bytes in Parquet."""

    root: Path
    state: list[np.ndarray] = field(default_factory=list)
    action: list[np.ndarray] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    success: list[bool] = field(default_factory=list)
    pixels: dict[str, list[np.ndarray]] = field(default_factory=dict)
    stored: dict[str, list[bytes]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"lerobot:{self.root}"


def picture(camera: int, episode: int, step: int) -> np.ndarray:
    """(H, W, 3) uint8: smooth, and different for every camera, episode and step."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    red = 60 + 2 * x + 12 * (step % 8)
    green = 40 + 3 * y + 9 * episode + 50 * camera
    blue = np.full_like(x, 20 * (step % 10) + 5 * episode)
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_video(path: Path, frames: list[np.ndarray], pix_fmt: str = "yuv420p", form: str = "mp4") -> list[np.ndarray]:
    """Write frames; returns them as a plain pass over the file decodes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "6", "crf": "12"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def write_set(root: Path, version: str = "v3.0", video: bool = True) -> Truth:
    """Four episodes of two tasks and two cameras; in v3.0 two data files, and videos of two episodes each."""
    truth = Truth(root, pixels={camera: [] for camera in CAMERAS}, stored={camera: [] for camera in CAMERAS})
    rng = np.random.default_rng(0)
    for episode, length in enumerate(LENGTHS):
        truth.state.append(rng.normal(size=(length, 3)).astype(np.float32))
        truth.action.append(rng.normal(size=(length, 2)).astype(np.float32))
        truth.tasks.append(TASKS[episode % 2])
        truth.success.append(episode % 3 == 0)
    (root / "meta").mkdir(parents=True)
    info: dict[str, Any] = {"codebase_version": version, "robot_type": "toy arm", "fps": FPS, "features": _features(video)}
    info |= {"total_episodes": len(LENGTHS), "total_frames": sum(LENGTHS), "total_tasks": len(TASKS)}
    info |= PATHS[version]
    (root / "meta/info.json").write_text(json.dumps(info))
    files = [[0], [1], [2], [3]] if version == "v2.1" else [[0, 1], [2, 3]]
    rows = [row for number, episodes in enumerate(files) for row in _write_file(truth, version, video, number, episodes)]
    if version == "v2.1":
        _write_lines(root / "meta/tasks.jsonl", [{"task_index": number, "task": task} for number, task in enumerate(TASKS)])
        listed = [{name: row[name] for name in ("episode_index", "tasks", "length")} for row in rows]
        _write_lines(root / "meta/episodes.jsonl", listed)
    else:
        write_tasks(root / "meta/tasks.parquet")
        (root / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    return truth


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


def _path(truth: Truth, version: str, kind: str, number: int, key: str = "") -> Path:
    numbers = dict.fromkeys(("episode_index", "file_index"), number)
    path = truth.root / PATHS[version][kind].format(episode_chunk=0, chunk_index=0, video_key=key, **numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_file(truth: Truth, version: str, video: bool, number: int, episodes: list[int]) -> list[dict[str, Any]]:
    """One data file and its videos; returns what the metadata says of its episodes."""
    tables, entries = [], []
    frames: dict[str, list[np.ndarray]] = {camera: [] for camera in CAMERAS}
    for episode in episodes:
        length, begin = LENGTHS[episode], sum(LENGTHS[:episode])
        steps = np.arange(length)
        columns: dict[str, Any] = {
            "observation.state": pa.FixedSizeListArray.from_arrays(truth.state[episode].reshape(-1), 3),
            "action": pa.array(truth.action[episode].tolist(), pa.list_(pa.float32())),
            "next.success": pa.array((steps == length - 1) & truth.success[episode]),
            "observation.effort": pa.array(np.zeros(length, np.float32)),
            "timestamp": pa.array((steps / FPS).astype(np.float32)),
            "frame_index": pa.array(steps),
            "episode_index": pa.array(np.full(length, episode)),
            "index": pa.array(begin + steps),
            "task_index": pa.array(np.full(length, episode % 2)),
        }
        entry: dict[str, Any] = {"episode_index": episode, "tasks": [truth.tasks[episode]], "length": length}
        entry |= {"data/chunk_index": 0, "data/file_index": number}
        for slot, camera in enumerate(CAMERAS):
            pixels = [picture(slot, episode, step) for step in range(length)]
            key, seconds = f"videos/observation.images.{camera}", len(frames[camera]) / FPS
            if video:
                entry |= {f"{key}/chunk_index": 0, f"{key}/file_index": number, f"{key}/from_timestamp": seconds}
                frames[camera] += pixels
                continue
            data = [encode(one, ("PNG", "JPEG")[slot]) for one in pixels]
            truth.stored[camera] += data
            truth.pixels[camera] += [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in data]
            images = [{"bytes": one, "path": f"frame-{step:06d}.png"} for step, one in enumerate(data)]
            columns[f"observation.images.{camera}"] = pa.array(images)
        tables.append(pa.table(columns))
        entries.append(entry)
    with pq.ParquetWriter(_path(truth, version, "data_path", number), tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)  # a row group per episode
    for camera in CAMERAS if video else ():
        path = _path(truth, version, "video_path", number, f"observation.images.{camera}")
        truth.pixels[camera] += write_video(path, frames[camera])
    return entries


def _features(video: bool) -> dict[str, Any]:
    image = {"dtype": "video" if video else "image", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]}
    return {
        **{f"observation.images.{camera}": image for camera in CAMERAS},
        "observation.state": {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "z"]}},
        "action": {"dtype": "float32", "shape": [2], "names": ["dx", "dy"]},
        "next.success": {"dtype": "bool", "shape": [1], "names": None},
        **{key: {"dtype": "float32", "shape": [1], "names": None} for key in ("observation.effort", "timestamp")},
        **{f"{key}index": {"dtype": "int64", "shape": [1], "names": None} for key in ("frame_", "episode_", "", "task_")},
    }


def add_feature(truth: Truth, key: str, feature: dict[str, Any], values: Callable[[int], pa.Array] | None = None) -> None:
    """Another feature of a v2.1 set, which begins info.json. values: its column, by episode; None: it has videos."""
    edit_json(truth.root / "meta/info.json", lambda info: info.update(features={key: feature, **info["features"]}))
    for episode in range(len(LENGTHS) if values else 0):
        path = _path(truth, "v2.1", "data_path", episode)
        pq.write_table(pq.read_table(path).append_column(key, values(episode)), path)


def write_tasks(path: Path, name: str = "__index_level_0__") -> None:
    """The tasks as pandas writes them. name: of the index."""
    pq.write_table(pa.table({"task_index": pa.array(range(len(TASKS)), pa.int64()), name: pa.array(TASKS)}), path)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_table(path: Path, change: Callable[[dict[str, list[Any]]], object]) -> None:
    """Change the columns of a Parquet file as lists; types and row groups stay."""
    file = pq.ParquetFile(path)
    table, schema = file.read(), file.schema_arrow
    columns = table.to_pydict()
    change(columns)
    table = pa.table({name: pa.array(columns[name], schema.field(name).type) for name in columns})
    pq.write_table(table, path, row_group_size=file.metadata.row_group(0).num_rows)


def column_types(path: Path) -> dict[str, str]:
    """Types of the columns of a Parquet file, in their order."""
    return {field.name: str(field.type).replace("element: ", "").replace("item: ", "") for field in pq.read_schema(path)}
