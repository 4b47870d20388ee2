"""Tensors to tensors. Nothing here imports the data."""

from paligemma_vla.model.action_head.flow_matching import FlowmatchingActionHead
from paligemma_vla.model.paligemma_vlm import PaliGemmaVLM
from paligemma_vla.model.vla_model import VLAModel

__all__ = ["FlowmatchingActionHead", "PaliGemmaVLM", "VLAModel"]
