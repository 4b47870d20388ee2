"""Talk to a PaliGemma-VLA policy server, or any other that speaks openpi's protocol, from a robot."""

from paligemma_vla_client.broker import ActionChunkBroker
from paligemma_vla_client.chunks import ChunkQueue
from paligemma_vla_client.client import AsyncPolicyClient, PolicyClient
from paligemma_vla_client.codec import CodecError, pack, unpack
from paligemma_vla_client.errors import (
    ContractError,
    PolicyConnectionError,
    PolicyError,
    PolicyServerError,
    PolicyTimeout,
)
from paligemma_vla_client.loop import ControlLoop
from paligemma_vla_client.rate import LoopReport

__version__ = "0.1.0"
__all__ = [
    "ActionChunkBroker",
    "AsyncPolicyClient",
    "ChunkQueue",
    "CodecError",
    "ContractError",
    "ControlLoop",
    "LoopReport",
    "PolicyClient",
    "PolicyConnectionError",
    "PolicyError",
    "PolicyServerError",
    "PolicyTimeout",
    "pack",
    "unpack",
]
