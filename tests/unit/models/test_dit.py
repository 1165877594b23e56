"""The transformer reproduces the original's numbers, and diffusers' with the same weights."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from storymem_dist.errors import CheckpointError, ConfigError
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import PRESETS, TINY, WAN22_A14B
from storymem_dist.weights.key_maps import diffusers_dit_key
from tests.helpers.golden import load_golden, strip_prefix

FIXTURES = ("dit_t2v", "dit_i2v", "dit_memory_rope")
SMALL = {"dim": 48, "ffn_dim": 96, "freq_dim": 32, "num_heads": 2, "num_layers": 3, "text_dim": 20, "text_len": 12}


def golden_dit(name: str, **kwargs: Any) -> tuple[WanDiT, dict[str, Tensor], dict[str, Any]]:
    tensors, manifest = load_golden(name)
    dit = WanDiT(DiTConfig.from_json(manifest["config"]), **{"dtype": torch.float32} | kwargs)
    dit.load_state_dict(strip_prefix(tensors, "w."), strict=True)
    return dit.requires_grad_(False), tensors, manifest


def case_inputs(tensors: dict[str, Tensor], case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = strip_prefix(tensors, f"case.{case['id']}.")
    x = torch.cat([inputs["x"], inputs["y"]]) if "y" in inputs else inputs["x"]
    positions = torch.tensor(case.get("temporal_positions", range(x.shape[1])))
    return x[None], inputs["t"], inputs["context"][None], positions


def small_dit(in_dim: int = 16, **kwargs: Any) -> WanDiT:
    """Random weights, none of them zero or one (norm weights and biases included)."""
    generator = torch.Generator().manual_seed(in_dim)
    dit = WanDiT(DiTConfig(in_dim=in_dim, **SMALL), **{"dtype": torch.float32} | kwargs).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    for module in dit.modules():
        if isinstance(module, nn.RMSNorm | nn.LayerNorm):
            module.weight.add_(1)
    return dit


def small_inputs(in_dim: int = 16, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, in_dim, 3, 6, 10, generator=generator)
    context = torch.randn(batch, 5, SMALL["text_dim"], generator=generator)
    return x, torch.tensor([417, 951][:batch]), context, torch.arange(3)


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("backend", ["auto", "sdpa_math"])
def test_velocity_equals_the_original_in_every_case(name: str, backend: str) -> None:
    dit, tensors, manifest = golden_dit(name, attention_backend=backend)
    for case in manifest["cases"]:
        velocity = dit(*case_inputs(tensors, case))[0]
        torch.testing.assert_close(velocity, tensors[f"case.{case['id']}.out"], **manifest["tolerance"])


def test_memory_positions_matter() -> None:
    dit, tensors, manifest = golden_dit("dit_memory_rope")
    for case in manifest["cases"]:
        x, t, context, positions = case_inputs(tensors, case)
        contiguous = dit(x, t, context, torch.arange(len(positions)))[0]
        difference = (contiguous - tensors[f"case.{case['id']}.out"]).abs().max().item()
        assert difference == pytest.approx(case["max_abs_diff_to_contiguous"], rel=0.01)


@pytest.mark.parametrize("name", ["dit_t2v", "dit_i2v"])
def test_every_intermediate_of_the_first_case_equals_the_original(name: str) -> None:
    dit, tensors, manifest = golden_dit(name)
    case = manifest["cases"][0]
    captured: dict[str, Tensor] = {}
    named = {
        "patch_embedding": dit.patch_embedding,
        "text_embedding": dit.text_embedding,
        "time_embedding_token0": dit.time_embedding,
        "time_projection_token0": dit.time_projection,
        "block0_self_attn": dit.blocks[0].self_attn,
        "block0_cross_attn": dit.blocks[0].cross_attn,
        "block0": dit.blocks[0],
        "block1": dit.blocks[1],
        "head": dit.head,
    }
    for label, module in named.items():
        module.register_forward_hook(lambda _m, _i, out, label=label: captured.__setitem__(label, out))
    dit(*case_inputs(tensors, case))
    expected = strip_prefix(tensors, f"case.{case['id']}.dbg.")
    assert expected.keys() == captured.keys()
    for label, value in expected.items():
        if label == "patch_embedding":
            value = value.flatten(2).transpose(1, 2)
        torch.testing.assert_close(captured[label].reshape(value.shape), value, **manifest["tolerance"])


@pytest.mark.parametrize("in_dim", [16, 36])
def test_velocity_equals_diffusers_with_the_same_weights(in_dim: int) -> None:
    dit = small_dit(in_dim)
    theirs = WanTransformer3DModel(
        num_attention_heads=SMALL["num_heads"],
        attention_head_dim=SMALL["dim"] // SMALL["num_heads"],
        in_channels=in_dim,
        out_channels=16,
        text_dim=SMALL["text_dim"],
        freq_dim=SMALL["freq_dim"],
        ffn_dim=SMALL["ffn_dim"],
        num_layers=SMALL["num_layers"],
    ).requires_grad_(False)
    theirs.load_state_dict({diffusers_dit_key(key): value for key, value in dit.state_dict().items()}, strict=True)
    x, t, context, positions = small_inputs(in_dim, batch=2)
    padded = torch.nn.functional.pad(context, (0, 0, 0, SMALL["text_len"] - context.shape[1]))
    expected = theirs(x, t, padded).sample
    torch.testing.assert_close(dit(x, t, context, positions), expected, atol=1e-5, rtol=1e-5)


def test_a_batch_equals_its_members_alone() -> None:
    dit = small_dit()
    x, t, context, positions = small_inputs(batch=2)
    together = dit(x, t, context, positions)
    for i in range(2):
        alone = dit(x[i : i + 1], t[i : i + 1], context[i : i + 1], positions)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_only_differences_of_temporal_positions_matter() -> None:
    dit = small_dit()
    x, t, context, _ = small_inputs()
    positions = torch.tensor([-5, 0, 1])
    torch.testing.assert_close(dit(x, t, context, positions), dit(x, t, context, positions + 35), atol=1e-5, rtol=1e-5)


def test_short_texts_are_padded_with_zero_rows_that_are_attended_to() -> None:
    dit = small_dit()
    x, t, context, positions = small_inputs()
    zeros = torch.zeros(1, SMALL["text_len"] - context.shape[1], SMALL["text_dim"])
    padded = dit(x, t, torch.cat([context, zeros], dim=1), positions)
    assert torch.equal(dit(x, t, context, positions), padded)


@pytest.mark.parametrize(
    ("config", "num_parameters"), [(WAN22_A14B.t2v, 14_288_491_584), (WAN22_A14B.i2v, 14_288_901_184)]
)
def test_the_full_model_has_the_published_size_and_exactly_the_native_keys(
    config: DiTConfig, num_parameters: int
) -> None:
    with torch.device("meta"):
        dit = WanDiT(config)
    assert sum(parameter.numel() for parameter in dit.parameters()) == num_parameters
    assert not list(dit.buffers())
    linear = ("weight", "bias")
    expected = {f"{name}.{kind}" for name in ("patch_embedding", "time_projection.1", "head.head") for kind in linear}
    expected |= {f"{name}_embedding.{i}.{kind}" for name in ("text", "time") for i in (0, 2) for kind in linear}
    expected |= {"head.modulation"}
    for n in range(40):
        expected |= {f"blocks.{n}.modulation"}
        expected |= {f"blocks.{n}.{name}.{kind}" for name in ("norm3", "ffn.0", "ffn.2") for kind in linear}
        for attention in (f"blocks.{n}.self_attn", f"blocks.{n}.cross_attn"):
            expected |= {f"{attention}.{name}.{kind}" for name in "qkvo" for kind in linear}
            expected |= {f"{attention}.norm_{name}.weight" for name in "qk"}
    assert {key for key, _ in dit.named_parameters()} == expected


def test_the_full_model_runs_on_shapes_alone() -> None:
    with torch.device("meta"):
        dit = WanDiT(WAN22_A14B.i2v)
        velocity = dit(
            torch.empty(1, 36, 31, 60, 104),
            torch.empty(1),
            torch.empty(1, 80, 4096),
            torch.empty(31, dtype=torch.int64),
        )
    assert velocity.shape == (1, 16, 31, 60, 104)
    assert velocity.dtype == torch.float32


def test_norms_modulation_time_and_head_stay_in_fp32_next_to_bf16_matmuls() -> None:
    dit = small_dit(dtype=torch.bfloat16)
    kept = ("norm", "modulation", "time_", "head.")
    for name, parameter in dit.named_parameters():
        assert parameter.dtype == (torch.float32 if any(part in name for part in kept) else torch.bfloat16), name


def test_a_bf16_model_keeps_its_residual_stream_in_fp32_and_stays_close_to_fp32() -> None:
    exact, rounded = small_dit(), small_dit(dtype=torch.bfloat16)
    seen: list[tuple[torch.dtype, ...]] = []
    for block in rounded.blocks:
        block.register_forward_pre_hook(lambda _m, args: seen.append(tuple(arg.dtype for arg in args)))
    velocity, expected = rounded(*small_inputs()), exact(*small_inputs())
    assert seen == [(torch.float32,) * 4 + (torch.bfloat16,)] * SMALL["num_layers"]
    assert velocity.dtype == torch.float32
    assert (velocity - expected).norm() / expected.norm() < 0.02
    assert not torch.equal(velocity, expected)


def test_the_block_stack_is_one_call_whose_first_three_arguments_are_as_long_as_the_tokens() -> None:
    dit = small_dit()
    calls: list[tuple[Any, ...]] = []
    dit.blocks.register_forward_pre_hook(lambda _m, args: calls.append(args))
    dit(*small_inputs())
    ((tokens, cos, sin, modulation, context),) = calls
    num_tokens, pairs = 3 * 3 * 5, SMALL["dim"] // SMALL["num_heads"] // 2
    assert tokens.shape == (1, num_tokens, SMALL["dim"])
    assert cos.shape == sin.shape == (num_tokens, pairs)
    assert modulation.shape == (1, 6, SMALL["dim"])
    assert context.shape == (1, SMALL["text_len"], SMALL["dim"])


def test_hooks_that_permute_the_tokens_and_tables_of_the_block_stack_do_not_change_the_velocity() -> None:
    dit = small_dit()
    expected = dit(*small_inputs())
    order = torch.randperm(3 * 3 * 5, generator=torch.Generator().manual_seed(0))
    dit.blocks.register_forward_pre_hook(lambda _m, a: (a[0][:, order], a[1][order], a[2][order], *a[3:]))
    dit.blocks.register_forward_hook(lambda _m, _a, out: out[:, order.argsort()])
    torch.testing.assert_close(dit(*small_inputs()), expected, atol=1e-5, rtol=1e-5)


def test_the_attention_of_a_block_can_be_replaced() -> None:
    class Recording(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.shapes: list[torch.Size] = []

        def begin(self, v_BLNH: Tensor) -> Tensor:
            return self.inner.begin(v_BLNH)

        def forward(self, *qkv_BLNH: Tensor) -> Tensor:
            self.shapes += [x.shape for x in qkv_BLNH]
            return self.inner(*qkv_BLNH)

    dit = small_dit()
    expected = dit(*small_inputs())
    keys = set(dit.state_dict())
    for block in dit.blocks:
        block.self_attn.attend = Recording(block.self_attn.attend)
    assert torch.equal(dit(*small_inputs()), expected)
    assert set(dit.state_dict()) == keys
    assert dit.blocks[0].self_attn.attend.shapes == [(1, 45, 2, 24)] * 3


@pytest.mark.parametrize(
    ("argument", "shape", "message"),
    [
        (0, (1, 36, 3, 6, 10), r"x has shape \(1, 36, 3, 6, 10\); expected \[B, 16, T, h, w\]"),
        (0, (1, 16, 3, 5, 10), "not divisible by the patch"),
        (2, (1, 13, 20), r"expected \[B, at most 12, 20\]"),
        (2, (1, 5, 24), r"expected \[B, at most 12, 20\]"),
        (3, (4,), "expected one position for each of 3 latent frames"),
    ],
)
def test_an_input_of_the_wrong_shape_is_refused(argument: int, shape: tuple[int, ...], message: str) -> None:
    inputs = list(small_inputs())
    inputs[argument] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        small_dit()(*inputs)


def test_configurations_of_both_layouts_are_read() -> None:
    native = {
        "_class_name": "WanModel",
        "model_type": "i2v",
        "dim": 5120,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "in_dim": 36,
        "num_heads": 40,
        "num_layers": 40,
        "out_dim": 16,
        "text_len": 512,
        "eps": 1e-06,
    }
    with torch.device("meta"):
        diffusers = WanTransformer3DModel(in_channels=36, out_channels=16, num_layers=40).config
    assert DiTConfig.from_json(native) == DiTConfig.from_json(diffusers) == WAN22_A14B.i2v


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, "dim=None is not allowed; it must be a positive whole number"),
        ({"num_heads": 7}, "dim=48 with num_heads=7 is not allowed"),
        ({"num_heads": 48}, "must be an even whole number of at least 6"),
        ({"freq_dim": 31}, "freq_dim=31 is not allowed; it must be even"),
        ({"num_layers": 0}, "num_layers=0 is not allowed"),
        ({"patch_size": [1, 2]}, r"patch_size=\(1, 2\) is not allowed"),
        ({"patch_size": 2}, "patch_size=2 is not allowed"),
        ({"model_type": "ti2v"}, "model_type='ti2v' is another architecture"),
        ({"qk_norm": False}, "qk_norm=False is another architecture"),
        ({"image_dim": 1280}, "image_dim=1280 is another architecture"),
        ({"eps": "small"}, "eps='small' is not allowed; it must be a positive number"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_file_and_size(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^low_noise_model/config\.json: .*{message}"):
        DiTConfig.from_json(SMALL | {"in_dim": 16} | change, where="low_noise_model/config.json")


def test_a_configuration_without_sizes_names_what_is_missing() -> None:
    with pytest.raises(
        CheckpointError, match=r"not the configuration of a Wan2\.2 transformer; missing ffn_dim, in_dim"
    ):
        DiTConfig.from_json({key: value for key, value in SMALL.items() if key != "ffn_dim"})


def test_sizes_given_in_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="dim=50 with num_heads=4"):
        DiTConfig(**SMALL | {"in_dim": 16, "dim": 50, "num_heads": 4})


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_a_preset_fits_together(preset: Any) -> None:
    assert preset.t2v.text_dim == preset.i2v.text_dim == preset.text_encoder.dim
    assert (preset.t2v.in_dim, preset.i2v.in_dim) == (16, 36)
    assert preset.t2v.out_dim == preset.vae.z_dim == 16
    assert preset.t2v.num_heads % 4 == 0


def test_the_tiny_preset_is_tiny() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in WanDiT(TINY.i2v).parameters()) < 500_000
