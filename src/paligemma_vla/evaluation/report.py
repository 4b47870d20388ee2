"""The report: one self-contained HTML page of a run, to be looked at rather than read.

Every part is optional and shown only when given. Nothing is fetched: images and videos are inside the file. This module
gathers what `report.html.j2` shows; the template escapes it, and `report.css` gives it its looks.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from paligemma_vla import schema
from paligemma_vla.data.formats import decode_picture
from paligemma_vla.data.images import encode_image
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import EpisodeReader, episode_prompts
from paligemma_vla.errors import DataError
from paligemma_vla.evaluation.charts import Line, chunk_chart, columns, line_chart, number, smooth
from paligemma_vla.evaluation.rollout import wilson_interval
from paligemma_vla.storage import atomic_write, read_json

if TYPE_CHECKING:
    from paligemma_vla.evaluation.open_loop import OpenLoopResult, Trace

VIDEO_BYTES = 3_600_000  # of .mp4 in one page; base64 makes a third more of it
VIDEOS_PER_CONDITION = 6
CONTROLS = (("policy", "random"), ("image", "grey"), ("prompts", "opposite"))  # settings under which success is a bad sign
EPISODES_SHOWN, FRAMES_SHOWN, FRAME_PIXELS = 4, 8, 128
DIMENSIONS_SHOWN, CAMERAS_SHOWN, PROMPTS_SHOWN, FILES_READ = 8, 3, 16, 64
READER_CACHE = 64 * 2**20


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


@dataclass(frozen=True)
class Counts:
    """Successes of some episodes, their rate and its 95 % interval."""

    successes: int
    episodes: int

    @property
    def rate(self) -> float:
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.successes, self.episodes)


@dataclass(frozen=True)
class Condition(Counts):
    """One rollout.json. `videos` as there; wanted_low: a control, where success is a bad sign."""

    label: str
    note: str
    wanted_low: bool
    folder: Path
    tasks: dict[str, Counts]
    videos: list[dict[str, Any]]


def read_condition(label: str, note: str, folder: Path) -> Condition:
    """Read `folder/rollout.json`. Raises `DataError`."""
    path = Path(folder) / "rollout.json"
    remedy = "give the folder of a `paligemma-vla rollout`, or run it again"
    raw = read_json(path, DataError, remedy)
    try:
        settings, videos = raw["settings"], list(raw.get("videos", []))
        tasks = {task: Counts(int(entry["successes"]), int(entry["episodes"])) for task, entry in raw["tasks"].items()}
        wanted_low = any(settings.get(name) == value for name, value in CONTROLS)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not a result of `paligemma-vla rollout` ({reason}); {remedy}") from error
    if not tasks or any(not counts.episodes for counts in tasks.values()):
        raise DataError(f"{path}: got no episodes, expected at least one of each task; {remedy}")
    successes, episodes = (sum(getattr(counts, key) for counts in tasks.values()) for key in ("successes", "episodes"))
    return Condition(successes, episodes, label, note, wanted_low, Path(folder), tasks, videos)


def _rollouts(conditions: list[Condition]) -> dict[str, Any]:
    """Conditions, videos of the headline (one success per task), and the other videos of each condition."""
    if not conditions:
        return {"conditions": []}
    main, budget = conditions[0], _VideoBudget()
    solved: dict[str, dict[str, Any]] = {}
    for video in main.videos:
        if video["success"]:
            solved.setdefault(video["task"], video)
    headline = list(solved.values())[:6]
    hero = [budget.load(main, video) for video in headline]
    groups = []
    for condition in conditions:
        rest = sorted((video for video in condition.videos if video not in headline), key=lambda video: bool(video["success"]))
        if condition is not main:
            rest = _one_task_after_another(rest)[:VIDEOS_PER_CONDITION]
        if rest:
            groups.append((condition, [budget.load(condition, video) for video in rest]))
    tasks = list(dict.fromkeys(task for condition in conditions for task in condition.tasks))
    return {"conditions": conditions, "tasks": tasks, "hero_films": hero, "film_groups": groups}


class _VideoBudget:
    """Loads videos into the page; once VIDEO_BYTES are used, a still stands for a video."""

    def __init__(self) -> None:
        self.left = VIDEO_BYTES

    def load(self, condition: Condition, entry: dict[str, Any]) -> dict[str, Any]:
        """An entry of `videos` in a rollout.json, with `data:` addresses. Raises `DataError` for a file that is not there,
        or outside its folder: a page must not carry other files out."""
        path, poster = condition.folder / entry["path"], condition.folder / entry["poster"]
        for file in (path, poster):
            if not file.resolve().is_relative_to(condition.folder.resolve()):
                where = condition.folder / "rollout.json"
                raise DataError(f"{where}: videos: got {file}, expected a file inside {condition.folder}")
        try:
            still, content = poster.read_bytes(), path.read_bytes() if path.stat().st_size <= self.left else b""
        except OSError as error:
            raise DataError(f"{path}: named by rollout.json, but it cannot be read ({error.strerror})") from error
        self.left -= len(content)
        video = _data_url(content, "video/mp4") if content else ""
        return {**entry, "name": path.name, "still": _data_url(still, "image/jpeg"), "video": video}


def _one_task_after_another(videos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One video of each task in turn, so that a cut leaves all tasks in sight."""
    seen: Counter[str] = Counter()
    turns = []
    for video in videos:
        seen[video["task"]] += 1
        turns.append(seen[video["task"]])
    return [videos[n] for n in np.argsort(turns, kind="stable")]


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


