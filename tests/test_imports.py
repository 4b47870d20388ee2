"""What an import costs: a robot that asks a policy loads neither training nor a simulator."""

from __future__ import annotations

import subprocess
import sys


def loaded(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_import_of_the_package_is_light() -> None:
    names = loaded("paligemma_vla")
    assert {name for name in names if name.startswith("paligemma_vla")} == {"paligemma_vla"}
    assert not names & {"torch", "numpy", "pydantic", "transformers"}


def test_help_and_a_wrong_flag_are_quick() -> None:
    names = loaded("paligemma_vla.cli.main, paligemma_vla.cli.train, paligemma_vla.config")
    assert not names & {"torch", "transformers"}


def test_import_of_the_policy_loads_neither_training_nor_a_simulator() -> None:
    names = loaded("paligemma_vla.policy")
    training = {name for name in names if name.startswith("paligemma_vla.training")}
    assert training == {"paligemma_vla.training", "paligemma_vla.training.checkpoint"}
    assert not names & {"paligemma_vla.data", "paligemma_vla.evaluation", "paligemma_vla.export", "metaworld", "mujoco", "av"}


def test_import_of_the_trainer_loads_few_modules() -> None:
    assert len([name for name in loaded("paligemma_vla.training.trainer") if name.startswith("paligemma_vla")]) <= 45
