"""Key names: our maps against diffusers' own converters and modules."""

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.weights.checkpoints import dit_shapes
from storymem_dist.weights.key_maps import native_dit_key, native_vae_key
from tests.helpers.golden import load_golden, strip_prefix


def test_every_full_size_dit_key_is_found_again_under_its_diffusers_name() -> None:
    native = dict.fromkeys(dit_shapes(WAN22_A14B.i2v))
    converted = convert_wan_transformer_to_diffusers(dict(zip(native, native, strict=True)))
    assert {key: native_dit_key(key) for key in converted} == converted


def test_the_diffusers_transformer_has_exactly_the_renamed_keys() -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=12, added_kv_proj_dim=None
        )
    expected = {key for key in dit_shapes(WAN22_A14B.t2v) if not key.startswith("blocks.") or key.split(".")[1] in "01"}
    assert {native_dit_key(key) for key in model.state_dict()} == expected


def test_every_vae_key_is_the_inverse_of_diffusers_conversion() -> None:
    with torch.device("meta"):
        keys = list(AutoencoderKLWan(base_dim=4).state_dict())
    native = {native_vae_key(key): key for key in keys}
    assert convert_wan_vae_to_diffusers(dict(native)) == {key: key for key in keys}
    assert set(native) == set(strip_prefix(load_golden("vae")[0], "w."))
