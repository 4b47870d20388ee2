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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paligemma_vla import Policy
from paligemma_vla.data.index import EpisodeIndex
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.errors import DataError
from paligemma_vla.evaluation.charts import Axis, Line, chunk_chart, clean, line_chart, number, smooth
from paligemma_vla.evaluation.compare import wilson_interval
from paligemma_vla.evaluation.open_loop import OpenLoopConfig, OpenLoopResult, evaluate
from paligemma_vla.evaluation.report import Report, duration, render
from support import METADATA, make_episode

HOSTILE = """</title></style><script>alert("1")</script><img src=x onerror='alert(2)'>&amp;{0}{}"""
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
        if tag not in ("meta", "img", "br"):  # which have no end
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write_rollout(folder: Path, tasks: dict[str, tuple[int, int]], prompt: str = "open the drawer", **settings: str) -> Path:
    """What the report reads of a rollout: {task: (successes, episodes)}, and one video per task and outcome."""
    (folder / "videos").mkdir(parents=True)
    videos = []
    for count, (task, (successes, episodes)) in enumerate(tasks.items()):
        for success in [True] * (successes > 0) + [False] * (successes < episodes):
            stem = f"videos/{count}_{success}"
            (folder / f"{stem}.mp4").write_bytes(FILM + stem.encode())
            (folder / f"{stem}.jpg").write_bytes(STILL)
            videos.append({"task": task, "success": success, "prompt": prompt, "path": f"{stem}.mp4", "poster": f"{stem}.jpg"})
    counts = {task: counted(*numbers) for task, numbers in tasks.items()}
    (folder / "rollout.json").write_text(json.dumps({"settings": settings, "tasks": counts, "videos": videos}))
    return folder


def counted(successes: int, episodes: int) -> dict[str, Any]:
    ci95 = wilson_interval(successes, episodes)
    return {"successes": successes, "episodes": episodes, "rate": successes / episodes, "ci95": ci95}


def copy_run(run: Path, folder: Path, config: str) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    (folder / "config.yaml").write_text(config)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, policy: Policy, two_camera_dir: Path, trained_run: Path) -> Report:
    """Every part, with hostile text wherever data can bring text in."""
    folder = tmp_path_factory.mktemp("report")
    result = evaluate(policy, str(two_camera_dir), OpenLoopConfig(max_samples=6, euler_samples=2, episodes_shown=1))
    with EpisodeWriter(folder / "data", METADATA) as writer:
        for length in (5, 1, 12):
            writer.write(replace(make_episode(np.random.default_rng(0), length, cameras=2), prompt=HOSTILE))
    dimensions = [{**row, "name": HOSTILE} for row in result.metrics["per_dimension"]]
    traces = tuple(replace(trace, prompt=HOSTILE) for trace in result.traces)
    tasks = {HOSTILE: (3, 4), "drawer-close": (0, 4)}
    return Report(
        title=HOSTILE,
        subtitle=HOSTILE,
        run_dir=copy_run(trained_run, folder / "run", config=f"x: '{HOSTILE}'\n"),
        dataset=EpisodeIndex.build(str(folder / "data")),
        evaluation=OpenLoopResult({**result.metrics, "per_dimension": dimensions}, traces),
        rollouts=[
            (HOSTILE, HOSTILE, write_rollout(folder / "own", tasks, HOSTILE)),
            ("reverse", "a control", write_rollout(folder / "opposite", tasks, HOSTILE, prompts="opposite")),
        ],
        facts={HOSTILE: HOSTILE, "versions": {"torch": HOSTILE}, "wall_s": {HOSTILE: 61.0, "training": 5.0}},
    )


def test_page_is_well_formed_fetches_nothing_and_shows_hostile_text_as_text(full: Report) -> None:
    text = render(full)
    page = Page(text)
    assert not re.search(r"https?://|@import|url\(", text)
    sources = [found[name] for _, found in page.elements for name in ("src", "href", "poster") if name in found]
    assert sources and all(source.startswith("data:") for source in sources)
    assert not page.all("script") and not page.all("link") and "<img src=x" not in text
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    # title, heading, subtitle, label and note (several times each), task, prompts, dimension, configuration, facts, stages
    assert page.text.count(HOSTILE) > 20


