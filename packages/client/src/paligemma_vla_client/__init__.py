"""Talk to a PaliGemma-VLA policy server from a robot."""

from paligemma_vla_client.codec import CodecError, pack, unpack

__version__ = "0.1.0"
__all__ = ["CodecError", "pack", "unpack"]
