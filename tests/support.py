"""What several test files share: synthetic episodes, a naive reader of episode files, a way to train in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from paligemma_vla.config import VLAConfig
from paligemma_vla.data.writer import EpisodeWriter
from paligemma_vla.schema import DatasetMetadata, Episode

STATE_DIM, ACTION_DIM, HORIZON, IMAGE_SIZE = 3, 2, 4, 32
# Uneven, some shorter than the horizon, one longer than a row group (32).
LENGTHS = (6, 2, 9, 40, 1, 5, 3, 7, 8, 3)
PROMPTS = ("open the drawer", "close the drawer", "push the window shut", "turn the faucet on")
METADATA = DatasetMetadata(
    robot="toy arm",
    cameras=("front", "wrist"),
    state_names=("x", "y", "z"),
    action_names=("dx", "dy"),
    control_hz=12.5,
    image_orientation="upright",
    action_convention="delta, +1 = 1 cm",
)


def encode_image(rng: np.random.Generator, kind: str = "JPEG", size: tuple[int, int] = (40, 28)) -> bytes:
    """A smooth coloured picture (width, height), different for every draw."""
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize(size, Image.Resampling.BILINEAR).save(stream, kind)
    return stream.getvalue()


def make_episode(rng: np.random.Generator, length: int, cameras: int = 1, number: int = 0) -> Episode:
    """A smooth walk; its action says where it goes next. With two cameras, the second is missing here and there."""
    action = np.sin(np.linspace(0, 3, length)[:, None] + rng.uniform(0, 6, ACTION_DIM)).astype(np.float32) * [3.0, 0.5]
    state = np.cumsum(rng.normal(size=(length, STATE_DIM)), axis=0).astype(np.float32)
    images: list[list[bytes | None]] = [[encode_image(rng) for _ in range(length)] for _ in range(cameras)]
    for extra in images[1:]:
        for step in range(length):
            if number % 3 == 1 or (number % 3 == 2 and step % 2):
                extra[step] = None
    return Episode(images, state, action.astype(np.float32), PROMPTS[number % len(PROMPTS)], is_terminal=number % 2 == 0)


def write_episodes(
    folder: Path, lengths: Sequence[int] = LENGTHS, cameras: int = 1, seed: int = 0, per_file: int = 4
) -> list[Episode]:
    """Write synthetic episodes; returns them."""
    rng = np.random.default_rng(seed)
    episodes = [make_episode(rng, length, cameras, number) for number, length in enumerate(lengths)]
    with EpisodeWriter(folder, METADATA, episodes_per_file=per_file) as writer:
        for episode in episodes:
            writer.write(episode)
    return episodes


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Every row of a folder as plain Python, in order, with `episode` (grouped by is_first alone) and `step`."""
    rows: list[dict[str, Any]] = []
    episode, step = -1, 0
    for path in sorted(folder.glob("*.parquet")):
        for number, row in enumerate(pq.read_table(path).to_pylist()):
            episode, step = (episode + 1, 0) if row["is_first"] else (episode, step + 1)
            rows.append({**row, "episode": episode, "step": step, "file": str(path), "row": number})
    return rows


