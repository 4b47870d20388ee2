"""A run of 10^9 steps (about 20 TB) on 256 GPUs, on paper: `python -m benchmarks.scale_plan [--set machines=64 ...]`.

Every figure is a unit cost times a count. Unit costs of the program itself are measured here (`scale_units.py`); what this
machine cannot tell (GPUs, network, store, failures) is assumed, says where it is from, and can be changed. `--again` computes
with the unit costs of the last measurement. Without `--set` the tables of docs/deploy.md are replaced.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from benchmarks.run import kind_of_processor
from benchmarks.scale_units import measure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scale_plan.json"
DOCUMENT = ROOT / "docs" / "deploy.md"
CONFIG = ROOT / "configs" / "vla_config_ddp.yaml"
MODEL = "google/paligemma-3b-pt-224"
KEYS_PER_LISTING = 1000  # of an answer to ListObjectsV2
GB, TB, HOUR = 1e9, 1e12, 3600.0


@dataclass(frozen=True)
class Assumptions:
    """What the run is, and what this machine cannot tell."""

    steps: float = 1e9
    machines: float = 32
    gpus_per_machine: float = 8
    batch_per_gpu: float = 16
    workers_per_gpu: float = 1
    file_rows: float = 10_000
    episode_rows: float = 200
    block_mb: float = 8
    window: float = 4
    gpu_flops: float = 989e12
    utilisation: float = 0.4
    store_latency_s: float = 0.03
    store_requests_per_s: float = 5500
    network_bytes_per_s: float = 3.1e9
    disk_bytes_per_s: float = 1e9
    failures_per_gpu_hour: float = 419 / (16_384 * 54 * 24)
    noticing_s: float = 30

    @property
    def gpus(self) -> float:
        return self.machines * self.gpus_per_machine

    @property
    def batch(self) -> float:
        return self.gpus * self.batch_per_gpu


SOURCES = {
    "steps": "the run",
    "machines": "the run",
    "gpus_per_machine": "the run",
    "batch_per_gpu": "samples of each GPU in a step",
    "workers_per_gpu": "loader processes",
    "episode_rows": "ten seconds at 20 Hz",
    "block_mb": "`data.stream_block_mb`; the default of 1 is for slow networks",
    "window": "`data.stream_window`",
    "file_rows": "files of 100 to 300 MB, docs/architecture.md",
    "gpu_flops": "H100 SXM, dense bfloat16: NVIDIA's data sheet",
    "utilisation": "of that, in training; 0.38 to 0.43 in Llama Team 2024, table 4",
    "store_latency_s": "a small read of an object store in the same region: tens of ms",
    "store_requests_per_s": "S3, GET and HEAD per prefix: Amazon's guidelines for performance",
    "network_bytes_per_s": "of a machine, to the store and to others: 25 Gbit/s",
    "disk_bytes_per_s": "of a shared file system, from one machine",
    "failures_per_gpu_hour": "419 unexpected interruptions in 54 days on 16,384 GPUs: Llama Team 2024, section 3.3.4",
    "noticing_s": "until a dead rank is noticed and the others have ended",
}


@dataclass(frozen=True)
class Figure:
    """One line: `value` in `unit`, as `cost` x `count` say in words."""

    part: str
    name: str
    cost: str
    count: str
    value: float
    unit: str


class Sheet:
    """Figures as they are worked out."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.part = ""

    def times(self, name: str, cost: tuple[float, str], count: tuple[float, str], unit: str, scale: float = 1) -> float:
        """A unit cost times a count; `scale` is the unit of the figure. Returns the figure unscaled."""
        value = cost[0] * count[0]
        self.put(name, f"{short(cost[0])} {cost[1]}", f"{short(count[0])} {count[1]}", value / scale, unit)
        return value

    def put(self, name: str, cost: str, count: str, value: float, unit: str) -> float:
        self.figures.append(Figure(self.part, name, cost, count, value, unit))
        return value


def short(value: float) -> str:
    """Three digits that count."""
    if value == 0 or 0.001 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:,.0f}"
    return f"{value:.2e}"


def plan(given: Assumptions, units: Mapping[str, float]) -> list[Figure]:
    """Every figure, from assumptions and unit costs alone."""
    sheet = Sheet()
    files = given.steps / given.file_rows
    memory(sheet, given, units, files)
    restart = start(sheet, given, units, files)
    step_s = train(sheet, given, units)
    blocked = save(sheet, given, units)
    fail(sheet, given, restart, step_s, blocked)
    return sheet.figures


