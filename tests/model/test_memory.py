"""The size of the head against the memory there is."""

from __future__ import annotations

import resource

import pytest
import torch

from conftest import ConfigFactory
from paligemma_vla.errors import ConfigError
from paligemma_vla.model import memory
from paligemma_vla.model.action_head.flow_matching import FlowmatchingActionHead

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
HEAD = "model.action_head_config"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with a gigabyte left, and a GPU with a tenth of one."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**8, 10**9))


@pytest.mark.parametrize(
    "overrides", [{}, {f"{HEAD}.embed_dim": 64, f"{HEAD}.num_layers": 3, f"{HEAD}.use_state_input": False}]
)
def test_head_parameters_are_those_of_the_head(tiny_config: ConfigFactory, overrides: dict[str, object]) -> None:
    config = tiny_config(overrides)
    built = FlowmatchingActionHead(config.model.action_head_config, 1, config.data.state_dim)
    assert memory.head_parameters(config) == sum(parameter.numel() for parameter in built.parameters())


def test_head_of_any_size_is_counted_without_memory(tiny_config: ConfigFactory) -> None:
    config = tiny_config({f"{HEAD}.embed_dim": 65_536, f"{HEAD}.num_layers": 100, f"{HEAD}.horizon": 1000})
    width, layers = 65_536, 100
    assert memory.head_parameters(config) == pytest.approx(layers * 25 * width**2, rel=0.01)


@pytest.mark.usefixtures("machine")
def test_head_that_cannot_be_trained_here_is_refused(tiny_config: ConfigFactory) -> None:
    memory.check_head_fits(tiny_config({f"{HEAD}.embed_dim": 1024}), CPU)  # 29 M parameters
    with pytest.raises(ConfigError) as caught:
        memory.check_head_fits(tiny_config({f"{HEAD}.embed_dim": 2048}), CPU)
    message = str(caught.value)
    assert message.startswith("model.action_head_config: embed_dim 2048, num_layers 1, mlp_ratio 4 make 12")
    assert "(16 bytes each); this machine has 1.0 GB left; lower embed_dim" in message


@pytest.mark.usefixtures("machine")
def test_head_is_held_against_the_gpus_memory_and_built_in_the_machines(tiny_config: ConfigFactory) -> None:
    memory.check_head_fits(tiny_config({f"{HEAD}.embed_dim": 256}), GPU)
    with pytest.raises(ConfigError, match=r"cuda:0 has 0\.1 GB left"):
        memory.check_head_fits(tiny_config({f"{HEAD}.embed_dim": 1024}), GPU)
    with pytest.raises(ConfigError, match=r"\(4 bytes each\); this machine"):
        memory.check_head_fits(tiny_config({f"{HEAD}.embed_dim": 4096}), GPU)


def test_available_bytes_heed_the_limit_of_the_process() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    left = memory.available_bytes()
    if left is None:
        pytest.skip("the system does not tell")
    assert 0 < left < 2**50
    taken = memory._kilobytes(memory.Path("/proc/self/status"), "VmSize:")
    assert taken is not None
    resource.setrlimit(resource.RLIMIT_AS, (taken + left // 2, hard))
    try:
        assert memory.available_bytes() <= left // 2 + 2**26  # type: ignore[operator]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
