"""The real shapes on a CPU: PaliGemma 1 and 2 (3B), random weights in Hugging Face format, through the commands a user runs.

    python -m benchmarks.full_size [--models paligemma-3b-pt-224 paligemma2-3b-pt-224 pi0 pi05] [--work_dir D] [--output FILE]

Per model: write it; one head-only and one LoRA training step from Parquet episodes with two cameras; then `Policy` answers one
observation from each run's checkpoint. Each stage is a process of its own, so that its peak memory is its own. The head-only
step is taken again with 4 samples, 8 draws of (t, noise) a sample and 1, beside the rate of matrix products. Needs 24 GB of
memory and 30 GB of disk. pi0 and pi05: a folder as LeRobot writes it, and one observation with three cameras from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import alone, environment, write_episodes

HEADS = ("pi0", "pi05")
MODELS = ("paligemma-3b-pt-224", "paligemma2-3b-pt-224", "pi0", "pi05")
RESULTS = Path(__file__).parent / "results" / "full_size.json"
CONFIG = Path(__file__).parents[1] / "configs" / "vla_config_24gb.yaml"
STATE, ACTION, CAMERAS = 7, 7, 2
SAMPLES, REPEATS = 4, 2  # of the steps that are timed; one sample has too few rows for the full rate of products
HEAD_ONLY = {
    "model.vlm_config.lora": None,
    "model.vlm_config.freeze_vision_tower": True,
    "model.vlm_config.freeze_language_model": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="published names, or `tiny` to try the benchmark itself")
    parser.add_argument("--work_dir", type=Path, help="where the weights and checkpoints go (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    models = json.loads(args.output.read_text())["models"] if args.output.is_file() else {}
    result: dict[str, Any] = {**environment("python -m benchmarks.full_size"), "models": models}
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
            result["models"][name] = {key: result[key] for key in ("commit", "date", "hardware")} | measure(name, Path(folder))
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Every stage of one model."""
    if name in HEADS:
        return {"write": alone(write_published, name, folder), "observation": alone(answer_published, folder / "published")}
    write_episodes(folder / "episodes", episodes=2, length=16, side=224, cameras=CAMERAS, state_dim=STATE, action_dim=ACTION)
    stages: dict[str, Any] = {"write": alone(write_model, name, folder)}
    for run, overrides in (("head_only", HEAD_ONLY), ("lora", {})):
        stages[f"{run}_training_step"] = alone(train_one_step, folder, run, overrides)
        stages[f"{run}_observation"] = alone(answer, folder, run)
        shutil.rmtree(folder / "experiments")
    return stages


def write_model(name: str, folder: Path) -> dict[str, Any]:
    """Random weights of the published shapes, in bfloat16, and a processor with the published token numbers."""
    import torch
    from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS

    from paligemma_vla.model.architectures import known_architecture
    from paligemma_vla.model.tiny import make_processor, train_tokenizer, write_paligemma, write_tiny_paligemma

    architecture = known_architecture(name)
    if architecture is None:
        write_tiny_paligemma(folder / "backbone")
    else:
        side, patch = architecture.vision_config.image_size, architecture.vision_config.patch_size
        tokenizer = train_tokenizer(512, size=256_000)
        tokenizer.add_tokens(EXTRA_TOKENS)  # as Google's does: so that <image> comes after them, with its published number
        processor = make_processor(side, patch, tokenizer)
        assert processor.image_token_id == architecture.image_token_id
        write_paligemma(folder / "backbone", architecture, processor, seed=0, dtype=torch.bfloat16)
    return {"disk_gb": round(sum(path.stat().st_size for path in (folder / "backbone").iterdir()) / 1e9, 2)}