def memory(sheet: Sheet, given: Assumptions, units: Mapping[str, float], files: float) -> None:
    sheet.part = "Data and index"
    count = (files, "files")
    sheet.times("data", (units["file_bytes"], "B a file"), count, "TB", TB)
    index = sheet.times("index, each process", (units["index_bytes_per_file"], "B a file"), count, "MB", 1e6)
    sheet.times("index cache on disk", (units["cache_bytes_per_file"], "B a file"), count, "MB", 1e6)
    blocks = (units["blocks"], "blocks")
    order = sheet.times(
        "streamed order, each training process", (units["order_bytes_per_block"], "B a block"), blocks, "MB", 1e6
    )
    cut = sheet.times("list of blocks, each process", (units["bytes_per_block"], "B a block"), blocks, "MB", 1e6)
    pool = sheet.times(
        "pictures waiting in the pool, each loader process",
        (units["block_bytes"], "B a block"),
        (units["pool_blocks"], "blocks"),
        "GB",
        GB,
    )
    loaders = given.gpus_per_machine * given.workers_per_gpu
    training = f"{short((index + order + cut) / GB)} GB x {given.gpus_per_machine:.0f} training processes"
    total = (index + order + cut) * given.gpus_per_machine + (index + cut + pool) * loaders
    sheet.put(
        "all of this, each machine",
        training,
        f"{short((index + cut + pool) / GB)} GB x {loaders:.0f} loaders",
        total / GB,
        "GB",
    )


def start(sheet: Sheet, given: Assumptions, units: Mapping[str, float], files: float) -> float:
    """Figures of starting; returns the seconds of a start from a checkpoint."""
    sheet.part = "Starting"
    count, latency = (files, "files"), given.store_latency_s
    listing = sheet.times(
        "listing, one process", (latency, "s a request"), (files / KEYS_PER_LISTING, "requests, one after the other"), "s"
    )
    asked = units["index_requests_per_file"] * latency / units["requests_at_once"]
    sheet.times("first index: waiting for the store", (asked, "s a file"), count, "s")
    sheet.times("first index: work", (units["index_s_per_file"], "s a file"), count, "s")
    sheet.times("first index: footers read", (units["index_sent_per_file"], "B a file"), count, "GB", GB)
    asked = units["cached_index_requests_per_file"] * latency / units["requests_at_once"]
    waiting = sheet.times("index from the cache: waiting, beside the listing", (asked, "s a file"), count, "s")
    work = sheet.times("index from the cache: work", (units["cached_index_s_per_file"], "s a file"), count, "s")
    index = units["index_bytes_per_file"] * files
    rounds = math.ceil(math.log2(given.gpus))
    told = sheet.times(
        "index to all processes", (index / given.network_bytes_per_s, "s a round"), (rounds, "rounds of a broadcast"), "s"
    )
    handed = sheet.times(
        "index to the loader processes", (units["hand_over_s"], "s a process"), (given.workers_per_gpu, "of each GPU"), "s"
    )
    ordered = sheet.times(
        "blocks and streamed order", (units["order_s_per_block"], "s a block"), (units["blocks"], "blocks"), "s"
    )
    imports = sheet.times("imports", (units["import_s"], "s"), (1, "on cores enough"), "s")
    met = sheet.times(
        "processes meet, at most",
        (units["meeting_s"] / units["meeting_processes"], "s a process"),
        (given.gpus, "processes"),
        "s",
    )
    weights = (units["model_bytes"] / GB, "GB by each process")
    loaded = sheet.times("backbone read and built", (units["load_s_per_gb"], "s a GB"), weights, "s")
    checkpoint = units["checkpoint_bytes"]
    part = (checkpoint / given.gpus / GB, "GB by each process")
    checked = sheet.times("checkpoint verified", (units["verify_s_per_gb"], "s a GB"), part, "s")
    read = sheet.times("checkpoint read", (units["read_s_per_gb"], "s a GB"), part, "s")
    machine = (checkpoint / given.machines / GB, "GB by each machine, twice")
    fetched = sheet.times("checkpoint from the disk", (2 * GB / given.disk_bytes_per_s, "s a GB"), machine, "s")
    first = imports + met + loaded + listing + waiting + work + told + handed + ordered
    sheet.put("a start, index in the cache", "sum of the above", "without a checkpoint", first, "s")
    return sheet.put("a restart", "the same", "with the checkpoint", first + checked + read + fetched, "s")


