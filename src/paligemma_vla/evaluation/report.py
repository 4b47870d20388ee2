"""The report: one self-contained HTML page of a run, to be looked at rather than read.

Every part is optional and shown only when given. Nothing is fetched: images and films are inside the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.evaluation import report_panels as panels
from paligemma_vla.evaluation import report_rollouts as closed_loop
from paligemma_vla.evaluation.page import Html, document, duration, fill, join, number, section
from paligemma_vla.storage import atomic_write

if TYPE_CHECKING:
    from paligemma_vla.evaluation.open_loop import OpenLoopResult


@dataclass(frozen=True)
class Report:
    """What the page shows.

    run_dir: of a training run (config.yaml, metrics.jsonl).   dataset: episodes, or where they are.
    rollouts: (label, note, folder with rollout.json and videos/), the main condition first; an empty label or note is
    filled in from the condition's settings.   facts: by name; a mapping named `wall_s` becomes a bar of stages.
    """

    title: str
    subtitle: str = ""
    run_dir: Path | None = None
    dataset: EpisodeIndex | str | Path | None = None
    evaluation: OpenLoopResult | None = None
    rollouts: Sequence[tuple[str, str, Path]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_report(output: Path, report: Report) -> Path:
    """Write the page to `output`, whole or not at all. Raises `DataError` when something it was told to show is not there."""
    page = render(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, page)
    return output


def render(report: Report) -> Html:
    """The page as text."""
    conditions = [closed_loop.read_condition(*entry) for entry in report.rollouts]
    films = closed_loop.Films()
    parts = [_header(report)]
    open_loop = panels.open_loop_section(report.evaluation) if report.evaluation is not None else Html("")
    if conditions:
        parts.append(closed_loop.hero(conditions[0], films))
        parts.append(closed_loop.success_section(conditions))
        parts.append(closed_loop.film_section(conditions, films))
    elif report.evaluation is not None:
        parts += [panels.open_loop_hero(report.evaluation), open_loop]
    if report.dataset is not None:
        index = report.dataset
        if not isinstance(index, EpisodeIndex):
            index = EpisodeIndex.build(str(index), "report")
        parts.append(panels.dataset_section(index))
    if report.run_dir is not None:
        parts.append(panels.training_section(report.run_dir))
    if conditions:
        parts.append(open_loop)
    if report.facts:
        parts.append(_facts(report.facts))
    return document(report.title, join(parts))


def _header(report: Report) -> Html:
    subtitle = fill('<p class="sub">{}</p>', report.subtitle) if report.subtitle else Html("")
    return fill("<header><h1>{}</h1>{}</header>\n", report.title, subtitle)


def _facts(facts: Mapping[str, Any]) -> Html:
    """Names and values; the stages of `wall_s` as one bar."""
    body = []
    if facts.get("wall_s"):
        body.append(_stages(facts["wall_s"]))
    rows = [(name, value) for name, value in facts.items() if name != "wall_s" and value is not None]
    if rows:
        entries = join(fill("<dt>{}</dt><dd>{}</dd>", name.replace("_", " "), _text(value)) for name, value in rows)
        body.append(fill('<div class="panel"><dl class="facts">{}</dl></div>', entries))
    return section("How it was made", "What this page was made with, so that it can be made again.", join(body))


def _stages(seconds: Mapping[str, float]) -> Html:
    total = sum(seconds.values()) or 1.0
    shown = [(name, value, f"c{n % 8}") for n, (name, value) in enumerate(seconds.items())]
    bars = join(
        fill('<i style="flex:{} 0 0;background:var(--{})" title="{}"></i>', f"{value / total:.4f}", colour, name)
        for name, value, colour in shown
    )
    names = join(
        fill('<span><i class="{}"></i>{} {}</span>', colour, name.replace("_", " "), duration(value))
        for name, value, colour in shown
    )
    return fill(
        '<figure class="panel"><figcaption><b>{} in all</b></figcaption><div class="stages">{}</div>'
        '<span class="legend">{}</span></figure>',
        duration(total),
        bars,
        names,
    )


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " · ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value)
    return str(value)
