"""The report: one self-contained HTML page of a run, to be looked at rather than read.

Every part is optional and shown only when given. Nothing is fetched: images and videos are inside the file. This module
gathers what `report.html.j2` shows; the template escapes it, and `report.css` gives it its looks.
"""

from __future__ import annotations

import base64
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from paligemma_vla.data.faults import FaultError
from paligemma_vla.data.images import encode_image
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import EpisodeReader, Picture, episode_prompts
from paligemma_vla.errors import DataError, first_line
from paligemma_vla.evaluation.charts import Line, chunk_chart, columns, line_chart, number, smooth
from paligemma_vla.evaluation.compare import wilson_interval
from paligemma_vla.evaluation.open_loop import OpenLoopResult, Trace
from paligemma_vla.storage import atomic_write, read_json

FILMS, MOST_FILMS = 6, 24  # of the headline and of a condition; of the first condition beside the headline
TASK_FIGURES = ("successes", "episodes", "rate", "ci95")
CONTROLS = (("policy", "random"), ("image", "grey"), ("prompts", "opposite"))  # settings under which success is a bad sign
EPISODES_SHOWN, FRAMES_SHOWN, FRAME_PIXELS = 4, 8, 128
DIMENSIONS_SHOWN, CAMERAS_SHOWN, PROMPTS_SHOWN, FILES_READ = 8, 3, 16, 64
READER_CACHE = 64 * 2**20
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What the page shows.

    run_dir: of a training run (config.yaml, metrics.jsonl).
    rollouts: (label, what the condition controls for, folder with rollout.json and videos/), the main condition first.
    facts: by name; a mapping named `wall_s` becomes a bar of stages.
    """

    title: str
    subtitle: str = ""
    run_dir: Path | None = None
    dataset: EpisodeIndex | None = None
    evaluation: OpenLoopResult | None = None
    rollouts: Sequence[tuple[str, str, Path]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_report(output: Path, report: Report) -> Path:
    """Write the page to `output`, completely or not at all. Raises `DataError` when something that it shows is not there."""
    page = render(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, page)
    return output


def render(report: Report) -> str:
    """The page as text."""
    template, style = _template()
    return template.render(
        title=report.title,
        subtitle=report.subtitle,
        style=style,
        facts=report.facts,
        data=None if report.dataset is None else _data(report.dataset),
        training=None if report.run_dir is None else _training(report.run_dir),
        **_rollouts([read_condition(*entry) for entry in report.rollouts]),
        **_open_loop(report.evaluation),
    )


@lru_cache
def _template() -> tuple[Template, Markup]:
    """The page's template, and its style sheet."""
    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    texts = {"number": number, "percent": percent, "duration": duration, "labelled": labelled, "plain": plain}
    environment.filters |= {**texts, "spaced": lambda task: task.replace("-", " ")}
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2"), Markup(style)


def percent(rate: float) -> str:
    return f"{100 * rate:.0f}\u202f%"  # narrow, and no line break


def duration(seconds: float) -> str:
    """`48 s`, `13 min 20 s`, `2 h 5 min`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s" if rounded % 60 else f"{rounded // 60} min"
    return f"{rounded // 3600} h {rounded % 3600 // 60} min"


def labelled(name: str, unit: str) -> str:
    """A dimension's name, with its unit where it has one."""
    return f"{name} ({unit})" if unit else name


