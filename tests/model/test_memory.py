"""How much memory is left, as the system tells."""

from __future__ import annotations

import resource

import pytest

from paligemma_vla.model import memory_plan as memory


def test_available_bytes_heed_the_limit_of_the_process() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    left = memory.available_bytes()
    if left is None:
        pytest.skip("the system does not tell")
    assert 0 < left < 2**50
    taken = memory._kernel_number("/proc/self/status", "VmSize:")
    assert taken is not None
    resource.setrlimit(resource.RLIMIT_AS, (taken + left // 2, hard))
    try:
        assert memory.available_bytes() <= left // 2 + 2**26  # type: ignore[operator]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
