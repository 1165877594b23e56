"""LoRAs for the transformer: what a file holds, whom it is for, by how much, and adding it to rows of weights.

Read ``layouts`` (the table of names), ``scale`` (alpha, rank, rule), ``file`` (opening and checking), ``merge``
(adding), then ``settings`` and ``storymem``. Nothing here knows how base weights are stored.
"""

from storymem_dist.weights.lora.file import LoraFile, LoraModule, open_lora, open_lora_by_expert
from storymem_dist.weights.lora.layouts import expert_in_name
from storymem_dist.weights.lora.merge import ScaledLora, lora_facts, open_loras
from storymem_dist.weights.lora.scale import SCALE_RULES, scale_of
from storymem_dist.weights.lora.settings import LoraSettings, lora_list, lora_settings
from storymem_dist.weights.lora.storymem import STORYMEM_FOLDERS as STORYMEM_FOLDERS
from storymem_dist.weights.lora.storymem import STORYMEM_REPO as STORYMEM_REPO
from storymem_dist.weights.lora.storymem import storymem_lora

__all__ = [
    "SCALE_RULES",
    "LoraFile",
    "LoraModule",
    "LoraSettings",
    "ScaledLora",
    "expert_in_name",
    "lora_facts",
    "lora_list",
    "lora_settings",
    "open_lora",
    "open_lora_by_expert",
    "open_loras",
    "scale_of",
    "storymem_lora",
]
