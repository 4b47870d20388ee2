"""Run with vla-eval itself: its orchestrator plays a small benchmark. `vla_eval_benchmark.py URL OUT`.

The benchmark draws pictures and states instead of simulating; every observation and every action is written to OUT.
"""

import json
import sys
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.orchestrator import Orchestrator
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW

STEPS, EPISODES = 5, 2


class Drawn(StepBenchmark):
    """Two tasks. The server says through its observation parameters what is sent."""

    def __init__(self, out: str, send_wrist_image: bool = False, send_state: bool = False) -> None:
        super().__init__()
        self.out, self.wrist, self.state = Path(out), send_wrist_image, send_state
        self.written: dict[str, np.ndarray] = {}
        self.number = -1

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": "open the drawer", "suite": "drawn"}, {"name": "close the drawer", "suite": "drawn"}]

    def reset(self, task: dict[str, Any]) -> int:
        self.number += 1
        return 0

    def make_obs(self, raw_obs: int, task: dict[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng([self.number, raw_obs])
        images = {"agentview": rng.integers(0, 255, (40, 50, 3), np.uint8)}
        if self.wrist:
            images["wrist"] = rng.integers(0, 255, (40, 50, 3), np.uint8)
        observation: dict[str, Any] = {"images": images, "task_description": task["name"]}
        if self.state:
            observation["states"] = rng.normal(0, 0.5, 3)
            self.written[f"{self.number}/{raw_obs}/state"] = observation["states"]
        self.written.update({f"{self.number}/{raw_obs}/{name}": image for name, image in images.items()})
        self.written[f"{self.number}/{raw_obs}/prompt"] = np.array(task["name"])
        return observation

    def step(self, action: dict[str, Any]) -> StepResult:
        now = self._last_result.obs
        self.written[f"{self.number}/{now}/action"] = action["actions"]
        return StepResult(obs=now + 1, reward=0.0, done=now + 1 == STEPS, info={})

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": step_result.done}

    def get_action_spec(self) -> dict[str, Any]:
        return {"actions": RAW}

    def get_observation_spec(self) -> dict[str, Any]:
        return {"agentview": IMAGE_RGB, "wrist": IMAGE_RGB, "state": RAW, "language": LANGUAGE}

    def cleanup(self) -> None:
        np.savez(self.out, **self.written)


if __name__ == "__main__":
    url, out = sys.argv[1:]
    config = {
        "server": {"url": url},
        "output_dir": str(Path(out).parent),
        "benchmarks": [
            {"benchmark": "vla_eval_benchmark:Drawn", "episodes_per_task": EPISODES, "max_steps": STEPS, "params": {"out": out}}
        ],
    }
    results = anyio.run(Orchestrator(config, no_save=True).run)
    Path(out).with_suffix(".json").write_text(json.dumps(results), encoding="utf-8")