@pytest.mark.parametrize(
    ("part", "headings"),
    [
        ("title", []),
        ("rollouts", ["Success in closed loop", "Films"]),
        ("dataset", ["Data"]),
        ("run_dir", ["Training"]),
        ("evaluation", ["Open loop"]),
        ("facts", ["How it was made"]),
    ],
)
def test_only_the_parts_that_are_given_are_shown(full: Report, part: str, headings: list[str]) -> None:
    page = Page(render(Report(**{"title": "a run", part: getattr(full, part)})))
    assert page.headings == headings
    assert not re.search(r"\b(None|nan|inf)\b", page.text)


def test_picture_that_cannot_be_decoded_is_no_end_of_the_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a camera that is not trained on nobody has asked before; the run is finished by then."""
    episode = make_episode(np.random.default_rng(0), 3, cameras=2)
    with EpisodeWriter(tmp_path, METADATA) as writer:
        writer.write(episode)
    path = next(tmp_path.glob("*.parquet"))
    table = pq.read_table(path)
    spoilt = pa.array([b"x"] * 3, table["image_2_bytes"].type)
    pq.write_table(table.set_column(table.schema.get_field_index("image_2_bytes"), "image_2_bytes", spoilt), path)
    page = render(Report("t", dataset=EpisodeIndex.build(str(tmp_path))))
    assert (page.count("data:image/jpeg"), "row 0, column image_2_bytes: cannot be decoded" in caplog.text) == (3, True)


def test_rates_have_wilson_intervals_and_controls_are_marked(tmp_path: Path) -> None:
    own = write_rollout(tmp_path / "own", {"drawer-open": (18, 20), "drawer-close": (20, 20)})
    grey = write_rollout(tmp_path / "grey", {"drawer-open": (1, 10)}, image="grey")
    page = Page(render(Report("t", rollouts=[("own", "", own), ("grey", "", grey)])))
    low, high = wilson_interval(38, 40)
    assert re.search(r"95%\s*of 40 simulated episodes solved, over 2 tasks\.", page.text)
    assert f"{100 * low:.0f}\u202f% to {100 * high:.0f}\u202f% (Wilson), 38 of 40" in page.text
    low, high = wilson_interval(1, 10)
    assert {"class": "bar", "width": "10.00", "height": "10", "rx": "0.6"} in page.all("rect")
    assert (f"{100 * low:.2f}", f"{100 * high:.2f}") in [(line["x1"], line["x2"]) for line in page.all("line")]
    assert [cell["data-label"] for cell in page.all("td") if "data-label" in cell] == ["own", "grey"] * 3
    assert all(text in page.text for text in ("18/20", "20/20", "1/10", "38/40", "—", "should be low"))
    assert sum(attributes.get("class") == "rate low" for attributes in page.all("svg")) == 3  # card, one task, all tasks


def test_every_video_is_inside_the_page_once(tmp_path: Path) -> None:
    folder = write_rollout(tmp_path / "own", {"drawer-open": (1, 2), "drawer-close": (2, 2)})
    report = Report("t", rollouts=[("own", "", folder)])
    videos = Page(render(report)).all("video")
    inside = sorted(base64.b64decode(video["src"].removeprefix("data:video/mp4;base64,")) for video in videos)
    assert inside == sorted(path.read_bytes() for path in (folder / "videos").glob("*.mp4"))
    assert all({"autoplay", "muted", "loop", "playsinline", "controls"} <= video.keys() for video in videos)


def test_speed_of_the_robot_stands_beside_its_film(tmp_path: Path) -> None:
    folder = write_rollout(tmp_path / "own", {"drawer-open": (1, 1)})
    raw = json.loads((folder / "rollout.json").read_text())
    assert "cm/s, by second" not in render(Report("t", rollouts=[("own", "", folder)])), "of an earlier version"
    raw["videos"][0]["motion"] = {"control_hz": 10, "speed": [0.0, 0.0, 0.4, 0.4]}
    (folder / "rollout.json").write_text(json.dumps(raw))
    page = render(Report("t", rollouts=[("own", "", folder)]))
    assert "cm/s, by second" in page
    assert {"0", "0.1", "20", "40"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", page))  # of 0.3 s, and of 40 cm/s


def test_damaged_results_are_named_and_files_outside_their_folder_not_carried_out(tmp_path: Path) -> None:
    folder = write_rollout(tmp_path / "own", {"drawer-open": (1, 1)})
    (tmp_path / "secret").write_bytes(b"secret")
    described = folder / "rollout.json"
    described.write_text(described.read_text().replace("videos/0_True.jpg", "../secret"))
    with pytest.raises(DataError, match=r"named by rollout\.json, but it cannot be read"):
        render(Report("t", rollouts=[("own", "", folder)]))
    for content in ('{"settings": {}}', '{"settings": {}, "tasks": {}}', ""):
        described.write_text(content)
        with pytest.raises(DataError, match=r"rollout\.json: "):
            render(Report("t", rollouts=[("own", "", folder)]))


def test_metrics_cut_short_by_a_kill_are_shown_but_damaged_ones_are_not(trained_run: Path, tmp_path: Path) -> None:
    report = Report("t", run_dir=copy_run(trained_run, tmp_path / "run", ""))
    metrics = tmp_path / "run" / "metrics.jsonl"
    complete, expected = metrics.read_text(), render(report)
    metrics.write_text(complete + '{"step": 31, "train/ba')
    assert render(report) == expected
    metrics.write_text("nonsense\n" + complete)
    with pytest.raises(DataError, match=r"metrics\.jsonl: expected JSON objects with a step"):
        render(report)


def polylines(svg: str, style: str) -> list[np.ndarray]:
    found = re.findall(rf'<polyline class="{style}" points="([^"]*)"', svg)
    return [np.array([point.split(",") for point in text.split()], float) for text in found]


def test_line_chart_puts_points_where_the_axes_say_and_leaves_out_what_cannot_be_drawn() -> None:
    (points,) = polylines(line_chart([Line([0, 5, 10, 11, 12], [1.0, 3.0, 2.0, np.nan, np.inf])], "step"), "c0")
    x, y = points.T
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
    assert (y[0] - y[2]) / (y[0] - y[1]) == pytest.approx(0.5, abs=0.01)  # y grows downwards
    (points,) = polylines(line_chart([Line([0, 1, 2], [0.01, 0.1, 1.0])], "step", log=True), "c0")
    assert np.diff(points[:, 1]) == pytest.approx([np.diff(points[:, 1]).mean()] * 2, abs=0.11)
    assert line_chart([Line([0, 1], [-1.0, 0.0])], "step", log=True) == ""
    assert "circle" in line_chart([Line([7], [1.0])], "step")


def test_thinning_keeps_the_peaks_and_smoothing_the_level() -> None:
    y = np.zeros(100_000)
    y[77_777], y[12_345] = 5.0, -5.0
    x, kept = clean(Line(np.arange(len(y)), y))
    assert len(x) < 500
    assert (kept.max(), kept.min(), x[kept.argmax()]) == (5.0, -5.0, 77_777)
    np.testing.assert_allclose(smooth(np.full(300, 3.0)), 3.0)
    assert smooth([4.0, *[0.0] * 99])[0] == 4.0, "no bias at the start"


def test_ticks_are_few_and_inside() -> None:
    for low, high, log in [(0, 1, False), (-3, 17, False), (1e-5, 2e-5, False), (0.08, 0.9, True), (1e-4, 10, True)]:
        ticks, hair = Axis(low, high, 0, 100, log).ticks(), 1e-9 * (high - low)
        assert 2 <= len(ticks) <= 7 and all(low - hair <= tick <= high + hair for tick in ticks)


def test_chunks_end_where_the_episode_does() -> None:
    svg = chunk_chart(np.zeros(6), [0, 4], np.zeros((2, 4)), (-1.0, 1.0))
    ((recorded,), (first,), (second,)) = (polylines(svg, style) for style in ("true", "even", "odd"))
    assert (len(recorded), len(first), len(second)) == (6, 4, 2)
    assert second[-1, 0] == recorded[-1, 0]


def test_numbers_are_for_people() -> None:
    values = [0, 12, 12_345, 0.5, 0.01234, 123.4, 1_612_345, 2e-5, None, float("nan")]
    assert [number(value) for value in values] == ["0", "12", "12,345", "0.500", "0.0123", "123", "1.6 M", "2e-5", "—", "—"]
    assert [duration(value) for value in (2.34, 48, 800, 120, 7500)] == ["2.3 s", "48 s", "13 min 20 s", "2 min", "2 h 5 min"]