def train(sheet: Sheet, given: Assumptions, units: Mapping[str, float]) -> float:
    """Figures of training; returns the seconds of a step."""
    sheet.part = "Training"
    step = sheet.times(
        "step",
        (units["flops_per_sample"] / (given.gpu_flops * given.utilisation), "s a sample on a GPU"),
        (given.batch_per_gpu, "samples"),
        "s",
    )
    sheet.put("memory of a GPU, `fsdp`", "`paligemma-vla plan`", f"{short(given.gpus)} GPUs", units["planned_bytes"] / GB, "GB")
    rate = given.batch / step
    sheet.put("samples", f"{short(given.batch)} a step", f"every {short(step)} s", rate, "per s")
    sheet.times("one pass over the data", (step, "s a step"), (given.steps / given.batch, "steps"), "hours", HOUR)
    blocks = rate * units["file_bytes"] / units["file_rows"] / units["block_bytes"]
    moved = units["block_sent"] + units["opening_sent"]
    sheet.times("bytes from the store", (moved, "B a block and its file's footer"), (blocks, "blocks per s"), "MB per s", 1e6)
    asked = units["block_requests"] + units["opening_requests"]
    requests = sheet.times("requests to the store", (asked, "a block and its file"), (blocks, "blocks per s"), "per s")
    sheet.put(
        "share of what a store bears",
        f"{short(requests)} per s",
        f"of {short(given.store_requests_per_s)} per s and prefix",
        100 * requests / given.store_requests_per_s,
        "%",
    )
    each = rate / given.gpus / given.workers_per_gpu
    load = 100 * each / units["loader_rate"]
    sheet.put(
        "a loader process is busy", f"{short(1 / units['loader_rate'])} s a sample", f"{short(each)} samples per s", load, "%"
    )
    for order in ("streamed", "random"):
        seconds = units[f"{order}_batch_s"]
        share = 100 * seconds / step
        sheet.put(f"finding its samples, {order} order", f"{short(seconds)} s a batch", f"every {short(step)} s", share, "%")
    return step


def save(sheet: Sheet, given: Assumptions, units: Mapping[str, float]) -> float:
    """Figures of checkpoints; returns the seconds that training stands still for one."""
    sheet.part = "Checkpoints"
    learning = (units["learning"], "learning parameters")
    whole = sheet.times("checkpoint", (units["checkpoint_bytes"] / units["learning"], "B a parameter"), learning, "GB", GB)
    part = (whole / given.gpus / GB, "GB of each process")
    sheet.times("in shards, each process", (whole / GB, "GB"), (1 / given.gpus, "of it"), "GB")
    blocked = sheet.times("in shards: training stands still", (units["shards_blocked_s_per_gb"], "s a GB"), part, "s")
    sheet.times("in shards, behind training: work", (units["shards_behind_s_per_gb"], "s a GB"), part, "s")
    disk = GB / given.disk_bytes_per_s
    sheet.times("in shards, behind training: disk", (disk, "s a GB"), (whole / given.machines / GB, "GB of each machine"), "s")
    one = (whole / GB, "GB by rank 0")
    work = units["file_s_per_gb"] + disk
    sheet.times("in one file: training stands still", (work, "s a GB"), one, "s")
    return blocked


def fail(sheet: Sheet, given: Assumptions, restart_s: float, step_s: float, blocked_s: float) -> None:
    """Figures of failures: how often, what one costs, and how often to save (Young 1974, Daly 2006)."""
    sheet.part = "Failures"
    between = 1 / (given.failures_per_gpu_hour * given.gpus)
    rate = f"{short(given.failures_per_gpu_hour)} per GPU and hour"
    sheet.put("hours between failures", rate, f"{short(given.gpus)} GPUs", between, "hours")
    interval = math.sqrt(2 * blocked_s * between * HOUR)
    sheet.put("best time between saves", f"sqrt(2 x {short(blocked_s)} s", f"x {short(between * HOUR)} s)", interval, "s")
    sheet.times("the same in steps", (1 / step_s, "steps per s"), (interval, "s"), "steps")
    lost = given.noticing_s + restart_s + interval / 2
    words = f"{short(given.noticing_s)} s to notice + {short(restart_s)} s to restart"
    sheet.put("lost by a failure", words, f"+ {short(interval / 2)} s of steps done again", lost, "s")
    share = 100 * (blocked_s / interval + lost / (between * HOUR))
    sheet.put("lost altogether", f"{short(100 * blocked_s / interval)} % saving", "+ failures", share, "%")


