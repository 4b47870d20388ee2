"""The report's other parts: open-loop errors, training curves, and what the data look like."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from paligemma_vla import schema
from paligemma_vla.data.formats import decode_picture
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.reader import EpisodeReader, episode_prompts
from paligemma_vla.errors import DataError
from paligemma_vla.evaluation.charts import Line, bullet, chunk_chart, columns, line_chart, smooth
from paligemma_vla.evaluation.page import Html, data_url, duration, figure, fill, join, legend, number, percent, section, tiles

if TYPE_CHECKING:
    from paligemma_vla.evaluation.open_loop import OpenLoopResult, Trace

EPISODES_SHOWN, FRAMES_SHOWN, FRAME_PIXELS = 4, 8, 128
DIMENSIONS_SHOWN, CAMERAS_SHOWN, WORDS_SHOWN, FILES_READ = 8, 3, 16, 64
READER_CACHE = 64 * 2**20


def open_loop_hero(result: OpenLoopResult) -> Html:
    """The headline of a page without rollouts, beside the two dimensions of an episode that move most."""
    metrics = result.metrics
    baseline = metrics["baselines"]["mean_action"]["mae"]
    text = ""
    if baseline > 0:
        change = 1 - metrics["mae"] / baseline
        text = f"{percent(abs(change))} {'below' if change >= 0 else 'above'} always playing the mean training action."
    return fill(
        '<div class="{}"><div><div class="big">{}</div><p>mean absolute error of an action, in real units. {}</p>'
        '<p class="range">{}</p></div>{}</div>\n',
        "hero" if result.traces else "hero alone",
        number(metrics["mae"]),
        text,
        f"{metrics['samples']:,} of {metrics['samples_available']:,} steps, {metrics['episodes']:,} episodes",
        _trace(result.traces[0], metrics["per_dimension"], 2) if result.traces else Html(""),
    )


def open_loop_section(result: OpenLoopResult) -> Html:
    """Errors per dimension, horizon step and number of Euler steps, and chunks over recorded episodes."""
    metrics = result.metrics
    lead = "Chunks compared with what was recorded, in real units; steps past an episode's end are left out."
    if metrics["data"]["training_files"]:
        files = f"{metrics['data']['training_files']} of {len(metrics['data']['paths'])} files"
        lead += f" {files} were in the training data, so these figures flatter."
    facts = tiles(
        [
            ("mean absolute error", number(metrics["mae"])),
            ("mean squared error", number(metrics["mse"])),
            ("variance explained", "—" if metrics["explained"] is None else percent(metrics["explained"])),
            ("velocity loss", number(metrics["velocity_loss"])),
            ("steps compared", number(metrics["samples"])),
        ]
    )
    steps = [entry["mae"] or 0.0 for entry in metrics["per_step"]]
    baseline = metrics["baselines"]["mean_action"]["mae"]
    charts = fill(
        '<div class="grid">{}{}</div>',
        figure(
            "Error by dimension",
            _dimension_table(metrics["per_dimension"]),
            legend([("c0", "policy"), ("mark", "mean action")]),
        ),
        figure(
            "Error by step of the chunk", columns(steps, "step", baseline), legend([("c0", "policy"), ("true", "mean action")])
        ),
    )
    parts = [
        facts,
        charts,
        _euler_table(metrics["euler_steps"]),
        join(_trace(trace, metrics["per_dimension"]) for trace in result.traces),
    ]
    return section("Open loop", lead, join(parts))


def _dimension_table(rows: list[dict[str, Any]]) -> Html:
    most = max(max(row["mae"], row["mean_action_mae"]) for row in rows)
    body = join(
        fill(
            '<tr><th>{}</th><td class="w">{}</td><td class="n">{}</td><td class="n">{}</td></tr>',
            labelled(row["name"], row["unit"]),
            bullet(row["mae"], most, row["mean_action_mae"]),
            number(row["mae"]),
            number(row["mean_action_mae"]),
        )
        for row in rows
    )
    head = '<tr><th></th><th></th><th class="n">policy</th><th class="n">mean action</th></tr>'
    return fill("<table><thead>{}</thead><tbody>{}</tbody></table>", Html(head), body)


def _euler_table(rows: list[dict[str, Any]]) -> Html:
    most = max(row["mae"] for row in rows)
    body = join(
        fill(
            '<tr{}><th>{}</th><td class="w">{}</td><td class="n">{}</td><td class="n">{}</td><td class="n">{}</td>'
            '<td class="n">{}</td><td class="n">{}</td></tr>',
            Html(' class="used"') if row["used"] else Html(""),
            row["steps"],
            bullet(row["mae"], most),
            *(number(row[name]) for name in ("mae", "mse", "change", "ms_per_observation", "ms_per_observation_in_batches")),
        )
        for row in rows
    )
    head = Html(
        '<tr><th>steps</th><th></th><th class="n">MAE</th><th class="n">MSE</th><th class="n">change</th>'
        '<th class="n">ms alone</th><th class="n">ms batched</th></tr>'
    )
    note = (
        f"On {rows[0]['samples']} samples, each from the same noise. Change: mean distance from the finest integration. "
        "One step jumps to the mean of all good actions, which favours the squared error and need not favour the robot. "
        "ms: from picture to chunk, one observation at a time and in batches."
    )
    table = fill('<div style="overflow-x:auto"><table><thead>{}</thead><tbody>{}</tbody></table></div>', head, body)
    return figure("Euler steps against error and time", table, note=note)


def _trace(trace: Trace, dimensions: list[dict[str, Any]], most: int = DIMENSIONS_SHOWN) -> Html:
    """Predicted chunks over what was recorded, for the `most` dimensions that move most, in their order."""
    ranges = np.array([row["training_range"] or row["recorded_range"] for row in dimensions])
    movement = trace.actions.std(axis=0) / np.maximum(1e-9, ranges[:, 1] - ranges[:, 0])
    shown = np.sort(np.argsort(-movement, kind="stable")[:most])
    charts = join(
        fill(
            "<div><h4>{}</h4>{}</div>",
            labelled(dimensions[n]["name"], dimensions[n]["unit"]),
            chunk_chart(trace.actions[:, n], trace.starts.tolist(), trace.predicted[..., n], tuple(ranges[n])),
        )
        for n in shown
    )
    return figure(
        f"“{trace.prompt}”",
        fill('<div class="dims">{}</div>', charts),
        legend([("true", "recorded"), ("c1", "predicted"), ("c0", "predicted, next chunk")]),
        f"The {len(shown)} of {len(dimensions)} dimensions that move most." if len(dimensions) > len(shown) else "",
    )


def training_section(run_dir: Path) -> Html:
    """Curves of a run from its metrics.jsonl. Raises `DataError` when the run's files are missing."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    try:
        config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{run_dir / 'config.yaml'}: cannot be read ({error.strerror}); give the folder of a run") from error
    curves = {name: _curve(rows, name) for name in sorted({key for row in rows for key in row if "/" in key})}
    parts = [tiles(_training_facts(rows, curves)), fill('<div class="grid">{}</div>', join(_training_charts(curves)))]
    parts.append(fill("<details><summary>The whole configuration</summary><pre>{}</pre></details>", config))
    return section("Training", "Validation uses the training objective on fixed noise, so the two losses compare.", join(parts))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the folder of a training run") from error
    rows: list[dict[str, Any]] = []
    for place, line in enumerate(lines, start=1):
        try:
            rows.append({**json.loads(line)})
            rows[-1]["step"] = int(rows[-1]["step"])
        except (ValueError, TypeError, KeyError) as error:
            if place < len(lines):
                raise DataError(f"{path}: line {place}: expected a JSON object with a step; restore the file") from error
            del rows[place - 1 :]
    return rows


