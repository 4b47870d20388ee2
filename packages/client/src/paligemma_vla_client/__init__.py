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

__version__ = "0.1.0"
__all__ = [
    "ActionChunkBroker",
    "AsyncPolicyClient",
    "ChunkQueue",
    "CodecError",
    "ContractError",
    "PolicyClient",
    "PolicyConnectionError",
    "PolicyError",
    "PolicyServerError",
    "PolicyTimeout",
    "pack",
    "unpack",
]
