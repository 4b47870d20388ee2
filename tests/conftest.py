"""Fixtures of the whole suite: a tiny backbone, synthetic episodes, a configuration for them, and one trained run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # for the processes that tests start with more threads
os.environ.setdefault("MUTATION_SEED", time.strftime("%Y%m%d", time.gmtime()))  # see integration/test_mutations.py

import pytest

from paligemma_vla.config import VLAConfig, config_from_dict
from support import config_dict, read_rows, train_here, write_episodes
from zygote import Zygote

# Nothing here may import torch: the process that hands out tests to others would load it before they even start.
if TYPE_CHECKING:
    from paligemma_vla import Policy
    from paligemma_vla.data.loader import VLADataset
    from paligemma_vla.preprocess import Preprocessor
    from running_server import RunningServer

ConfigFactory = Callable[..., VLAConfig]
LONGEST_FIRST = ("integration", "test_benchmarks.py", "test_published.py", "training", "evaluation", "cli", "export")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start long modules first: one that began last would leave the other test processes idle."""

    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=rank)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from, or left in, the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random PaliGemma in Hugging Face format: 32 px, 4 image tokens, one layer per tower."""
    from paligemma_vla.model.tiny import TinySpec, write_tiny_paligemma

    spec = TinySpec(image_size=32, patch_size=16, vision_layers=1, text_layers=2, width=32, heads=4, vocabulary=400)
    return write_tiny_paligemma(tmp_path_factory.mktemp("model") / "tiny", spec)


@pytest.fixture(scope="session")
def episode_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One camera, episodes of uneven length over several files."""
    folder = tmp_path_factory.mktemp("episodes")
    write_episodes(folder)
    return folder


@pytest.fixture(scope="session")
def two_camera_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cameras; the second is absent in whole episodes and at single steps."""
    folder = tmp_path_factory.mktemp("two_cameras")
    write_episodes(folder, cameras=2, seed=1)
    return folder


@pytest.fixture(scope="session")
def statistics_path(tmp_path_factory: pytest.TempPathFactory, episode_dir: Path, two_camera_dir: Path) -> Path:
    from paligemma_vla.data.statistics import compute_statistics

    path = tmp_path_factory.mktemp("statistics") / "normalization_stats.json"
    compute_statistics([str(episode_dir), str(two_camera_dir)], "test").save(path)
    return path


@pytest.fixture(scope="session")
def config_parts(tiny_model_dir: Path, episode_dir: Path, two_camera_dir: Path, statistics_path: Path) -> dict[str, Path]:
    return {"model": tiny_model_dir, "one": episode_dir, "two": two_camera_dir, "statistics": statistics_path}


def _factory(parts: dict[str, Path], runs: Path) -> ConfigFactory:
    def make(overrides: dict[str, Any] | None = None, cameras: int = 1) -> VLAConfig:
        raw = config_dict(parts["model"], parts["two" if cameras == 2 else "one"], parts["statistics"], runs)
        raw["model"]["vlm_config"]["use_aux_camera"] = cameras == 2
        return config_from_dict(raw, overrides)

    return make


@pytest.fixture
def tiny_config(config_parts: dict[str, Path], tmp_path: Path) -> ConfigFactory:
    """`tiny_config({"dotted.key": value}, cameras=1)`: a checked configuration whose runs go to this test's folder."""
    return _factory(config_parts, tmp_path / "experiments")


@pytest.fixture(scope="session")
def session_config(config_parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ConfigFactory:
    """As `tiny_config`, for fixtures that live as long as the session."""
    return _factory(config_parts, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def dataset(session_config: ConfigFactory) -> VLADataset:
    """The one-camera episodes without augmentation."""
    return _dataset(session_config())


@pytest.fixture(scope="session")
def two_camera_dataset(session_config: ConfigFactory) -> VLADataset:
    return _dataset(session_config(cameras=2))


def _dataset(config: VLAConfig) -> VLADataset:
    from paligemma_vla.data.loader import VLADataset, build_preprocessor

    return VLADataset(config.data.train_parquet_files, build_preprocessor(config), config)


@pytest.fixture(scope="session")
def preprocessor(two_camera_dataset: VLADataset) -> Preprocessor:
    """Of the configuration with two cameras."""
    return two_camera_dataset.preprocessor


@pytest.fixture(scope="session")
def trained_run(session_config: ConfigFactory) -> Path:
    """Folder of a finished run: two cameras, two epochs, EMA."""
    config = session_config({"training.experiment_name": "trained", "optimizer.lr": 5e-3}, cameras=2)
    train_here(config)
    return config.run_dir


@pytest.fixture(scope="session")
def checkpoint(trained_run: Path) -> Path:
    return trained_run / "checkpoints" / "last.pth.tar"


@pytest.fixture(scope="session")
def policy(checkpoint: Path) -> Policy:
    from paligemma_vla import Policy

    return Policy.from_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as `paligemma-vla export` writes it. Not to be changed."""
    from paligemma_vla.export.folder import write_export
    from paligemma_vla.policy import Policy, load_trained

    return write_export(tmp_path_factory.mktemp("exported") / "policy", Policy(load_trained(checkpoint), "test"))


@pytest.fixture(scope="session")
def rows(two_camera_dir: Path) -> list[dict[str, Any]]:
    """Every row of `two_camera_dir`."""
    return read_rows(two_camera_dir)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Runs real commands in processes of their own, at the price of a fork. The limit spares the machine, not the tests."""
    with Zygote(memory=8 * 2**30) as started:
        yield started


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    """One without limits, for all tests of a module."""
    from running_server import RunningServer

    running = RunningServer(str(checkpoint), limited=False)
    yield running
    running.close()


@pytest.fixture
def serve(checkpoint: Path) -> Iterator[Callable[..., RunningServer]]:
    """`serve(**changes)` starts a server over the trained policy, on a free port of this machine; changes are fields of
    `ServeSettings`, or arguments of `build_service`."""
    from running_server import RunningServer

    running: list[RunningServer] = []

    def start(**changes: Any) -> RunningServer:
        running.append(RunningServer(str(checkpoint), **changes))
        return running[-1]

    yield start
    for server in running:
        server.close()
