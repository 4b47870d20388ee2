"""What several test files of evaluation look at: one open-loop result of the trained policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from paligemma_vla import Policy
from paligemma_vla.evaluation.open_loop import OpenLoopConfig, OpenLoopResult, evaluate


@pytest.fixture(scope="session")
def predictions_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("open_loop") / "predictions.parquet"


@pytest.fixture(scope="session")
def result(policy: Policy, two_camera_dir: Path, predictions_path: Path) -> OpenLoopResult:
    return evaluate(policy, str(two_camera_dir), OpenLoopConfig(batch_size=16, predictions_path=predictions_path))
