"""Loading: samples a second of one process, two 224 px cameras, decoding, augmentation and tokens included; and indexing."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.common import Row, best_seconds, demo_config, write_episodes
from paligemma_vla.data.episodes import EpisodeIndex
from paligemma_vla.data.loader import VLADataset, batches, build_loader
from paligemma_vla.data.sampling import RunSampler, SampleOrder
from paligemma_vla.data.statistics import compute_statistics
from paligemma_vla.model.tiny import TinySpec

BATCH, STEPS = 32, 12


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_episodes(folder / "episodes", episodes=60, length=100, side=224, cameras=2, state_dim=14, action_dim=14)
        spec = TinySpec(image_size=224, patch_size=14, width=32, vision_layers=1, text_layers=1, heads=2)
        config = demo_config(folder, spec, cameras=2, data__batch_size=BATCH)
        dataset = VLADataset(str(folder / "episodes"), str(folder / "backbone"), config, training=True)
        order = SampleOrder([len(dataset)], None, BATCH, seed=0)

        def load() -> None:
            for _ in batches(build_loader(dataset, RunSampler(order, 0, STEPS, 0, 1, 1), config, pin_memory=False)):
                pass

        rows = len(dataset)
        return [
            Row("loader, 2 cameras at 224 px", BATCH * STEPS / best_seconds(load, 3), "samples/s per process", "higher"),
            Row("index", rows / best_seconds(lambda: EpisodeIndex.build(str(folder / "episodes"))), "rows/s", "higher"),
            Row(
                "statistics, 14 + 14 dimensions",
                rows / best_seconds(lambda: compute_statistics(str(folder / "episodes"), "benchmark")),
                "rows/s",
                "higher",
            ),
        ]
