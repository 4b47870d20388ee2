"""What an import costs: a robot that asks a policy loads neither training nor a simulator."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_import_of_the_package_is_light() -> None:
    names = loaded("paligemma_vla")
    assert {name for name in names if name.startswith("paligemma_vla")} == {"paligemma_vla"}
    assert not names & {"torch", "numpy", "pydantic", "transformers"}


@pytest.mark.parametrize(
    ("module", "allowed"), [("paligemma_vla.policy", {"checkpoint"}), ("paligemma_vla.evaluation.open_loop", {"checkpoint"})]
)
def test_import_of_the_policy_loads_of_training_the_checkpoint_alone(module: str, allowed: set[str]) -> None:
    names = loaded(module)
    training = {name.rpartition(".")[2] for name in names if name.startswith("paligemma_vla.training.")}
    assert training == allowed
    assert not names & {"metaworld", "mujoco", "av", "fsspec", "pyarrow.parquet"} or "open_loop" in module
    assert not {name for name in names if name.startswith(("paligemma_vla.evaluation.envs", "paligemma_vla.export"))}


def test_import_of_the_trainer_loads_few_modules() -> None:
    names = {name for name in loaded("paligemma_vla.training.trainer") if name.startswith("paligemma_vla")}
    assert len(names) <= 42, sorted(names)
