"""The report's closed-loop part: headline, success table, films."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paligemma_vla.errors import DataError
from paligemma_vla.evaluation.charts import rate_bar
from paligemma_vla.evaluation.page import Html, data_url, fill, join, percent, section
from paligemma_vla.evaluation.rollout import wilson_interval

FILM_BYTES = 3_600_000  # of .mp4 in one page; base64 makes a third more of it
FILMS_PER_CONDITION = 6


@dataclass(frozen=True)
class Condition:
    """One rollout.json. `tasks` and `videos` as there; wanted_low: a control, where success would be a bad sign."""

    label: str
    note: str
    folder: Path
    tasks: dict[str, dict[str, Any]]
    videos: list[dict[str, Any]]
    wanted_low: bool

    @property
    def successes(self) -> int:
        return sum(int(entry["successes"]) for entry in self.tasks.values())

    @property
    def episodes(self) -> int:
        return sum(int(entry["episodes"]) for entry in self.tasks.values())

    @property
    def rate(self) -> float:
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.successes, self.episodes)


def read_condition(label: str, note: str, folder: Path) -> Condition:
    """Read `folder/rollout.json`; an empty label or note is told from its settings. Raises `DataError`."""
    path = Path(folder) / "rollout.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        settings, tasks, videos = raw["settings"], raw["tasks"], raw.get("videos", [])
        if not tasks or any(not entry["episodes"] for entry in tasks.values()):
            raise DataError(f"{path}: got no episodes; run `paligemma-vla rollout` again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"missing {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: cannot be read as a result of `paligemma-vla rollout` ({detail})") from error
    name, meaning, wanted_low = describe(settings)
    return Condition(label or name, note or meaning, Path(folder), tasks, videos, wanted_low)


def describe(settings: dict[str, Any]) -> tuple[str, str, bool]:
    """Name of a condition, what it controls for, and whether a low rate is what one hopes for."""
    if settings.get("policy") == "random":
        return "Random actions", "Uniformly random actions: what luck alone reaches.", True
    if settings.get("image") == "grey":
        return "Grey image", "Every picture replaced by plain grey: what is reached without looking.", True
    if settings.get("prompts") == "opposite":
        return "Opposite instruction", "Told to do the reverse: success here would mean that the words are ignored.", True
    if settings.get("prompts") == "unseen":
        return "Unseen wording", "Phrases that no demonstration used: words understood, not sentences learnt by heart.", False
    if settings.get("resets") == "stock":
        return "Stock resets", "The simulator's own start positions, not the demonstrations': does the skill carry over?", False
    return "Right instruction", "The task's own instruction, from starting points that training has not seen.", False


class Films:
    """Films put into the page so far; once FILM_BYTES are used, a still stands for a film."""

    def __init__(self) -> None:
        self.left = FILM_BYTES
        self.shown: set[Path] = set()

    def show(self, condition: Condition, video: dict[str, Any]) -> Html:
        """One film with its task, outcome and instruction. Raises `DataError` when its file is gone."""
        path, poster = (_inside(condition.folder, video[name]) for name in ("path", "poster"))
        self.shown.add(path)
        try:
            still = data_url(poster.read_bytes(), "image/jpeg")
            film = path.read_bytes() if path.stat().st_size <= self.left else b""
        except OSError as error:
            raise DataError(f"{path}: named by rollout.json, but it cannot be read ({error.strerror})") from error
        self.left -= len(film)
        task = video["task"].replace("-", " ")
        if film:
            picture = fill(
                '<video autoplay muted loop playsinline controls poster="{}" src="{}" aria-label="{}"></video>',
                still,
                data_url(film, "video/mp4"),
                f"{task}: {video['prompt']}",
            )
        else:
            picture = fill('<img src="{}" alt="{}" title="still; the film is {}">', still, task, path.name)
        outcome = Html('<span class="yes">✓ solved</span>' if video["success"] else '<span class="no">✗ not solved</span>')
        return fill(
            '<figure class="film">{}<figcaption><b>{}</b> {}<br>“{}”</figcaption></figure>',
            picture,
            task,
            outcome,
            video["prompt"],
        )


def _inside(folder: Path, name: str) -> Path:
    """A file that rollout.json names, which must lie in its folder: a page must not carry other files out."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder / 'rollout.json'}: videos: got {name}, expected a file inside {folder}")
    return path