Curve = tuple[list[float], list[float]]


def _curve(rows: list[dict[str, Any]], name: str) -> Curve:
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def _training_facts(rows: list[dict[str, Any]], curves: dict[str, Curve]) -> list[tuple[str, str]]:
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


def _training_charts(curves: dict[str, Curve]) -> list[Html]:
    charts = []
    if "train/batch_loss" in curves:
        steps, loss = curves["train/batch_loss"]
        lines = [Line(steps, loss, "c0 raw"), Line(steps, smooth(loss), "c0")]
        names = [("c0", "training")]
        if "val/epoch_loss" in curves:
            lines.append(Line(*curves["val/epoch_loss"], "c1"))
            names.append(("c1", "validation"))
        charts.append(figure("Loss", line_chart(lines, "step", log=True), legend(names)))
    if "val/action_mae" in curves:
        chart = line_chart([Line(*curves["val/action_mae"], "c1")], "step", zero=True)
        charts.append(figure("Error of sampled actions", chart, legend([("c1", "validation, real units")])))
    if "train/lr" in curves:
        chart = line_chart([Line(*curves["train/lr"], "c2")], "step", zero=True)
        charts.append(figure("Learning rate", chart))
    if "train/samples_per_s" in curves:
        chart = line_chart([Line(*curves["train/samples_per_s"], "c3")], "step", zero=True)
        wait = curves.get("train/data_wait", ([], []))[1]
        note = f"{percent(float(np.mean(wait)))} of the time was spent waiting for data." if wait else ""
        charts.append(figure("Samples per second", chart, note=note))
    return charts


