"""Unit costs of a large run, measured on this machine: what one file, one block, one GB, one start cost the program itself.

`scale_plan.py` multiplies them. Files are of the size that the plan has, read from memory (page cache, /dev/shm) or from a
local object store without delay, so that disks and networks do not count: those are assumptions of the plan.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import alone, best_seconds, write_episodes

if TYPE_CHECKING:
    from paligemma_vla.data.order import Order

CAMERAS, STATE, ACTION, SIDE = 2, 14, 14, 270
LINKS = 100  # files of the local folder, hard links to one
STORED = 4  # files in the object store
PROCESSES = 4
MEMORY = Path("/dev/shm")


def measure(rows: int, episode: int, batch: int, processes: int, block_mb: float, window: int, files: int) -> dict[str, float]:
    """Every unit cost, of files of `rows` rows in episodes of `episode` rows; of the orders and the whole index at the size
    of `files` such files, for a total batch over that many processes."""
    with tempfile.TemporaryDirectory() as name, own_cache(Path(name) / "cache"):
        folder = Path(name)
        write_episodes(folder / "one", rows // episode, episode, SIDE, CAMERAS, STATE, ACTION)
        (path,) = (folder / "one").glob("*.parquet")
        units = file_units(folder, path)
        units |= alone(store_units, folder / "one", block_mb)
        shape = (path, files, batch, processes, block_mb, window)
        for stage in (random_order_units, streamed_order_units):
            units |= alone(stage, *shape)
    units |= alone(checkpoint_units)
    units |= start_units()
    return {key: value for key, value in units.items() if key not in ("wall_s", "peak_gb")}


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Nothing is found in, or left in, the user's cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def file_units(folder: Path, path: Path) -> dict[str, float]:
    """What a file is, and what indexing it costs on a disk."""
    import pyarrow.parquet as pq

    from paligemma_vla.data.index import REQUESTS, EpisodeIndex, cache_path

    many = folder / "many"
    many.mkdir()
    for number in range(LINKS):
        (many / f"episodes-{number:06d}.parquet").hardlink_to(path)
    cold, index = timed(lambda: EpisodeIndex.build(str(many)))
    cached = cache_path([str(many)]).stat().st_size
    warm = best_seconds(lambda: EpisodeIndex.build(str(many)), 3)
    metadata = pq.read_metadata(path)
    return {
        "file_bytes": path.stat().st_size,
        "file_rows": metadata.num_rows,
        "file_groups": metadata.num_row_groups,
        "index_bytes_per_file": index.nbytes / LINKS,
        "cache_bytes_per_file": cached / LINKS,
        "index_s_per_file": cold / LINKS,
        "cached_index_s_per_file": warm / LINKS,
        "requests_at_once": REQUESTS,
    }


def store_units(folder: Path, block_mb: float) -> dict[str, float]:
    """Requests and bytes of one file and of one block, counted by an object store."""
    from tests.store import Store

    from paligemma_vla.data.index import EpisodeIndex
    from paligemma_vla.data.reader import EpisodeReader, cut_blocks

    with Store("plan") as store:
        (content,) = (path.read_bytes() for path in folder.glob("*.parquet"))
        for number in range(STORED):
            store.put(f"data/episodes-{number:06d}.parquet", content)

        def counted(run: Callable[[], Any]) -> tuple[float, float, Any]:
            store.reset()
            result = run()
            return store.requests.total(), store.sent.total(), result

        place = store.url("data")
        listing, _, _ = counted(lambda: list_only(place))
        asked, sent, index = counted(lambda: EpisodeIndex.build(place))
        again, _, _ = counted(lambda: EpisodeIndex.build(place))
        blocks = cut_blocks(index, block_mb * 1e6)
        per_file = len(blocks) // STORED
        reader = EpisodeReader(index, CAMERAS, 2**30, blocks)

        def read(numbers: range) -> None:
            for block in (file * per_file + number for file in range(STORED) for number in numbers):
                reader.group_of(block // per_file, int(index.start[blocks.episodes[block]]))

        opened, opened_sent, _ = counted(lambda: read(range(1)))
        later = range(1, per_file)
        following, following_sent, _ = counted(lambda: read(later))
        reader.close()
    count = STORED * len(later)
    requests, sent_each = following / count, following_sent / count
    return {
        "index_requests_per_file": (asked - listing) / STORED,
        "index_sent_per_file": sent / STORED,
        "cached_index_requests_per_file": (again - listing) / STORED,
        "block_bytes": float(blocks.nbytes.mean()),
        "block_requests": requests,
        "block_sent": sent_each,
        "opening_requests": opened / STORED - requests,
        "opening_sent": opened_sent / STORED - float(blocks.nbytes[::per_file].mean()),
    }


def list_only(place: str) -> list[str]:
    from paligemma_vla.data.index import expand_paths

    return expand_paths(place, "benchmark")


def whole_index(path: Path, files: int) -> Any:
    """The index of the whole data set, as if it were `files` copies of a file: its arrays, and names of the usual length."""
    import numpy as np

    from paligemma_vla.data.index import EpisodeIndex

    one = EpisodeIndex.build(str(path))
    names = tuple(f"s3://bucket/data/part-{number // 1000:04d}/episodes-{number:06d}.parquet" for number in range(files))
    return EpisodeIndex(
        paths=names,
        layout=one.layout,
        file=np.repeat(np.arange(files, dtype=np.int32), len(one)),
        start=np.tile(one.start, files),
        length=np.tile(one.length, files),
        groups=np.tile(one.groups, files),
        group_offsets=np.arange(files + 1, dtype=np.int64) * len(one.groups),
        stamps=np.tile(one.stamps, (files, 1)),
        digests=np.tile(one.digests, files),
    )


def random_order_units(path: Path, files: int, batch: int, processes: int, block_mb: float, window: int) -> dict[str, float]:
    """The index as a whole, what it takes to hand it to a loader process, and a batch of the random order."""
    from paligemma_vla.data.order import SampleOrder

    index = whole_index(path, files)
    pickled_s, pickled = timed(lambda: ForkingPickler.dumps(index))
    unpickled_s, _ = timed(lambda: ForkingPickler.loads(pickled))
    order = SampleOrder([index.steps], None, batch, 0)
    return {
        "whole_index_bytes": index.nbytes,
        "hand_over_s": pickled_s + unpickled_s,
        "random_batch_s": drawn(order, processes),
    }


def streamed_order_units(path: Path, files: int, batch: int, processes: int, block_mb: float, window: int) -> dict[str, float]:
    """The blocks of the whole data set and the streamed order over them: seconds, bytes kept, and a batch."""
    from paligemma_vla.data.loader import AHEAD
    from paligemma_vla.data.order import StreamedOrder
    from paligemma_vla.data.reader import cut_blocks, streaming_cache_bytes

    index = whole_index(path, files)
    seconds, blocks = timed(lambda: cut_blocks(index, block_mb * 1e6))
    made, order = timed(lambda: StreamedOrder([blocks.sizes], None, batch, 0, window))
    first, _ = timed(lambda: order.batch(order.steps_per_epoch // 2))
    lines = order._line(0)
    kept = sum(array.nbytes for array in order.blocks) + 2 * sum(array.nbytes for array in lines)
    return {
        "blocks": len(blocks),
        "bytes_per_block": (blocks.episodes.nbytes + blocks.samples.nbytes + blocks.nbytes.nbytes) / len(blocks),
        "pool_blocks": streaming_cache_bytes(blocks, -(-batch // processes), window, AHEAD) / float(blocks.nbytes.mean()),
        "order_bytes_per_block": kept / len(blocks),
        "order_s_per_block": (2 * seconds + made + first) / len(blocks),  # cut for the order and for the reader
        "streamed_batch_s": drawn(order, processes),
    }


def drawn(order: Order, processes: int) -> float:
    """Seconds of one process to find its part of a batch."""
    from paligemma_vla.data.order import RunSampler

    middle = order.steps_per_epoch // 2
    return best_seconds(lambda: next(iter(RunSampler(order, middle, middle + 1, 0, processes, 1))), 5)


def checkpoint_units() -> dict[str, float]:
    """Seconds per GB of writing, hashing and reading a checkpoint, in shards and as a file, in memory."""
    import torch

    from paligemma_vla.storage import sha256
    from paligemma_vla.training.checkpoint import IN_SHARDS, read_checkpoint, save_checkpoint, verify_checkpoint
    from paligemma_vla.training.distributed import Distributed
    from paligemma_vla.training.sharded import ShardedWriter

    torch.manual_seed(0)
    weights = {f"layer_{number}": torch.randn(2048, 2048) for number in range(64)}
    gigabytes = sum(tensor.nbytes for tensor in weights.values()) / 1e9
    payload = {"state_dict": weights, "optimizer": {}, "ema": None, "step": 1}
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        shards, file = Path(name) / "shards.dcp", Path(name) / "file.pth.tar"
        writer = ShardedWriter(Distributed(0, 1, torch.device("cpu")))
        blocked, _ = timed(lambda: writer.save(shards, payload, lambda: None))
        behind, _ = timed(writer.wait)
        hashed = sum(timed(lambda path=path: sha256(path))[0] for path in shards.glob("*.safetensors"))  # type: ignore[misc]
        verified, _ = timed(lambda: verify_checkpoint(shards))
        read, _ = timed(lambda: read_checkpoint(shards, IN_SHARDS))
        written, _ = timed(lambda: save_checkpoint(file, payload))
    seconds = {
        "shards_blocked_s_per_gb": blocked,
        "shards_behind_s_per_gb": behind,
        "hash_s_per_gb": hashed,
        "verify_s_per_gb": verified,
        "read_s_per_gb": read,
        "file_s_per_gb": written,
    }
    return {key: value / gigabytes for key, value in seconds.items()}


def start_units() -> dict[str, float]:
    """Imports of a training process, and the meeting of a few, without the imports."""
    imports = best_seconds(lambda: run("import paligemma_vla.cli.train, paligemma_vla.training.trainer"), 3)
    code = "import sys; from benchmarks.scale_units import meet; sys.exit(meet())"
    return {"import_s": imports, "meeting_s": min(float(run(code)) for _ in range(3)), "meeting_processes": PROCESSES}


def run(code: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout


def meet() -> int:
    """Print the seconds that processes of the elastic launcher take from the first line of theirs to a sum over all."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(1, 1, PROCESSES, run_id="meeting", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    seconds = elastic_launch(config, join_and_sum)()
    print(max(seconds.values()))
    return 0


def join_and_sum() -> float:
    import torch

    from paligemma_vla.training.distributed import join

    torch.set_num_threads(1)
    began = time.perf_counter()
    distributed = join("cpu")
    distributed.all_reduce(torch.ones(1))
    seconds = time.perf_counter() - began
    distributed.close()
    return seconds
