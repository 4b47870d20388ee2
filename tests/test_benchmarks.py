"""Benchmarks that need another machine run here in the small, so that they run there."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmarks import realtime, scale_plan, tables

REPOSITORY = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_gpu_benchmark_runs_on_the_tiny_model(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    small = ("model.action_head_config.embed_dim=64", "data.batch_size=2")
    options = ["--device", "cpu", "--model", "tiny", "--repeats", "1"]
    options += [word for setting in small for word in ("--set", setting)]
    table = run("benchmarks/gpu/full_size.sh", str(output), *options)
    rows = {row["name"]: row["value"] for row in json.loads(output.read_text())["rows"]}
    for name in rows:
        assert name in table
    assert rows["tiny model, GPU against CPU: actions, absolute"] == 0.0
    assert rows["6 steps against 3 + 3 steps, resumed: tensors that differ in any bit"] == 0
    for parallel in ("ddp", "fsdp"):
        assert rows[f"6 steps of one rank, torchrun, {parallel}, gloo: weights against a run without a group, relative"] < 1e-6
    for kind in ("captured", "compiled and captured"):
        assert 0 < rows[f"tiny model, {kind}: actions against the model called as ever"] < 1e-5, "padding changes sums a little"
    for cameras in ("1 camera", "2 cameras"):
        for kind in ("eager", "captured", "compiled and captured"):
            few = rows[f"one observation, {cameras}, 10 Euler steps: {kind}"]
            for steps in ("50 Euler steps", "50 Euler steps, prefix"):
                assert rows[f"one observation, {cameras}, {steps}: {kind}"] > few
    for kind in ("head only", "LoRA", "full", "LoRA as vla_config_24gb.yaml"):
        assert rows[f"training, {kind}, batch 2, 2 cameras"] > 0
        assert rows[f"training, {kind}, batch 2, 2 cameras: planned"] > 0


def test_plan_of_a_large_run_follows_from_its_unit_costs_and_stands_in_the_document() -> None:
    result = json.loads(scale_plan.RESULTS.read_text())
    given = scale_plan.Assumptions(**result["assumptions"])
    assert given == scale_plan.Assumptions(), "the shipped plan is of the defaults"
    figures = scale_plan.plan(given, result["units"])
    assert [asdict(figure) for figure in figures] == result["figures"]
    document = (REPOSITORY / "docs" / "deploy.md").read_text()
    assert scale_plan.table(figures) in document
    assert scale_plan.assumption_table(asdict(given)) in document


def test_a_method_that_fails_more_often_says_so_in_table_and_plot() -> None:
    def episodes(solved: int) -> realtime.Episodes:
        return [{"success": number < solved, "steps": 100, "jerk": 1.0 + (number >= solved)} for number in range(20)]

    found = {
        "delays": {
            f"{method} {delay}": episodes(20 - delay * (method == "guidance"))
            for method in realtime.METHODS
            for delay in realtime.DELAYS
        },
        "seeds": {"plain 0": episodes(20), "prefix 0": episodes(18)},
    }
    summary = realtime.summarize(found)
    rows = {(row["method"], row["delay"]): row for row in summary["rows"]}
    assert rows["guidance", 12]["rate"] == pytest.approx(0.4)
    assert rows["guidance", 12]["difference"][1] < 0 < rows["blocking", 12]["difference"][1]
    assert rows["guidance", 12]["steps"] == pytest.approx((8 * 100 + 12 * realtime.LIMIT) / 20)
    assert rows["guidance", 12]["jerk_difference"][0] > 0
    assert summary["undelayed"]["prefix"] == pytest.approx(0.9)
    assert "| guidance | 12 | 0.40 |" in realtime.table(summary)
    assert realtime.overview(summary).splitlines()[5].count("[") == len(realtime.DELAYS)
    drawn = ElementTree.fromstring(realtime.plot(summary["rows"]))
    curves = [line.get("points") for line in drawn.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(curves) == 1 + len(realtime.METHODS), "a level line at 1, and a curve for each"
    assert len(set(curves[1:])) == 2, "one method is worse, the others are alike"


def test_tables_of_delays_stand_in_the_document() -> None:
    result = json.loads((scale_plan.RESULTS.parent / "realtime.json").read_text())
    document = (REPOSITORY / "docs" / "realtime.md").read_text()
    assert realtime.overview(result) in document
    assert realtime.table(result) in document
    assert (REPOSITORY / "docs" / "assets" / "delays.svg").read_text() == realtime.plot(result["rows"])


def test_table_of_corrections_stands_in_the_document() -> None:
    table = runpy.run_path(str(REPOSITORY / "examples" / "improve" / "improve.py"))["table"]
    result = json.loads((scale_plan.RESULTS.parent / "improve.json").read_text())
    assert f"```\n{table(result)}\n```" in (REPOSITORY / "docs" / "improve.md").read_text()


def test_tables_of_performance_follow_from_the_results() -> None:
    document = tables.DOCUMENT.read_text()
    assert {found[1] for found in tables.TABLE.findall(document)} == set(tables.TABLES)
    assert tables.render(document) == document


def test_figures_of_the_plan_are_those_worked_out_by_hand() -> None:
    result = json.loads(scale_plan.RESULTS.read_text())
    units = {**result["units"], "file_bytes": 2e8, "index_bytes_per_file": 4000.0, "flops_per_sample": 4e12}
    units |= {"checkpoint_bytes": 64e9, "learning": 4e9, "shards_blocked_s_per_gb": 2.0}
    given = scale_plan.Assumptions(machines=8, gpu_flops=1e14, utilisation=0.4, failures_per_gpu_hour=1e-4)
    values = {figure.name: figure.value for figure in scale_plan.plan(given, units)}
    assert values["data"] == pytest.approx(20.0)
    assert values["index, each process"] == pytest.approx(400.0)
    assert values["step"] == pytest.approx(1.6)
    assert values["samples"] == pytest.approx(64 * 16 / 1.6)
    assert values["in shards: training stands still"] == pytest.approx(2.0)
    assert values["hours between failures"] == pytest.approx(1 / 0.0064)
    assert values["best time between saves"] == pytest.approx((2 * 2.0 * 3600 / 0.0064) ** 0.5)
