"""Training beside other programs: `python -m benchmarks.busy_machine [--repeats 5]`.

The train command with the settings of configs/demo.yaml, alone and beside four busy loops, each with the spin count that the
commands set and with libgomp's own (300,000). Turns are short and interleaved: what else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import environment
from benchmarks.scaling import configure
from paligemma_vla import SPIN_COUNT, SPIN_VARIABLES

RESULTS = Path(__file__).parent / "results" / "busy_machine.json"
LIBGOMP_SPIN_COUNT = "300000"
LOOPS, STEPS, WARM_UP = 4, 30, 10
COMMAND = "import sys; from paligemma_vla.cli.main import main; sys.exit(main(sys.argv[1:]))"


def loop_for_ever() -> None:
    while True:
        pass


@contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """That many processes, each of which would fill a core."""
    loops = [multiprocessing.Process(target=loop_for_ever, daemon=True) for _ in range(number)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.join()


def samples_per_second(config: Path, spin_count: str | None) -> float:
    """Of one run of the train command after its first steps. spin_count: None leaves it to the command."""
    variables = {name: value for name, value in os.environ.items() if name not in SPIN_VARIABLES}
    if spin_count is not None:
        variables["GOMP_SPINCOUNT"] = spin_count
    command = [sys.executable, "-c", COMMAND, "train", "--config_path", str(config), "--device", "cpu"]
    subprocess.run(command, env=variables, check=True, capture_output=True)
    metrics = config.parent / "runs" / "demo" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return statistics.harmonic_mean([line["train/samples_per_s"] for line in lines if line["step"] > WARM_UP])


def measure(repeats: int) -> dict[tuple[str, int], list[float]]:
    """Samples a second of each repeat by (spin count, busy loops)."""
    turns = {"command's": None, "libgomp's": LIBGOMP_SPIN_COUNT}
    rates: dict[tuple[str, int], list[float]] = {(name, loops): [] for name in turns for loops in (0, LOOPS)}
    with tempfile.TemporaryDirectory() as folder:
        config = configure(Path(folder))
        changes = {"max_steps": STEPS, "experiment_name": "demo"}
        config = config.model_copy(update={"training": config.training.model_copy(update=changes)})
        path = Path(folder, "config.yaml")
        path.write_text(config.to_yaml())
        for _ in range(repeats):
            for (name, loops), taken in rates.items():
                with busy_loops(loops):
                    taken.append(samples_per_second(path, turns[name]))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    load_before = os.getloadavg()[0]
    rates = measure(repeats)
    rows = []
    for (name, loops), taken in rates.items():
        row = {"spin_count": name, "busy_loops": loops, "samples_per_s": round(statistics.median(taken), 1), "all": taken}
        rows.append(row)
        print(f"{name} spin count, {loops} busy loops: {row['samples_per_s']} samples/s")
    command = f"python -m benchmarks.busy_machine --repeats {repeats}"
    result = {**environment(command), "spin_count": SPIN_COUNT, "load_before": load_before, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
