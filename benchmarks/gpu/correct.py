"""Is it right on this device? Against the CPU, graphs against the model, a resumed run against one that was not interrupted,
and a run in shards of one process, through torchrun and NCCL, against one alone."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.common import Row, demo_config, write_episodes
from benchmarks.gpu.shapes import moved, random_batch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from paligemma_vla import Policy
from paligemma_vla.config import VLAConfig, config_from_dict
from paligemma_vla.data.loader import build_preprocessor
from paligemma_vla.model import graphs
from paligemma_vla.model.graphs import GraphedModel
from paligemma_vla.model.tiny import TinySpec
from paligemma_vla.model.vla_model import VLAModel
from paligemma_vla.policy import Continuation
from paligemma_vla.training.checkpoint import LAST, load_checkpoint
from paligemma_vla.training.distributed import Distributed
from paligemma_vla.training.run import begin_run, end_run
from paligemma_vla.training.trainer import Trainer

AGAINST_CPU = 2e-4  # float32 on both sides, sums in another order
AGAINST_EAGER = 1e-5
STEPS = 6


@contextmanager
def tiny_run() -> Iterator[VLAConfig]:
    """A run of the tiny model on two cameras, not yet trained. Products of float32 numbers are float32 meanwhile."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_episodes(folder / "episodes", episodes=6, length=20, side=64, cameras=2, state_dim=7, action_dim=7)
        yield demo_config(
            folder,
            TinySpec(),
            cameras=2,
            data__batch_size=8,
            training__rtc_max_delay=2,
            training__max_steps=STEPS,
            training__ema_decay=0.5,
            training__log_interval=1,
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


class WrongError(Exception):
    """What was computed is not what it should be."""


def checked(name: str, value: float, limit: float) -> Iterator[Row]:
    yield Row(name, value, "", "lower")
    if not value < limit:
        raise WrongError(f"{name}: got {value:.2e}, expected below {limit:.0e}")


def against_cpu(config: VLAConfig, device: torch.device) -> Iterator[Row]:
    """Actions and gradients of the tiny model on both sides."""
    preprocessor = build_preprocessor(config)
    models = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = VLAModel(config, preprocessor.prompts, preprocessor.image)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        models.append(model.to_device(place))
    batch = random_batch(config, model.paligemma_vlm.backbone_dict(), 4, torch.device("cpu"))
    gradients, actions = [], []
    for model in models:
        place = next(model.parameters()).device
        there = {key: moved(value, place) for key, value in batch.items()}
        output = model(**there)
        (output.loss_sum / output.valid_count).backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
        learning = ("actions_gt_seq", "action_mask", "flow_time", "flow_prefix")
        with torch.no_grad():
            actions.append(model.eval()(**{k: v for k, v in there.items() if k not in learning}).cpu())
    error = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    yield from checked("tiny model, GPU against CPU: gradients, relative", error, AGAINST_CPU)
    error = float((actions[0] - actions[1]).abs().max())
    yield from checked("tiny model, GPU against CPU: actions, absolute", error, AGAINST_CPU)


def graphed(config: VLAConfig, device: torch.device) -> Iterator[Row]:
    """What the graphs of the tiny model answer, against the model: observations, instructions, prefixes."""
    policy = Policy.from_checkpoint(config.run_dir / "checkpoints" / LAST, device=str(device))
    for parameter in policy.model.parameters():  # six steps leave the head as it began: nearly nothing
        torch.nn.init.normal_(parameter, std=0.05)
    rng = np.random.default_rng(0)
    left = rng.uniform(-1, 1, (3, 7)).astype(np.float32)

    def seen(prompt: str) -> dict[str, Any]:
        pixels = {f"image_{n}": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for n in (1, 2)}
        return {**pixels, "state": rng.uniform(-1, 1, 7), "prompt": prompt}

    asked = [
        ([seen(prompt) for prompt in prompts], None if delay is None else [Continuation(left, delay)] * len(prompts))
        for prompts in (["open the drawer"], ["push", "open the drawer", "close it"])
        for delay in (None, 1, 2)
    ]
    for fused, name in ((False, "captured"), (True, "compiled and captured")):
        by_graphs = with_graphs(policy, fused)
        difference = 0.0
        for observations, going_on in asked:
            arguments = (observations, range(len(observations)), None, going_on)
            answers = [each.infer_batch(*arguments) for each in (policy, by_graphs, by_graphs)]
            difference = max(difference, *(float(np.abs(again - answers[0]).max()) for again in answers[1:]))
        assert by_graphs.graphs is not None
        if len(by_graphs.graphs.captured) != 4 or None in by_graphs.graphs.captured.values():
            raise WrongError(f"{name}: {by_graphs.graphs.captured} was captured, expected 4 graphs; see the log above")
        yield from checked(f"tiny model, {name}: actions against the model called as ever", difference, AGAINST_EAGER)


def with_graphs(policy: Policy, fused: bool) -> Policy:
    """The policy, weights shared, answering by graphs. On a CPU a call stands for a graph, and nothing is compiled."""
    graphed = copy.copy(policy)
    prompts, cameras = policy.preprocessor.prompts, policy.config.model.vlm_config.cameras
    if policy.device.type != "cuda":
        graphs.capture = call
    graphed.graphs = GraphedModel(
        policy.model, cameras * prompts.image_tokens + prompts.max_len, fused and policy.device.type == "cuda"
    )
    return graphed


def call(run: graphs.Run, inputs: Sequence[Tensor], pool: Any) -> graphs.Replay:
    return partial(run, inputs)


def train(config: VLAConfig, device: torch.device, from_step: int = 0) -> dict[str, Any]:
    """Train in this process, from the run's checkpoint of a step; returns the last checkpoint."""
    checkpoint = config.run_dir / "checkpoints" / LAST if from_step else None
    trainer = Trainer(config, Distributed(0, 1, device), checkpoint)
    lock = begin_run(config, trainer.data, trainer.distributed, trainer.step, checkpoint)
    trainer.run()
    end_run(lock)
    return load_checkpoint(config.run_dir / "checkpoints" / LAST)


def changed(config: VLAConfig, **overrides: object) -> VLAConfig:
    keys = {f"training.{key}": value for key, value in overrides.items()}
    return config_from_dict(config.model_dump(mode="json"), keys)


def resume(config: VLAConfig, device: torch.device) -> Iterator[Row]:
    """Six steps, against three and a resume, tensor by tensor: weights, moments, average. And against six steps once more,
    which tells what the device itself does not repeat."""
    whole = train(config, device)
    train(changed(config, experiment_name="resumed", stop_after_step=STEPS // 2), device)
    resumed = train(changed(config, experiment_name="resumed"), device, STEPS // 2)
    again = train(changed(config, experiment_name="again"), device)
    for name, other in (("3 + 3 steps, resumed", resumed), ("6 steps once more", again)):
        different = differences(whole, other)
        for path, difference in list(different.items())[:5]:
            print(f"  {name}: {path} differs by {difference:.2e}", flush=True)
        yield Row(
            f"6 steps against {name}: tensors that differ in any bit", len(different), f"of {len(tensors(whole))}", "lower"
        )


def tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    kept = {part: checkpoint[part] for part in ("state_dict", "optimizer", "ema")}
    leaves, _ = tree_flatten_with_path(kept)
    return {"".join(map(str, path)): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
    """Largest difference of every tensor that is not the same bit for bit."""
    one, other = tensors(first), tensors(second)
    assert list(one) == list(other)
    return {key: float((one[key] - other[key]).abs().max()) for key in one if not torch.equal(one[key], other[key])}


def one_rank(config: VLAConfig, device: torch.device) -> Iterator[Row]:
    """The same run by a rank whose group has no other, started by torchrun, against the run without a group."""
    backend = "NCCL" if device.type == "cuda" else "gloo"
    alone = _weights(config)
    for parallel in ("ddp", "fsdp"):
        name = f"{STEPS} steps of one rank, torchrun, {parallel}, {backend}"
        ranked = changed(config, experiment_name=parallel, parallel=parallel, checkpoint_format="file")
        path = Path(config.training.checkpoint_dir) / f"{parallel}.yaml"
        path.write_text(ranked.to_yaml(), encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        began = time.perf_counter()
        done = subprocess.run(
            [*launcher, "-m", "benchmarks.gpu.one_rank", str(path), device.type],
            env={**os.environ, "NCCL_DEBUG": "INFO"},
            capture_output=True,
            text=True,
            check=False,
        )
        taken, said = time.perf_counter() - began, done.stdout + done.stderr
        if done.returncode or (device.type == "cuda" and parallel == "ddp" and "NCCL INFO" not in said):
            raise WrongError(f"{name}: exit {done.returncode}, expected 0, and NCCL's log; {said[-3000:]}")
        yield Row(f"{name}: start included", taken, "s", "lower")
        error = float((_weights(ranked) - alone).norm() / alone.norm())
        yield from checked(f"{name}: weights against a run without a group, relative", error, AGAINST_EAGER)


def _weights(config: VLAConfig) -> Tensor:
    state = load_checkpoint(config.run_dir / "checkpoints" / LAST)["state_dict"]
    return torch.cat([state[name].flatten().float() for name in sorted(state)])