def observation_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a robot would send at a row: decoded pictures of their own size, real units."""
    observation: dict[str, Any] = {"state": np.array(row["state"]), "prompt": row["prompt"]}
    for camera in (1, 2):
        if row[f"image_{camera}_bytes"] is not None:
            observation[f"image_{camera}"] = np.asarray(Image.open(io.BytesIO(row[f"image_{camera}_bytes"])))
    return observation


def config_dict(model: Path, data: Path, statistics: Path, runs: Path) -> dict[str, Any]:
    """A configuration for the tiny backbone and the synthetic episodes: seconds to train, every floor exercised."""
    return {
        "data": {
            "train_parquet_files": str(data),
            "val_fraction": 0.2,
            "normalization_stats_path": str(statistics),
            "state_dim": STATE_DIM,
            "prompt_max_len": 32,
            "batch_size": 16,
            "num_workers": 0,
        },
        "model": {
            "vlm_config": {"model_name_or_path": str(model), "dtype": "float32"},
            "action_head_config": {
                "horizon": HORIZON,
                "per_action_dim": ACTION_DIM,
                "embed_dim": 32,
                "num_layers": 1,
                "num_heads": 2,
                "num_inference_timesteps": 4,
                "num_flow_samples": 2,
            },
        },
        "training": {
            "epochs": 2,
            "log_interval": 1,
            "ema_decay": 0.9,
            "checkpoint_dir": str(runs),
            "experiment_name": "run",
        },
        "optimizer": {"lr": 1e-3},
        "lr_scheduler": {"warmup_steps": 2},
    }


def train_here(config: VLAConfig, resume: Path | None = None) -> Any:
    """Train in this process as `main_train.py` does; returns the trainer."""
    import torch

    from paligemma_vla.training.distributed import Distributed
    from paligemma_vla.training.run import begin_run, end_run
    from paligemma_vla.training.trainer import Trainer

    alone = Distributed(0, 1, torch.device("cpu"))
    trainer = Trainer(config, alone, resume)
    lock = begin_run(config, trainer.data, alone, trainer.step, resume)
    trainer.run()
    end_run(lock)
    return trainer


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what measures the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("train/samples_per_s", "train/data_wait")} for line in lines]


def identical(first: Any, second: Any) -> bool:
    """Equal to the last bit, through dictionaries and lists."""
    import torch

    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(identical(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(identical, first, second))
    return bool(first == second)


def call(capfd: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `paligemma-vla ARGUMENTS`."""
    from paligemma_vla.cli import main as cli

    capfd.readouterr()
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as ended:  # argparse
        code = int(ended.code or 0)
    printed = capfd.readouterr()
    return code, printed.out, printed.err


def checkpoint_payload(step: int) -> dict[str, Any]:
    """A small checkpoint with everything that a resume needs."""
    import torch

    from paligemma_vla.training.checkpoint import RESUME_KEYS, SPEC_KEYS

    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(40, 30, generator=generator), "a.scale": torch.tensor(2.0)}
    moments = {0: {"step": torch.tensor(float(step)), "exp_avg": torch.randn(40, 30, generator=generator)}, 3: {}}
    eight_bits = {"codes": torch.arange(256, dtype=torch.uint8), "signed": True}
    return {
        **dict.fromkeys((*SPEC_KEYS, *RESUME_KEYS), 0),
        "step": step,
        "state_dict": weights,
        "optimizer": {"state": {**moments, 4: {"exp_avg": eight_bits}}, "param_groups": [{"lr": 0.1, "params": [0, 3, 4]}]},
        "ema": {"average": {"a.weight": torch.randn(40, 30, generator=generator)}, "updates": step},
        "rng": {"torch": torch.get_rng_state()},
    }


def write_checkpoint(path: Path, payload: dict[str, Any]) -> Path:
    """Save a checkpoint of the kind that its suffix says."""
    from paligemma_vla.training.checkpoint import save_checkpoint
    from paligemma_vla.training.sharded import ShardedWriter
    from ranks import ALONE

    if path.suffix == ".dcp":
        writer = ShardedWriter(ALONE)
        writer.save(path, payload, lambda: None)
        writer.wait()
    else:
        save_checkpoint(path, payload)
    return path


def distance(first: Iterable[Any], second: Iterable[Any]) -> float:
    """Norm of the difference over all tensors together, relative to the norm of the second."""
    import torch

    pairs = [(a.detach().double().flatten(), b.detach().double().flatten()) for a, b in zip(first, second, strict=True)]
    difference = torch.cat([a - b for a, b in pairs]).norm()
    return float(difference / torch.cat([b for _, b in pairs]).norm())


def randomize(module: Any, seed: int = 0, scale: float = 0.2) -> Any:
    """Give every parameter of a head random values: adaLN-zero starts with layers at zero, which would hide everything."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module
