"""The report: self-contained, well-formed, safe against hostile text, showing exactly the parts it was given."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import DataError
from paligemma_vla.evaluation import report as module
from paligemma_vla.evaluation.charts import Axis, Line, chunk_chart, clean, line_chart, number, smooth
from paligemma_vla.evaluation.open_loop import ErrorSums, OpenLoopResult, Trace
from paligemma_vla.evaluation.report import Report, duration, render, write_report
from paligemma_vla.evaluation.rollout import wilson_interval
from support import METADATA, make_episode

HOSTILE = """</title></style><script>alert("1")</script><img src=x onerror='alert(2)'>&amp;{0}{}"""
VOID = {"meta", "img", "br", "link", "input", "hr"}
FILM, STILL = b"\x00\x00\x00 ftypisom film", b"\xff\xd8\xff still"


class Page(HTMLParser):
    """Checks nesting while parsing; collects elements, headings and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write_rollout(
    folder: Path, tasks: dict[str, tuple[int, int]], settings: dict[str, str] | None = None, prompt: str = "open the drawer"
) -> Path:
    """A rollout.json as `paligemma-vla rollout` writes it: {task: (successes, episodes)}, one film per task and outcome."""
    (folder / "videos").mkdir(parents=True)
    entries, videos = {}, []
    for place, (task, (successes, episodes)) in enumerate(tasks.items()):
        interval = list(wilson_interval(successes, episodes))
        entries[task] = {"successes": successes, "episodes": episodes, "rate": successes / episodes, "ci95": interval}
        for success in [True] * (successes > 0) + [False] * (successes < episodes):
            stem = f"videos/{place}_{success}"
            (folder / f"{stem}.mp4").write_bytes(FILM + stem.encode())
            (folder / f"{stem}.jpg").write_bytes(STILL)
            videos.append({"task": task, "success": success, "prompt": prompt, "path": f"{stem}.mp4", "poster": f"{stem}.jpg"})
    raw = {"settings": settings or {}, "tasks": entries, "mean_success": 0.5, "episodes": [], "videos": videos, "wall_s": 1.0}
    (folder / "rollout.json").write_text(json.dumps(raw))
    return folder