def dataset_section(index: EpisodeIndex) -> Html:
    """Sizes, frames and actions of a few episodes, and the instructions."""
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
    strips = join(_episode(index, reader, int(episode)) for episode in chosen)
    parts = [tiles(facts), fill('<div class="grid">{}</div>', strips), _instructions(index)]
    return section("Data", "A few episodes, evenly picked: pictures over time, and the recorded actions.", join(parts))


def _episode(index: EpisodeIndex, reader: EpisodeReader, episode: int) -> Html:
    file, start, length = int(index.file[episode]), int(index.start[episode]), int(index.length[episode])
    prompt = ""
    strips: list[list[Html]] = [[] for _ in range(reader.cameras)]
    for step in np.linspace(0, length - 1, min(FRAMES_SHOWN, length)).round().astype(int):
        rows, place = reader.group_of(file, start + int(step))
        prompt = prompt or str(rows.prompt[place].as_py())
        for camera, column in enumerate(rows.images):
            if column is None or not column.present(place):
                strips[camera].append(Html("<i></i>"))
                continue
            where = f"{index.paths[file]}: row {start + step}, column {schema.image_column(camera + 1)}"
            strips[camera].append(fill('<img alt="step {}" src="{}">', step, _thumbnail(decode_picture(column, place, where))))
    actions = reader.actions(file, start, start + length)
    shown = min(actions.shape[1], DIMENSIONS_SHOWN)
    metadata = index.layout.metadata
    names = metadata.action_names or [f"action[{n}]" for n in range(shown)]
    names = [labelled(name, unit) for name, unit in zip_longest(names, metadata.action_units, fillvalue="")]
    chart = line_chart([Line(np.arange(length), actions[:, n], f"c{n}") for n in range(shown)], "step", height=120)
    content = join([*(fill('<div class="strip">{}</div>', join(strip)) for strip in strips), chart])
    note = f"The first {shown} of {actions.shape[1]} dimensions." if actions.shape[1] > shown else ""
    return figure(f"“{prompt}”", content, legend([(f"c{n}", names[n]) for n in range(shown)]), note)


def labelled(name: str, unit: str) -> str:
    """A dimension's name, with its unit where it has one."""
    return f"{name} ({unit})" if unit else name


def _thumbnail(image: Image.Image) -> Html:
    image.thumbnail((FRAME_PIXELS, FRAME_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return data_url(buffer.getvalue(), "image/jpeg")


def _instructions(index: EpisodeIndex) -> Html:
    """How often each instruction occurs, read from the prompt column of the first files."""
    counts: Counter[str] = Counter()
    files = index.paths[:FILES_READ]
    for place in range(len(files)):
        counts.update(episode_prompts(index, place))
    shown = counts.most_common(WORDS_SHOWN)
    items = join(fill("<li>{} <span>{}</span></li>", prompt, count) for prompt, count in shown)
    rest = [f"{len(counts) - len(shown):,} more."] if len(counts) > len(shown) else []
    rest += [f"Counted in the first {FILES_READ} of {len(index.paths)} files."] if len(index.paths) > FILES_READ else []
    title = f"{len(counts):,} instruction{'s' * (len(counts) != 1)}, and how many episodes have each"
    return figure(title, fill('<ul class="words">{}</ul>', items), note=" ".join(rest))