def _training(run_dir: Path) -> dict[str, Any]:
    """A run from its metrics.jsonl and config.yaml. Raises `DataError` when they are missing."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    try:
        config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{run_dir / 'config.yaml'}: cannot be read ({error.strerror}); give the folder of a run") from error
    curves: Curves = {}
    for name in sorted({key for row in rows for key in row if "/" in key}):
        pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
        curves[name] = ([float(step) for step, _ in pairs], [float(value) for _, value in pairs])
    return {"facts": _training_facts(rows, curves), "charts": list(_training_charts(curves)), "config": config}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the folder of a training run") from error
    rows = []
    for count, line in enumerate(lines, start=1):
        try:
            row = {**json.loads(line)}
            rows.append(row | {"step": int(row["step"])})
        except (ValueError, TypeError, KeyError) as error:
            if count < len(lines):
                raise DataError(f"{path}: line {count}: expected a JSON object with a step; restore the file") from error
    return rows


def _training_facts(rows: list[dict[str, Any]], curves: Curves) -> list[tuple[str, str]]:
    facts = [("optimiser steps", number(max((row["step"] for row in rows), default=0)))]
    epochs = [row["epoch"] for row in rows if "epoch" in row]
    if epochs:
        facts.append(("epochs", f"{max(epochs):.1f}"))
    for name, label in [("val/epoch_loss", "best validation loss"), ("val/action_mae", "best action error")]:
        if name in curves and curves[name][1]:
            facts.append((label, number(min(curves[name][1]))))
    if "train/samples_per_s" in curves:
        facts.append(("samples per second", number(float(np.median(curves["train/samples_per_s"][1])))))
    return facts


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
        prompts.update(episode_prompts(index, file))
    common = prompts.most_common(PROMPTS_SHOWN)
    notes = [f"{len(prompts) - len(common):,} more."] if len(prompts) > len(common) else []
    notes += [f"Counted in the first {FILES_READ} of {len(index.paths)} files."] if len(index.paths) > FILES_READ else []
    examples = [_example(index, reader, int(episode)) for episode in chosen]
    return {"facts": facts, "examples": examples, "instructions": len(prompts), "common": common, "note": " ".join(notes)}


def _example(index: EpisodeIndex, reader: EpisodeReader, episode: int) -> dict[str, Any]:
    """One episode: pictures of each camera, evenly picked, and curves of the first action dimensions."""
    file, start, length = int(index.file[episode]), int(index.start[episode]), int(index.length[episode])
    prompt = ""
    strips: list[list[tuple[int, str]]] = [[] for _ in range(reader.cameras)]
    for step in np.linspace(0, length - 1, min(FRAMES_SHOWN, length)).round().astype(int):
        rows, row = reader.group_of(file, start + int(step))
        prompt = prompt or str(rows.prompt[row].as_py())
        for camera, column in enumerate(rows.images):
            picture = ""
            if column is not None and column.present(row):
                where = f"{index.paths[file]}: row {start + step}, column {schema.image_column(camera + 1)}"
                picture = _thumbnail(decode_picture(column, row, where))
            strips[camera].append((int(step), picture))
    actions = reader.actions(file, start, start + length)
    shown = min(actions.shape[1], DIMENSIONS_SHOWN)
    metadata = index.layout.metadata
    names = metadata.action_names or [f"action[{n}]" for n in range(shown)]
    names = [labelled(name, unit) for name, unit in zip_longest(names, metadata.action_units, fillvalue="")]
    return {
        "prompt": prompt,
        "strips": strips,
        "chart": line_chart([Line(np.arange(length), actions[:, n], f"c{n}") for n in range(shown)], "step", height=120),
        "lines": [(f"c{n}", names[n]) for n in range(shown)],
        "note": f"The first {shown} of {actions.shape[1]} dimensions." if actions.shape[1] > shown else "",
    }


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((FRAME_PIXELS, FRAME_PIXELS))
    return _data_url(encode_image(image, "jpeg", 82), "image/jpeg")