def write_published(kind: str, folder: Path) -> dict[str, Any]:
    """A random pi0 or pi0.5 of the published names and shapes, in bfloat16, as LeRobot saves it."""
    import torch
    from safetensors.torch import save_file

    from paligemma_vla.config import config_from_dict
    from paligemma_vla.model.tiny import train_tokenizer
    from paligemma_vla.model.vla_model import VLAModel
    from paligemma_vla.preprocess import ImageSpec, PromptEncoder
    from paligemma_vla.published import architecture, configuration, published_name

    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    mode = {"pi0": "MEAN_STD", "pi05": "QUANTILES"}[kind]
    raw: dict[str, Any] = {
        "type": kind,
        "input_features": {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, 224, 224]} for name in cameras},
        "output_features": {"action": {"type": "ACTION", "shape": [ACTION]}},
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": "bfloat16",
        **{"chunk_size": 50, "max_state_dim": 32, "max_action_dim": 32, "num_inference_steps": 10},
        "image_resolution": [224, 224],
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        "tokenizer_max_length": {"pi0": 48, "pi05": 200}[kind],
    }
    raw["input_features"]["observation.state"] = {"type": "STATE", "shape": [STATE]}
    tokenizer = train_tokenizer(512, size=256_000).backend_tokenizer.to_str()
    prompts = PromptEncoder(tokenizer, 2, 0, 257_152, 256, raw["tokenizer_max_length"], "truncate", kind)
    with torch.device("meta"):
        model = VLAModel(
            config_from_dict(configuration(raw)), prompts, ImageSpec(224, (0.5,) * 3, (0.5,) * 3), architecture(raw)
        )
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, value in model.state_dict().items():
        values = torch.empty(value.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        tensors[published_name(name)] = values
    output = folder / "published"
    output.mkdir()
    save_file(tensors, output / "model.safetensors")
    parts = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    numbers = {"observation.state": STATE, "action": ACTION}
    save_file(
        {f"{name}.{part}": torch.full((size,), value) for name, size in numbers.items() for part, value in parts.items()},
        output / "statistics.safetensors",
    )
    step = {"registry_name": "normalizer_processor", "config": {}, "state_file": "statistics.safetensors"}
    (output / "policy_preprocessor.json").write_text(json.dumps({"steps": [step]}))
    (output / "config.json").write_text(json.dumps(raw))
    (output / "tokenizer.json").write_text(tokenizer)
    return {"disk_gb": round(sum(path.stat().st_size for path in output.iterdir()) / 1e9, 2), "tensors": len(tensors)}


def answer_published(folder: Path) -> dict[str, Any]:
    """One observation with three cameras, at 10 Euler steps."""
    import numpy as np

    from paligemma_vla import Policy
    from paligemma_vla.model.quantize import weight_bytes

    began = time.perf_counter()
    policy = Policy.from_checkpoint(folder)
    loaded = time.perf_counter()
    rng = np.random.default_rng(0)
    observation = {f"image_{n + 1}": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for n in range(3)}
    observation |= {"state": np.zeros(STATE, np.float32), "prompt": "open the drawer"}
    seconds = []
    for _ in range(3):
        began_here = time.perf_counter()
        actions = policy.infer(observation, seed=0)["actions"]
        seconds.append(round(time.perf_counter() - began_here, 2))
        assert actions.shape == (50, ACTION) and np.isfinite(actions).all()
    size = weight_bytes(policy.model)
    return {"load_s": round(loaded - began, 1), "observation_s": seconds, "weights_gb": round(size / 1e9, 2)}


def train_one_step(folder: Path, run: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """One optimiser step on one sample, through the trainer, with the checkpoint it leaves."""
    import torch

    from paligemma_vla.config import load_config
    from paligemma_vla.data.statistics import compute_statistics
    from paligemma_vla.training.distributed import Distributed
    from paligemma_vla.training.run import begin_run, end_run
    from paligemma_vla.training.trainer import Trainer

    compute_statistics(str(folder / "episodes"), "benchmark").save(folder / "statistics.json")
    config = load_config(
        CONFIG,
        {
            "data.train_parquet_files": str(folder / "episodes"),
            "data.normalization_stats_path": str(folder / "statistics.json"),
            "data.batch_size": 1,
            "data.num_workers": 0,
            "data.val_fraction": 0.0,
            "model.vlm_config.model_name_or_path": str(folder / "backbone"),
            "training.checkpoint_dir": str(folder / "experiments"),
            "training.experiment_name": run,
            "training.stages": [],
            "training.ema_decay": 0.0,
            "training.max_steps": 1,
            **overrides,
        },
    )
    began = time.perf_counter()
    alone = Distributed(0, 1, torch.device("cpu"))
    trainer = Trainer(config, alone)
    loaded = time.perf_counter()
    lock = begin_run(config, trainer.data, alone, 0, None)
    batch = next(trainer._stream(1))
    trainer._enter_stage()
    step = trainer._train_step([batch])
    trained = time.perf_counter()
    again = {} if overrides != HEAD_ONLY else time_steps(trainer, batch)
    after = time.perf_counter()
    trainer.step = 1
    trainer._save(improved=False, last=True)
    end_run(lock)
    parameters = {name: [part.parameters, part.learning] for name, part in trainer.plan.parts.items()}
    return {
        "load_s": round(loaded - began, 1),
        "step_s": round(trained - loaded, 1),
        "save_s": round(time.perf_counter() - after, 1),
        **again,
        "loss": step.loss,
        "gradient_norm": step.norm,
        "parameters_and_learning": parameters,
        "planned_gb": round(trainer.plan.total / 1e9, 2),
    }


def time_steps(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Further steps on a batch of `SAMPLES` times the sample, with 8 draws each and with 1, in turns; their operations beside
    the rate of products."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.common import interleaved, matrix_product_flops

    def batch_of(draws: int) -> dict[str, Any]:
        drawn = {"flow_time": batch["flow_time"][:, :1].repeat(1, draws)}
        drawn["flow_noise"] = batch["flow_noise"][:, :1].repeat(1, draws, 1, 1)
        return {
            name: torch.cat([value] * SAMPLES) if isinstance(value, torch.Tensor) else value * SAMPLES
            for name, value in {**batch, **drawn}.items()
        }

    steps = {draws: partial(trainer._train_step, [batch_of(draws)]) for draws in (8, 1)}
    taken = interleaved({str(draws): step for draws, step in steps.items()}, REPEATS)
    with FlopCounterMode(display=False) as counter:
        steps[8]()
    rate = matrix_product_flops(trainer.model.dtype)
    seconds = {draws: times.median for draws, times in taken.items()}
    return {
        "step_again_s_by_draws": {draws: round(value, 3) for draws, value in seconds.items()},
        "step_tflop": round(counter.get_total_flops() / 1e12, 3),
        "products_gflop_per_s": round(rate / 1e9),
        "share_of_products": round(counter.get_total_flops() / seconds["8"] / rate, 3),
    }


def answer(folder: Path, run: str) -> dict[str, Any]:
    """One observation with two cameras, at 50 and 10 Euler steps, from the checkpoint."""
    import numpy as np

    from paligemma_vla import Policy

    began = time.perf_counter()
    policy = Policy.from_checkpoint(folder / "experiments" / run / "checkpoints" / "last.pth.tar")
    loaded = time.perf_counter()
    rng = np.random.default_rng(0)
    observation = {f"image_{n + 1}": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for n in range(CAMERAS)}
    observation |= {"state": np.zeros(STATE, np.float32), "prompt": "open the drawer"}
    seconds = {}
    for steps in (50, 10):
        began_here = time.perf_counter()
        actions = policy.infer(observation, seed=0, num_steps=steps)["actions"]
        seconds[steps] = round(time.perf_counter() - began_here, 2)
        assert actions.shape == (8, ACTION) and np.isfinite(actions).all()
    return {"load_s": round(loaded - began, 1), "observation_s_by_euler_steps": seconds}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
