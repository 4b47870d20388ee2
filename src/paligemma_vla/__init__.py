"""PaliGemma-VLA: episodes in, a robot policy out.

Importing the package is light; torch is loaded when something that needs it is touched.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paligemma_vla.config import VLAConfig, load_config
    from paligemma_vla.data.loader import VLADataset
    from paligemma_vla.data.writer import EpisodeWriter
    from paligemma_vla.model import FlowmatchingActionHead, PaliGemmaVLM, VLAModel
    from paligemma_vla.policy import Policy

_EXPORTS = {
    "Policy": "paligemma_vla.policy",
    "VLAConfig": "paligemma_vla.config",
    "load_config": "paligemma_vla.config",
    "VLADataset": "paligemma_vla.data.loader",
    "EpisodeWriter": "paligemma_vla.data.writer",
    "VLAModel": "paligemma_vla.model",
    "PaliGemmaVLM": "paligemma_vla.model",
    "FlowmatchingActionHead": "paligemma_vla.model",
}
__all__ = [
    "EpisodeWriter",
    "FlowmatchingActionHead",
    "PaliGemmaVLM",
    "Policy",
    "VLAConfig",
    "VLADataset",
    "VLAModel",
    "load_config",
]
__version__ = metadata.version("paligemma-vla")


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'paligemma_vla' has no attribute '{name}'")
    quiet_libraries()
    return getattr(import_module(_EXPORTS[name]), name)


# torchao, which transformers imports where it is installed, warns of kernels for GPUs that are not here, and torch of how it
# registers its types; httpx and websockets log every request, PyOpenGL that its optional accelerator is missing.
LEVELS = {
    "torchao": logging.ERROR,
    "torch.utils._pytree": logging.ERROR,
    "httpx": logging.WARNING,
    "OpenGL.acceleratesupport": logging.WARNING,
    "websockets": logging.WARNING,
}


def quiet_libraries() -> None:
    """Silence warnings of libraries that no user can act on. Torch and transformers read theirs when first imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost connection prints a C++ stack
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of transformers, too
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)


SPIN_COUNT = "5000"
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def limit_spinning() -> None:
    """Let OpenMP threads sleep after a short wait at a barrier. Call it before torch is loaded: libgomp reads it once.

    By default they spin for milliseconds. That costs nothing on a quiet machine, but beside other programs the thread that
    spins takes the core of the thread it waits for. A user who set any of SPIN_VARIABLES has decided already.
    """
    if not any(name in os.environ for name in SPIN_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


KEPT_BYTES, LARGEST_KEPT = 2**29, 2**26
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # numbers of glibc's options


def keep_freed_memory() -> None:
    """Let glibc keep up to KEPT_BYTES that were freed, instead of giving them back and asking for them anew at each step.

    New memory comes page by page, each filled with zeros: a sixth of the time of a small model's step. Pieces larger than
    LARGEST_KEPT go back at once. A user who set GLIBC_TUNABLES has decided already; other C libraries are left alone.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "GLIBC_TUNABLES" not in os.environ:
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("paligemma-vla", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "pillow")
    return {name: metadata.version(name) for name in names}
