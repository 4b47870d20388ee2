"""The demonstration's model on this CPU: training throughput with its data, and one observation's answer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import Row, best_seconds, demo_config, write_episodes
from paligemma_vla.model.tiny import TinySpec
from paligemma_vla.policy import Policy
from paligemma_vla.training.distributed import join
from paligemma_vla.training.trainer import Trainer

STEPS = 30


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_episodes(folder / "episodes", episodes=24, length=80, side=64, cameras=1, state_dim=4, action_dim=4)
        config = demo_config(
            folder,
            TinySpec(),
            cameras=1,
            data__batch_size=64,
            training__max_steps=STEPS,
            training__epochs=100,
            training__log_interval=10,
        )
        trainer = Trainer(config, join("cpu"))
        trainer.run()
        lines = [line for line in (config.run_dir / "metrics.jsonl").read_text().splitlines() if "samples_per_s" in line]
        speeds = [float(line.split('"train/samples_per_s": ')[1].split(",")[0]) for line in lines]
        policy = Policy.from_checkpoint(config.run_dir / "checkpoints" / "last.pth.tar")
        observation = {
            "image_1": np.zeros((64, 64, 3), np.uint8),
            "state": np.zeros(4, np.float32),
            "prompt": "open the drawer",
        }
        answers = {n: best_seconds(lambda n=n: policy.infer(observation, seed=0, num_steps=n), 10) for n in (10, 50)}
        return [
            Row("training, demo model, batch 64", max(speeds), "samples/s", "higher"),
            *(Row(f"one observation, demo model, {n} Euler steps", s * 1000, "ms", "lower") for n, s in answers.items()),
        ]