def write_run(folder: Path, config: str = "training:\n  seed: 0\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "epoch": step / 10, "train/batch_loss": 1 / step, "train/lr": 1e-3, "train/samples_per_s": 100.0}
        for step in range(1, 31)
    ]
    lines.append({"step": 30, "epoch": 3.0, "val/epoch_loss": 0.1, "val/action_mae": 0.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(config)
    return folder


def write_data(folder: Path, prompt: str) -> EpisodeIndex:
    rng = np.random.default_rng(0)
    with EpisodeWriter(folder, METADATA) as writer:
        for length in (5, 1, 12):
            episode = make_episode(rng, length, cameras=2)
            writer.write(replace(episode, prompt=prompt))
    return EpisodeIndex.build(str(folder))


def make_evaluation(prompt: str = "open the drawer", name: str = "dx") -> OpenLoopResult:
    rng = np.random.default_rng(0)
    sums = ErrorSums(4, 2)
    sums.add(rng.normal(size=(9, 4, 2)), np.zeros((9, 4, 2), np.float32), np.ones((9, 4), bool))
    dimensions = [
        {"name": label, "unit": unit, **entry, "mean_action_mae": 1.0, "zero_action_mae": 1.0, "training_range": [-1.0, 1.0]}
        for label, unit, entry in zip((name, "dy"), ("cm", ""), sums.per_dimension(), strict=True)
    ]
    euler = dict.fromkeys(("mae", "mse", "change", "ms_per_observation", "ms_per_observation_in_batches", "samples"), 9)
    metrics: dict[str, Any] = {
        **sums.total,
        "explained": 0.5,
        "velocity_loss": 0.3,
        "baselines": {"mean_action": {"mae": 1.0, "mse": 1.0}, "zero_action": {"mae": 1.0, "mse": 1.0}},
        "per_dimension": dimensions,
        "per_step": sums.per_step(),
        "euler_steps": [{"steps": 10, "used": True, **euler}],
        "samples": 9,
        "samples_available": 9,
        "episodes": 2,
        "data": {"paths": ["a.parquet"], "training_files": 0},
    }
    actions = rng.normal(size=(6, 2)).astype(np.float32)
    trace = Trace(0, prompt, actions, np.array([0, 4]), rng.normal(size=(2, 4, 2)).astype(np.float32))
    return OpenLoopResult(metrics, (trace,))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Every part, with hostile text wherever data can bring text in."""
    folder = tmp_path_factory.mktemp("report")
    tasks = {HOSTILE: (3, 4), "drawer-close": (0, 4)}
    return Report(
        title=HOSTILE,
        subtitle=HOSTILE,
        run_dir=write_run(folder / "run", config=f"x: '{HOSTILE}'\n"),
        dataset=write_data(folder / "data", HOSTILE),
        evaluation=make_evaluation(HOSTILE, HOSTILE),
        rollouts=[
            (HOSTILE, HOSTILE, write_rollout(folder / "own", tasks, prompt=HOSTILE)),
            ("reverse", "a control", write_rollout(folder / "opposite", tasks, {"prompts": "opposite"}, HOSTILE)),
        ],
        facts={HOSTILE: HOSTILE, "versions": {"torch": HOSTILE}, "wall_s": {HOSTILE: 61.0, "training": 5.0}},
    )


def test_page_is_well_formed_and_fetches_nothing(full: Report) -> None:
    text = render(full)
    page = Page(text)
    assert not re.search(r"https?://|@import|url\(", text)
    addresses = [
        attributes[name] for _, attributes in page.elements for name in ("src", "href", "poster") if name in attributes
    ]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert not page.all("script") and not page.all("link")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_hostile_text_appears_as_text_only(full: Report) -> None:
    text = render(full)
    assert "<script" not in text and "<img src=x" not in text and "onerror='" not in text
    # title, heading, subtitle, label and note (several times each), task, prompts, dimension, configuration, facts, stages
    assert Page(text).text.count(HOSTILE) > 20


@pytest.mark.parametrize(
    ("part", "headings"),
    [
        ("none", []),
        ("rollouts", ["Success in closed loop", "Films"]),
        ("dataset", ["Data"]),
        ("run_dir", ["Training"]),
        ("evaluation", ["Open loop"]),
        ("facts", ["How it was made"]),
    ],
)
def test_only_the_parts_that_are_given_are_shown(full: Report, part: str, headings: list[str]) -> None:
    report = Report("a run") if part == "none" else Report("a run", **{part: getattr(full, part)})
    page = Page(render(report))
    assert page.headings == headings
    assert "a run" in page.text
    assert not re.search(r"\b(None|nan|inf)\b", page.text)


def test_headline_is_the_rate_of_the_first_condition_with_its_wilson_interval(tmp_path: Path) -> None:
    folder = write_rollout(tmp_path / "own", {"drawer-open": (18, 20), "drawer-close": (20, 20)})
    text = Page(render(Report("t", rollouts=[("Own", "", folder)]))).text
    low, high = wilson_interval(38, 40)
    assert re.search(r"95%\s*of 40 simulated episodes solved, over 2 tasks\.", text)
    assert f"{100 * low:.0f}\u202f% to {100 * high:.0f}\u202f% (Wilson), 38 of 40" in text


def test_table_has_a_cell_per_task_and_condition_and_marks_controls(tmp_path: Path) -> None:
    own = write_rollout(tmp_path / "own", {"drawer-open": (9, 10), "drawer-close": (7, 10)})
    grey = write_rollout(tmp_path / "grey", {"drawer-open": (1, 10)}, {"image": "grey"})
    page = Page(render(Report("t", rollouts=[("own", "", own), ("grey", "", grey)])))
    low, high = wilson_interval(1, 10)
    assert {"class": "bar", "width": "10.00", "height": "10", "rx": "0.6"} in page.all("rect")
    assert (f"{100 * low:.2f}", f"{100 * high:.2f}") in [(line["x1"], line["x2"]) for line in page.all("line")]
    cells = [attributes["data-label"] for attributes in page.all("td") if "data-label" in attributes]
    assert cells == ["own", "grey"] * 3
    assert all(text in page.text for text in ("9/10", "7/10", "1/10", "16/20", "—", "should be low"))
    assert sum(attributes.get("class") == "rate low" for attributes in page.all("svg")) == 3  # card, one task, all tasks


def test_every_film_is_inside_the_page_once(tmp_path: Path) -> None:
    folder = write_rollout(tmp_path / "own", {"drawer-open": (1, 2), "drawer-close": (2, 2)})
    films = Page(render(Report("t", rollouts=[("own", "", folder)]))).all("video")
    inside = sorted(base64.b64decode(film["src"].removeprefix("data:video/mp4;base64,")) for film in films)
    assert inside == sorted(path.read_bytes() for path in (folder / "videos").glob("*.mp4"))
    assert all({"autoplay", "muted", "loop", "playsinline", "controls"} <= film.keys() for film in films)


def test_stills_stand_for_films_beyond_the_page_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_rollout(tmp_path / "own", {"drawer-open": (2, 2), "drawer-close": (2, 2)})
    monkeypatch.setattr(module, "VIDEO_BYTES", len(FILM) + 20)
    page = Page(render(Report("t", rollouts=[("own", "", folder)])))
    assert (len(page.all("video")), len(page.all("img"))) == (1, 1)


def test_files_outside_the_rollout_folder_are_not_carried_out(tmp_path: Path) -> None:
    folder = write_rollout(tmp_path / "own", {"drawer-open": (1, 1)})
    (tmp_path / "secret").write_bytes(b"secret")
    raw = json.loads((folder / "rollout.json").read_text())
    raw["videos"][0]["poster"] = "../secret"
    (folder / "rollout.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"got \.\./secret, expected a file inside"):
        render(Report("t", rollouts=[("own", "", folder)]))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"settings": {}}', '{"settings": {}, "tasks": {}}'])
def test_results_that_cannot_be_read_are_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "rollout.json").write_text(content)
    with pytest.raises(DataError, match=r"rollout\.json: "):
        render(Report("t", rollouts=[("own", "", tmp_path)]))


def test_metrics_cut_short_by_a_kill_are_shown_but_damaged_ones_are_not(tmp_path: Path) -> None:
    metrics = write_run(tmp_path) / "metrics.jsonl"
    whole = metrics.read_text()
    expected = render(Report("t", run_dir=tmp_path))
    metrics.write_text(whole + '{"step": 31, "train/ba')
    assert render(Report("t", run_dir=tmp_path)) == expected
    metrics.write_text("nonsense\n" + whole)
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 1: "):
        render(Report("t", run_dir=tmp_path))


def test_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "report.html"
    assert write_report(output, Report("first")) == output
    before = output.read_text()
    with pytest.raises(DataError):
        write_report(output, Report("second", run_dir=tmp_path / "absent"))
    assert output.read_text() == before
    assert list(output.parent.iterdir()) == [output]


def polylines(svg: str, style: str) -> list[np.ndarray]:
    found = re.findall(rf'<polyline class="{style}" points="([^"]*)"', svg)
    return [np.array([point.split(",") for point in text.split()], float) for text in found]


def test_line_chart_puts_points_where_the_axes_say() -> None:
    (points,) = polylines(line_chart([Line([0, 5, 10], [1.0, 3.0, 2.0])], "step"), "c0")
    x, y = points.T
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
    assert (y[0] - y[2]) / (y[0] - y[1]) == pytest.approx(0.5, abs=0.01)  # y grows downwards
    (points,) = polylines(line_chart([Line([0, 1, 2], [0.01, 0.1, 1.0])], "step", log=True), "c0")
    assert np.diff(points[:, 1]) == pytest.approx([np.diff(points[:, 1]).mean()] * 2, abs=0.11)


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    (points,) = polylines(line_chart([Line([0, 1, 2, 3], [1.0, np.nan, np.inf, 2.0])], "step"), "c0")
    assert len(points) == 2
    assert line_chart([Line([0, 1], [np.nan, np.nan])], "step") == ""
    assert line_chart([Line([0, 1], [-1.0, 0.0])], "step", log=True) == ""
    assert "circle" in line_chart([Line([7], [1.0])], "step")


def test_thinning_keeps_the_peaks() -> None:
    y = np.zeros(100_000)
    y[77_777], y[12_345] = 5.0, -5.0
    x, kept = clean(Line(np.arange(len(y)), y))
    assert len(x) < 500
    assert (kept.max(), kept.min()) == (5.0, -5.0)
    assert x[kept.argmax()] == 77_777


def test_smoothing_leaves_a_constant_alone_and_has_no_start_bias() -> None:
    np.testing.assert_allclose(smooth(np.full(300, 3.0)), 3.0)
    assert smooth([4.0, *[0.0] * 99])[0] == 4.0


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (-3, 17, False), (1e-5, 2e-5, False), (0.08, 0.9, True), (1e-4, 10, True)]
)
def test_ticks_are_few_and_inside(low: float, high: float, log: bool) -> None:
    ticks = Axis(low, high, 0, 100, log).ticks()
    assert 2 <= len(ticks) <= 7
    hair = 1e-9 * (high - low)
    assert all(low - hair <= tick <= high + hair for tick in ticks)


def test_chunks_end_where_the_episode_does() -> None:
    svg = chunk_chart(np.zeros(6), [0, 4], np.zeros((2, 4)), (-1.0, 1.0))
    (recorded,) = polylines(svg, "true")
    (first,), (second,) = polylines(svg, "even"), polylines(svg, "odd")
    assert (len(recorded), len(first), len(second)) == (6, 4, 2)
    assert second[-1, 0] == recorded[-1, 0]


def test_numbers_are_for_people() -> None:
    values = [0, 12, 12_345, 0.5, 0.01234, 123.4, 1_612_345, 2e-5, None, float("nan")]
    assert [number(value) for value in values] == ["0", "12", "12,345", "0.500", "0.0123", "123", "1.6 M", "2e-5", "—", "—"]
    assert [duration(value) for value in (2.34, 48, 800, 120, 7500)] == ["2.3 s", "48 s", "13 min 20 s", "2 min", "2 h 5 min"]