def model_units(given: Assumptions) -> dict[str, float]:
    """Counted on the model of the configuration, whose every weight learns and is averaged."""
    import torch

    from paligemma_vla.config import config_from_dict, load_config
    from paligemma_vla.model.architectures import known_architecture
    from paligemma_vla.model.memory_plan import plan_memory

    changes: dict[str, Any] = {
        "data.batch_size": int(given.batch),
        "model.vlm_config.num_cameras": 2,
        "model.vlm_config.model_name_or_path": MODEL,
    }
    config, architecture = load_config(CONFIG, changes), known_architecture(MODEL)
    assert architecture is not None and config.training.ema_decay
    gpu = torch.device("cuda")
    found = plan_memory(config, architecture.to_dict(), gpu, None, int(given.gpus), follow=False)
    in_shards = config_from_dict(config.model_dump(mode="json"), {"training.parallel": "fsdp"})
    planned = plan_memory(in_shards, architecture.to_dict(), gpu, None, int(given.gpus))
    parts, head = found.parts, config.model.action_head_config
    table = architecture.text_config.vocab_size * architecture.text_config.hidden_size
    pictures = found.tokens - config.data.prompt_max_len
    passes = 6 * (4 / 3 if config.model.vlm_config.activation_checkpointing is True else 1)  # Kaplan et al. 2020; recomputation
    flops = passes * (
        parts["vision tower"].parameters * pictures
        + (parts["language model"].parameters - table) * found.tokens
        + parts["action head"].parameters * head.num_flow_samples * head.horizon
    )
    learning = sum(part.learning for part in parts.values())
    saved = sum(part.weights + part.optimizer + 4 * part.learning for part in parts.values())
    half = 2 * sum(part.parameters for name, part in parts.items() if name != "action head")
    return {
        "learning": learning,
        "checkpoint_bytes": saved,
        "flops_per_sample": flops,
        "model_bytes": half,
        "planned_bytes": planned.total,
    }


def other_benchmarks() -> dict[str, float]:
    """Unit costs that other benchmarks have measured on this machine."""
    rows = json.loads((RESULTS.parent / f"cpu_{kind_of_processor()}.json").read_text())["rows"]
    stages = json.loads((RESULTS.parent / "full_size.json").read_text())["models"]["paligemma-3b-pt-224"]
    return {
        "loader_rate": next(row["value"] for row in rows if row["name"] == "loader, 2 cameras at 224 px"),
        "load_s_per_gb": stages["head_only_training_step"]["load_s"] / stages["write"]["disk_gb"],
    }


def table(figures: Sequence[Figure]) -> str:
    """The figures as Markdown."""
    lines = ["| figure | unit cost | x count | = |", "|---|---|---|---|"]
    part = ""
    for figure in figures:
        if figure.part != part:
            part = figure.part
            lines.append(f"| **{part}** | | | |")
        lines.append(f"| {figure.name} | {figure.cost} | {figure.count} | {short(figure.value)} {figure.unit} |")
    return "\n".join(lines)


def assumption_table(given: Mapping[str, float]) -> str:
    """What is assumed, as Markdown."""
    lines = ["| assumption | value | from |", "|---|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {short(value)} | {SOURCES[name]} |" for name, value in given.items()])


def put_into_document(*tables: str) -> None:
    """Replace the tables with the same heads in docs/deploy.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for new in tables:
        begin = text.index(new.partition("\n")[0])
        text = text[:begin] + new + text[text.index("\n\n", begin) :]
    DOCUMENT.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [field.name for field in fields(Assumptions)]
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=f"an assumption: {', '.join(names)}")
    parser.add_argument("--again", action="store_true", help="with the unit costs of the last measurement")
    args = parser.parse_args()
    given = Assumptions(**{name: float(value) for name, _, value in (text.partition("=") for text in args.set)})
    if args.again:
        result = json.loads(RESULTS.read_text())
    else:
        measured = measure(
            int(given.file_rows),
            int(given.episode_rows),
            int(given.batch),
            int(given.gpus),
            given.block_mb,
            int(given.window),
            int(given.steps / given.file_rows),
        )
        load = os.getloadavg()[0]
        result = {**environment("python -m benchmarks.scale_plan"), "load": load, "units": measured}
    units = {**result["units"], **model_units(given), **other_benchmarks()}
    figures = plan(given, units)
    tables = assumption_table(asdict(given)), table(figures)
    print(*tables, sep="\n\n")
    result |= {"assumptions": asdict(given), "units": units, "figures": [asdict(each) for each in figures]}
    if not args.set:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        put_into_document(*tables)


if __name__ == "__main__":
    main()