def hero(condition: Condition, films: Films) -> Html:
    """The headline: how often it worked, and films of it working."""
    low, high = condition.interval
    tasks = len(condition.tasks)
    chosen: dict[str, dict[str, Any]] = {}
    for video in condition.videos:
        if video["success"]:
            chosen.setdefault(video["task"], video)
    wall = join(films.show(condition, video) for video in list(chosen.values())[:6])
    size = {1: "films one", 2: "films two", 4: "films two"}.get(len(chosen), "films")
    return fill(
        '<div class="{}"><div><div class="big">{}<small>%</small></div><p>of {} simulated episodes solved, '
        'over {} task{}.</p>{}<p class="range">{}</p></div>{}</div>\n',
        "hero" if chosen else "hero alone",
        f"{100 * condition.rate:.0f}",
        condition.episodes,
        tasks,
        "s" if tasks > 1 else "",
        rate_bar(condition.rate, low, high),
        f"95\u202f% interval {percent(low)} to {percent(high)} (Wilson), {condition.successes} of {condition.episodes}",
        fill('<div class="{}">{}</div>', size, wall) if chosen else Html(""),
    )


def success_section(conditions: Sequence[Condition]) -> Html:
    """A card per condition, then tasks x conditions."""
    cards = fill('<div class="cards">{}</div>', join(map(_card, conditions))) if len(conditions) > 1 else Html("")
    lead = "Bars are success rates, whiskers their 95\u202f% Wilson intervals."
    if any(condition.wanted_low for condition in conditions):
        lead += " Grey bars are controls: they should be short."
    return section("Success in closed loop", lead, join([cards, _table(conditions)]))


def _card(condition: Condition) -> Html:
    low, high = condition.interval
    return fill(
        '<div class="panel"><span class="want">{}</span><b class="name">{}</b>'
        '<div class="value">{}<small>{} of {}</small></div>{}<p class="note">{}</p></div>',
        "should be low" if condition.wanted_low else "should be high",
        condition.label,
        percent(condition.rate),
        condition.successes,
        condition.episodes,
        rate_bar(condition.rate, low, high, condition.wanted_low),
        condition.note,
    )


def _table(conditions: Sequence[Condition]) -> Html:
    tasks = list(dict.fromkeys(task for condition in conditions for task in condition.tasks))
    head = join(fill("<th>{}</th>", condition.label) for condition in conditions)
    rows = [
        fill(
            "<tr><th>{}</th>{}</tr>",
            task.replace("-", " "),
            join(_cell(condition, condition.tasks.get(task)) for condition in conditions),
        )
        for task in tasks
    ]
    if len(tasks) > 1:
        sums = [{"successes": c.successes, "episodes": c.episodes, "rate": c.rate, "ci95": c.interval} for c in conditions]
        cells = join(_cell(condition, entry) for condition, entry in zip(conditions, sums, strict=True))
        rows.append(fill('<tr class="total"><th>all tasks</th>{}</tr>', cells))
    return fill(
        '<div class="panel scroll" style="margin-top:16px"><table class="rates stack"><thead><tr><th></th>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>",
        head,
        join(rows),
    )


def _cell(condition: Condition, entry: dict[str, Any] | None) -> Html:
    if entry is None:
        return fill('<td data-label="{}">—</td>', condition.label)
    low, high = (float(bound) for bound in entry["ci95"])
    return fill(
        '<td data-label="{}" title="95\u202f% interval {} to {}"><b>{}</b><span>{}/{}</span>{}</td>',
        condition.label,
        percent(low),
        percent(high),
        percent(entry["rate"]),
        entry["successes"],
        entry["episodes"],
        rate_bar(float(entry["rate"]), low, high, condition.wanted_low),
    )


def film_section(conditions: Sequence[Condition], films: Films) -> Html:
    """The films not shown yet: the main condition's failures first, then a few of every other condition."""
    groups = []
    for condition in conditions:
        rest = [video for video in condition.videos if _inside(condition.folder, video["path"]) not in films.shown]
        rest.sort(key=lambda video: bool(video["success"]))
        if condition is not conditions[0]:
            rest = _mixed(rest)[:FILMS_PER_CONDITION]
        if rest:
            shown = join(films.show(condition, video) for video in rest)
            groups.append(
                fill('<h3>{}<small>{}</small></h3><div class="films">{}</div>', condition.label, condition.note, shown)
            )
    if not groups:
        return Html("")
    return section("Films", "Unselected: the first episodes of each outcome. Failures come first.", join(groups))


def _mixed(videos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One of each task in turn, so that a cut leaves all tasks in sight."""
    seen: dict[str, int] = {}
    order = []
    for video in videos:
        seen[video["task"]] = seen.get(video["task"], 0) + 1
        order.append(seen[video["task"]])
    return [video for _, video in sorted(zip(order, videos, strict=True), key=lambda pair: pair[0])]