def plain(value: Any) -> str:
    """A value of `facts` as text."""
    if isinstance(value, Mapping):
        return " · ".join(f"{name} {plain(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value)
    return str(value)


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# Closed loop.


def read_condition(label: str, note: str, folder: Path) -> dict[str, Any]:
    """A `rollout.json` as the page shows it: its tasks and videos, and successes, episodes, rate and interval of all tasks.

    wanted_low: a control, where success is a bad sign. Raises `DataError`.
    """
    path = Path(folder) / "rollout.json"
    remedy = "give the folder of a `paligemma-vla rollout`, or run it again"
    raw = read_json(path, DataError, remedy)
    try:
        tasks = {task: {name: entry[name] for name in TASK_FIGURES} for task, entry in raw["tasks"].items()}
        successes, episodes = (sum(entry[name] for entry in tasks.values()) for name in TASK_FIGURES[:2])
        return {
            **{"label": label, "note": note, "tasks": tasks, "successes": successes, "episodes": episodes},
            "rate": successes / episodes,
            "ci95": wilson_interval(successes, episodes),
            "wanted_low": any(raw["settings"].get(name) == value for name, value in CONTROLS),
            "videos": [{**video, "folder": path.parent / "videos"} for video in raw.get("videos", [])],
        }
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{path}: not a result of `paligemma-vla rollout` ({reason}); {remedy}") from error


def _rollouts(conditions: list[dict[str, Any]]) -> dict[str, Any]:
    """Conditions, videos of the headline (one success per task), and the other videos of each condition."""
    if not conditions:
        return {"conditions": []}
    headline = _one_per_task([video for video in conditions[0]["videos"] if video["success"]])
    groups = []
    for condition in conditions:
        rest = sorted(
            (video for video in condition["videos"] if video not in headline), key=lambda video: bool(video["success"])
        )
        rest = rest[:MOST_FILMS] if condition is conditions[0] else _one_per_task(rest)
        if rest:
            groups.append((condition, [_film(video) for video in rest]))
    tasks = list(dict.fromkeys(task for condition in conditions for task in condition["tasks"]))
    hero = [_film(video) for video in headline]
    return {"conditions": conditions, "tasks": tasks, "hero_films": hero, "film_groups": groups}


def _one_per_task(videos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first video of each task, of at most FILMS tasks."""
    first: dict[str, dict[str, Any]] = {}
    for video in videos:
        first.setdefault(video["task"], video)
    return list(first.values())[:FILMS]


def _film(video: dict[str, Any]) -> dict[str, Any]:
    """An entry of `videos` in a rollout.json, with `data:` addresses. Raises `DataError` for a file that is not in the
    rollout's folder."""
    path, poster = (video["folder"] / Path(video[name]).name for name in ("path", "poster"))
    try:
        still, content = poster.read_bytes(), path.read_bytes()
    except OSError as error:
        raise DataError(f"{error.filename}: named by rollout.json, but it cannot be read ({error.strerror})") from error
    shown = {"still": _data_url(still, "image/jpeg"), "video": _data_url(content, "video/mp4"), "speed": ""}
    motion = video.get("motion") or {"speed": ()}  # rollouts of earlier versions say nothing of it
    if len(motion["speed"]):
        seconds = np.arange(len(motion["speed"])) / motion["control_hz"]
        centimetres = 100 * np.array(motion["speed"])
        shown["speed"] = line_chart([Line(seconds, centimetres)], "cm/s, by second", zero=True)
    return {**video, **shown}


# Open loop.


def _open_loop(result: OpenLoopResult | None) -> dict[str, Any]:
    if result is None:
        return {"metrics": None}
    metrics = result.metrics
    steps = [entry["mae"] or 0.0 for entry in metrics["per_step"]]
    return {
        "metrics": metrics,
        "steps_chart": columns(steps, "step", metrics["baselines"]["mean_action"]["mae"]),
        "traces": [_trace(trace, metrics["per_dimension"], DIMENSIONS_SHOWN) for trace in result.traces],
        "hero_trace": _trace(result.traces[0], metrics["per_dimension"], 2) if result.traces else None,
    }


def _trace(trace: Trace, dimensions: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """Charts of predicted chunks over what was recorded, for the `most` dimensions that move most, in their order."""
    ranges = np.array([row["training_range"] or row["recorded_range"] for row in dimensions])
    movement = trace.actions.std(axis=0) / np.maximum(1e-9, ranges[:, 1] - ranges[:, 0])
    charts = []
    for n in np.sort(np.argsort(-movement, kind="stable")[:most]):
        chart = chunk_chart(trace.actions[:, n], trace.starts.tolist(), trace.predicted[..., n], tuple(ranges[n]))
        charts.append((labelled(dimensions[n]["name"], dimensions[n]["unit"]), chart))
    return {"prompt": trace.prompt, "charts": charts, "dimensions": len(dimensions)}


# Training.


Curves = dict[str, tuple[list[float], list[float]]]  # steps and values by name
FACTS: tuple[tuple[str, str, Callable[[list[float]], str]], ...] = (
    ("step", "optimiser steps", lambda values: number(max(values))),
    ("epoch", "epochs", lambda values: f"{max(values):.1f}"),
    ("val/epoch_loss", "best validation loss", lambda values: number(min(values))),
    ("val/action_mae", "best action error", lambda values: number(min(values))),
    ("train/samples_per_s", "samples per second", lambda values: number(float(np.median(values)))),
)


def _training(run_dir: Path) -> dict[str, Any]:
    """A run from its metrics.jsonl and config.yaml. Raises `DataError` when they are missing or damaged."""
    path = run_dir / "metrics.jsonl"
    try:
        config = (run_dir / "config.yaml").read_text(encoding="utf-8")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); give the folder of a run") from error
    curves: Curves = {}
    try:
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have cut the last one short
        for name in sorted({key for row in rows for key in row}):
            pairs = [(float(row["step"]), float(row[name])) for row in rows if isinstance(row.get(name), (int, float))]
            if pairs:
                curves[name] = [step for step, _ in pairs], [value for _, value in pairs]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{path}: expected JSON objects with a step ({reason}); restore the file") from error
    facts = [(label, text(curves[name][1])) for name, label, text in FACTS if name in curves]
    return {"facts": facts, "charts": list(_training_charts(curves)), "config": config}


def _training_charts(curves: Curves) -> Iterator[dict[str, Any]]:
    if "train/batch_loss" in curves:
        steps, loss = curves["train/batch_loss"]
        lines = [Line(steps, loss, "c0 raw"), Line(steps, smooth(loss), "c0")]
        names = [("c0", "training")]
        if "val/epoch_loss" in curves:
            lines.append(Line(*curves["val/epoch_loss"], "c1"))
            names.append(("c1", "validation"))
        yield {"title": "Loss", "svg": line_chart(lines, "step", log=True), "lines": names, "note": ""}
    wait = curves.get("train/data_wait", ([], []))[1]
    waited = f"{percent(float(np.mean(wait)))} of the time was spent waiting for data." if wait else ""
    for name, style, title, names, note in [
        ("val/action_mae", "c1", "Error of sampled actions", [("c1", "validation, real units")], ""),
        ("train/lr", "c2", "Learning rate", [], ""),
        ("train/samples_per_s", "c3", "Samples per second", [], waited),
    ]:
        if name in curves:
            chart = line_chart([Line(*curves[name], style)], "step", zero=True)
            yield {"title": title, "svg": chart, "lines": names, "note": note}


# Data.


def _data(index: EpisodeIndex) -> dict[str, Any]:
    """Sizes, pictures and actions of a few episodes, and the instructions of the first files."""
    layout, meta = index.layout, index.layout.metadata
    facts = [("episodes", number(len(index))), ("steps", number(index.steps))]
    if meta.control_hz:
        facts.append((f"at {number(meta.control_hz)} Hz", duration(index.steps / meta.control_hz)))
    facts += [
        ("cameras" if layout.cameras > 1 else "camera", ", ".join(meta.cameras) or number(layout.cameras)),
        ("state dimensions", number(layout.state_dim)),
        ("action dimensions", number(layout.action_dim)),
    ]
    reader = EpisodeReader(index, min(layout.cameras, CAMERAS_SHOWN), READER_CACHE)
    chosen = np.unique(np.linspace(0, len(index) - 1, min(EPISODES_SHOWN, len(index))).round().astype(int))
    prompts: Counter[str] = Counter()
    for file in range(min(FILES_READ, len(index.paths))):
        prompts.update(text for texts in episode_prompts(index, file) for text in texts)
    common = prompts.most_common(PROMPTS_SHOWN)
    notes = [f"{len(prompts) - len(common):,} more."] if len(prompts) > len(common) else []
    notes += [f"Counted in the first {FILES_READ} of {len(index.paths)} files."] if len(index.paths) > FILES_READ else []
    examples = [_example(index, reader, int(episode)) for episode in chosen]
    return {"facts": facts, "examples": examples, "instructions": len(prompts), "common": common, "note": " ".join(notes)}


def _example(index: EpisodeIndex, reader: EpisodeReader, episode: int) -> dict[str, Any]:
    """One episode: pictures of each camera, evenly picked, and curves of the first action dimensions."""
    file, start, length = int(index.file[episode]), int(index.start[episode]), int(index.length[episode])
    steps = np.linspace(0, length - 1, min(FRAMES_SHOWN, length)).round().astype(int).tolist()
    rows = [reader.group_of(file, start + step) for step in steps]
    cameras = zip(*(group.pictures(row) for group, row in rows), strict=True)
    actions = reader.actions(file, start, start + length)
    shown = min(actions.shape[1], DIMENSIONS_SHOWN)
    metadata = index.layout.metadata
    names = metadata.action_names or [f"action[{n}]" for n in range(shown)]
    names = [labelled(name, unit) for name, unit in zip_longest(names, metadata.action_units, fillvalue="")]
    return {
        "prompt": rows[0][0].prompt[rows[0][1]].as_py(),
        "strips": [_strip(steps, pictures) for pictures in cameras],
        "chart": line_chart([Line(np.arange(length), actions[:, n], f"c{n}") for n in range(shown)], "step", height=120),
        "lines": [(f"c{n}", names[n]) for n in range(shown)],
        "note": f"The first {shown} of {actions.shape[1]} dimensions." if actions.shape[1] > shown else "",
    }


def _strip(steps: Sequence[int], pictures: Sequence[Picture | None]) -> list[tuple[int, str]]:
    """Pictures of some steps, small; none of a camera that cannot be decoded: it need not be one that is trained on."""
    try:
        return [(step, _thumbnail(picture)) for step, picture in zip(steps, pictures, strict=True)]
    except FaultError as error:  # a finished run is not undone by what its page shows
        logger.warning("report: %s", first_line(error))
        return []


def _thumbnail(picture: Picture | None) -> str:
    """Address of a small picture; nothing where there is none. Raises `FaultError`."""
    if picture is None:
        return ""
    image = Image.fromarray(picture.decode())
    image.thumbnail((FRAME_PIXELS, FRAME_PIXELS))
    return _data_url(encode_image(np.asarray(image), "jpeg", 82), "image/jpeg")
