"""Damaged episode files: each is used cleanly, or refused with one clear message and exit status 2.

`make test` takes 25 files that change every day, `make test-long` the same 1,000 each time. The number in a test's name is its
seed. To repeat a day's test: `MUTATION_SEED=20260131 pytest 'tests/integration/test_mutations.py::test_...[2026013117]'`.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from mutations import Mutation, mutate_parquet
from paligemma_vla.data.statistics import compute_statistics
from support import config_dict, write_episodes
from zygote import Result, Zygote

SECONDS, PEAK_BYTES, MESSAGE = 60, 1.5e9, 4000


DAILY = int(os.environ["MUTATION_SEED"])  # set by conftest.py, so that all processes of a test run agree
COMMANDS = {
    "check": ["data", "check", "mutated.parquet", "--config_path", "config.yaml"],
    "info": ["data", "info", "mutated.parquet"],
    "stats": ["stats", "--config_path", "config.yaml", "--output_path", "statistics.json"],
    "train": ["train", "--config_path", "config.yaml", "--device", "cpu", "--set", "training.max_steps=3"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound file of a few short episodes."""
    folder = tmp_path_factory.mktemp("source")
    write_episodes(folder, lengths=(6, 2, 9, 4, 1), per_file=5)
    return next(folder.glob("*.parquet"))


@pytest.fixture(scope="module")
def configuration(tiny_model_dir: Path, source: Path) -> str:
    """A run that reads every row in three steps and one validation, in the folder it is started in."""
    statistics = source.with_name("statistics.json")
    compute_statistics(str(source), "test").save(statistics)
    raw = config_dict(tiny_model_dir, source, statistics, Path("experiments"))
    raw["data"]["batch_size"] = 6
    raw["wandb"] = {"mode": "offline"}
    return yaml.safe_dump(raw, sort_keys=False).replace(str(source), "mutated.parquet")


def faults(result: Result, accepted: tuple[int, ...]) -> list[str]:
    """What a user should not have met."""
    lines = re.split(r"[\r\n]+", result.stderr.strip())
    begins = [number for number, line in enumerate(lines) if line.startswith(("error: ", "usage: "))]
    message = lines[begins[0] :] if begins else []
    checks = {
        "it hung": result.hung,
        f"status {result.status}, expected {accepted}": result.status not in accepted,
        f"{result.peak_bytes / 1e6:.0f} MB of memory": result.peak_bytes > PEAK_BYTES,
        "a traceback": "Traceback" in result.stderr,
        "an internal error": "internal error" in result.stderr,
        "a Python warning": re.search(r"\w*Warning: ", result.stderr) is not None,
        "no single message": result.status == 2 and len(begins) != 1,
        "a message that goes on for other reasons": not all(line.startswith("  ") for line in message[1:]),
        f"a message of {len(''.join(message))} characters": len("".join(message)) > MESSAGE,
        "control characters": any(not character.isprintable() for line in message for character in line),
        "an error, and yet success": result.status == 0 and bool(begins),
    }
    return [text for text, met in checks.items() if met]


def check(zygote: Zygote, mutation: Mutation, configuration: str, folder: Path) -> None:
    """Run each command on mutated input in a folder; what any of them did wrong is reported together."""
    (folder / "mutated.parquet").write_bytes(mutation.content)
    (folder / "config.yaml").write_text(configuration, encoding="utf-8")
    reports = []
    for name, command in COMMANDS.items():
        result = zygote.run(command, folder, timeout=SECONDS)
        found = faults(result, (0, 1, 2) if name == "check" else (0, 2))
        if name in mutation.refused and result.status == 0:
            found.append("it was accepted, and cannot have been used")
        if mutation.sound and result.status != 0:
            found.append("it was refused, and is sound")
        if found:
            reports.append(f"{mutation}, {name}: {'; '.join(found)}\n{result.stderr[-MESSAGE:]}")
    shutil.rmtree(folder)
    assert not reports, "\n".join(reports)


@pytest.mark.parametrize(
    "seed", [*range(100 * DAILY, 100 * DAILY + 25), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1000))]
)
def test_parquet_mutations_pass_or_are_refused(
    seed: int, zygote: Zygote, source: Path, configuration: str, tmp_path: Path
) -> None:
    check(zygote, mutate_parquet(seed, source), configuration, tmp_path)


def test_mutations_are_the_same_for_the_same_seed(source: Path) -> None:
    for seed in range(40):
        assert mutate_parquet(seed, source) == mutate_parquet(seed, source)


def test_unmutated_input_passes(zygote: Zygote, source: Path, configuration: str, tmp_path: Path) -> None:
    check(zygote, Mutation(-1, "nothing", source.read_bytes(), sound=True), configuration, tmp_path)
