"""LoRAs for the transformer: what a file holds, for which expert, by how much, and adding it to rows of weights.

Read ``layouts`` (the table of names), ``scale`` (alpha, rank, rule), ``file`` (opening and checking), ``merge``
(adding), then ``settings``, ``storymem`` and ``shot`` (LoRAs of one shot, not merged). Nothing here knows how base
weights are stored.
"""

from storymem_dist.weights.lora.file import LoraFile, LoraModule, open_lora, open_lora_by_expert
from storymem_dist.weights.lora.layouts import expert_in_name
from storymem_dist.weights.lora.merge import ScaledLora, lora_facts, lora_warnings, open_loras
from storymem_dist.weights.lora.scale import SCALE_RULES, scale_of
from storymem_dist.weights.lora.settings import LoraSettings, lora_list, lora_settings
from storymem_dist.weights.lora.shot import adapter_bytes, lora_inputs, lora_key, read_adapters, shot_loras
from storymem_dist.weights.lora.storymem import STORYMEM_FOLDERS as STORYMEM_FOLDERS
from storymem_dist.weights.lora.storymem import STORYMEM_REPO as STORYMEM_REPO
from storymem_dist.weights.lora.storymem import storymem_lora

__all__ = [
    "SCALE_RULES",
    "LoraFile",
    "LoraModule",
    "LoraSettings",
    "ScaledLora",
    "adapter_bytes",
    "expert_in_name",
    "lora_facts",
    "lora_inputs",
    "lora_key",
    "lora_list",
    "lora_settings",
    "lora_warnings",
    "open_lora",
    "open_lora_by_expert",
    "open_loras",
    "read_adapters",
    "scale_of",
    "shot_loras",
    "storymem_lora",
]
