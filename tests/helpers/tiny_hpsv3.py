"""HPSv3 in small: random weights in the formats of the published files, and a package that has an instruction."""

import hashlib
import json
import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from storymem_dist.weights.safetensors_file import write_safetensors

# The layout of the published repositories, written out here so that the loader is not tested against itself.
WEIGHTS_NAME, BASE_NAME = "HPSv3.safetensors", "Qwen2-VL-7B-Instruct"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
HIDDEN, LAYERS, DEPTH, VISION = 64, 2, 2, 32
VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Bytes and special tokens; the reward token is added by whoever loads the tokenizer."""

PACKAGE_SOURCE = '''"""A module that cannot be imported."""

import a_package_that_nobody_has

INSTRUCTION = """
Rate this picture from 0 to 10: is it sharp, is it "plausible", does it show {text_prompt}?
"""

prompt_with_special_token = """
Your rating: <|Reward|>

END
"""
'''

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You answer briefly.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_hpsv3(root: Path, seed: int = 0) -> Path:
    """Write weights and base files to the new folder ``root``, as a download of both repositories does."""
    base = root / BASE_NAME
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(_config(), indent=1))
    (base / "preprocessor_config.json").write_text(json.dumps(_image_processor(), indent=1))
    (base / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    _write_tokenizer(base)
    shapes = weight_shapes()
    with write_safetensors(root / WEIGHTS_NAME, {key: (torch.float32, shape) for key, shape in shapes.items()}) as file:
        for key, shape in shapes.items():
            file.write(key, _random_weight(seed, key, shape))
    return root


def write_package(site: Path, source: str = PACKAGE_SOURCE) -> Path:
    """Write an installed package ``hpsv3`` whose module has ``source`` to ``site``, a folder for ``sys.path``."""
    module, facts = Path("hpsv3/dataset/data_collator_qwen.py"), site / "hpsv3-1.0.0.dist-info"
    (site / module).parent.mkdir(parents=True)
    (site / module).write_text(source)
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: hpsv3\nVersion: 1.0.0\n")
    (facts / "RECORD").write_text(f"{module.as_posix()},,\nhpsv3-1.0.0.dist-info/METADATA,,\n")
    return site


def weight_shapes() -> dict[str, torch.Size]:
    """Names and shapes of all weights, as the class of transformers 4.45 with the package's head has them."""
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (VISION, 3, 2, 14, 14)}
    for number in range(DEPTH):
        block = f"visual.blocks.{number}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (VISION,), f"{block}.{norm}.bias": (VISION,)}
        shapes |= _linear(f"{block}.attn.qkv", VISION, 3 * VISION) | _linear(f"{block}.attn.proj", VISION, VISION)
        shapes |= _linear(f"{block}.mlp.fc1", VISION, 4 * VISION) | _linear(f"{block}.mlp.fc2", 4 * VISION, VISION)
    shapes |= {"visual.merger.ln_q.weight": (VISION,), "visual.merger.ln_q.bias": (VISION,)}
    shapes |= _linear("visual.merger.mlp.0", 4 * VISION, 4 * VISION)
    shapes |= _linear("visual.merger.mlp.2", 4 * VISION, HIDDEN)
    shapes["model.embed_tokens.weight"] = (VOCABULARY + 1, HIDDEN)
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        shapes |= _linear(f"{layer}.self_attn.q_proj", HIDDEN, HIDDEN)
        shapes |= _linear(f"{layer}.self_attn.k_proj", HIDDEN, HIDDEN // 2)
        shapes |= _linear(f"{layer}.self_attn.v_proj", HIDDEN, HIDDEN // 2)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (2 * HIDDEN, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, 2 * HIDDEN)
        shapes |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY + 1, HIDDEN)}
    shapes |= _linear("rm_head.0", HIDDEN, 1024) | _linear("rm_head.3", 1024, 16) | _linear("rm_head.5", 16, 2)
    return {key: torch.Size(shape) for key, shape in shapes.items()}


def _linear(name: str, num_in: int, num_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}


def _random_weight(seed: int, key: str, shape: torch.Size) -> Tensor:
    """Scaled so that a score depends on every part: picture, text and places of tokens."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))
    if len(shape) == 1:
        return values * 0.1 + (1.0 if re.search(r"norm\w*\.weight|ln_q\.weight", key) else 0.0)
    if "embed_tokens" in key:
        return values
    gain = 2.0 if re.search(r"rm_head|[qk]_proj|qkv", key) else 1.0
    return values * gain * shape[1:].numel() ** -0.5


def _config() -> dict[str, object]:
    """The keys of the published ``config.json``, with other numbers."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "vision_start_token_id": 259,
        "vision_end_token_id": 260,
        "vision_token_id": 261,
        "image_token_id": 261,
        "video_token_id": 400,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": 2 * HIDDEN,
        "max_position_embeddings": 32768,
        "max_window_layers": LAYERS,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": DEPTH,
            "embed_dim": VISION,
            "mlp_ratio": 4,
            "num_heads": 2,
            "in_chans": 3,
            "hidden_size": HIDDEN,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": VOCABULARY + 50,
    }


def _image_processor() -> dict[str, object]:
    return {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes in the files of Qwen2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 32768,
        "add_prefix_space": False,
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
