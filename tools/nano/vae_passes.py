"""Whole-clip passes through diffusers' ``AutoencoderKLWan``: the numbers of its chunked ones, batched, with gradients.

Diffusers encodes frame 0, then groups of 4 frames with cached borders. For causal convolutions that equals one pass
over the clip, with two exceptions that are made here too: frame 0 skips every time convolution, and the decoder's time
convolutions do not see frame 0. Shapes: B batch, C channels, F frames, T latent times.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_LATENT_CHANNELS = 16


def encode(autoencoder: Any, pixels: Tensor) -> Tensor:
    """Pixels ``[B, 3, F, H, W]`` to the mean of the posterior ``[B, 16, T, h, w]``, not normalized."""
    encoder = autoencoder.encoder
    x = _conv(encoder.conv_in, pixels)
    for layer in encoder.down_blocks:
        x = _residual(layer, x) if hasattr(layer, "conv1") else _resample(layer, x)
    x = _conv(encoder.conv_out, _norm_silu(encoder.norm_out, _middle(encoder.mid_block, x)))
    last = autoencoder.quant_conv
    return F.conv3d(x, last.weight[:NUM_LATENT_CHANNELS], last.bias[:NUM_LATENT_CHANNELS])


def decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """Latents ``[B, 16, T, h, w]`` as ``encode`` returns them to pixels, without diffusers' clamp."""
    decoder, first = autoencoder.decoder, autoencoder.post_quant_conv
    x = _conv(decoder.conv_in, F.conv3d(latents, first.weight, first.bias))
    x = _middle(decoder.mid_block, x)
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = _residual(layer, x)
        if block.upsamplers is not None:
            x = _resample(block.upsamplers[0], x)
    return _conv(decoder.conv_out, _norm_silu(decoder.norm_out, x))


def channels_last(autoencoder: nn.Module) -> None:
    """Keep filters in the order of bytes in which convolutions are fast on a CPU."""
    for p in autoencoder.parameters():
        if p.ndim == 5:
            p.data = p.to(memory_format=torch.channels_last_3d)
        if p.ndim == 4 and p.shape[-1] > 1:
            p.data = p.to(memory_format=torch.channels_last)


def _rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm and SiLU of rows ``[N, C]``; fp32 inside."""
    y = x.float()
    return F.silu(y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-12) * gamma).to(x.dtype)


_rows: Callable[[Tensor, Tensor], Tensor] = _rms_norm_silu


def compile_norms() -> None:
    """Fuse norm and SiLU; they are two thirds of the time otherwise."""
    global _rows
    _rows = torch.compile(_rms_norm_silu, dynamic=True)


def _norm_silu(norm: Any, x: Tensor) -> Tensor:
    last = x.permute(0, 2, 3, 4, 1).contiguous()
    y = _rows(last.view(-1, last.shape[-1]), norm.gamma.view(-1))
    return y.view(last.shape).permute(0, 4, 1, 2, 3)


def _norm(norm: Any, x: Tensor) -> Tensor:
    scaled: Tensor = F.normalize(x, dim=1) * norm.scale * norm.gamma
    return scaled


def _conv(conv: Any, x: Tensor) -> Tensor:
    """A ``WanCausalConv3d`` on a whole clip; one frame needs the last temporal tap alone (the others see zeros)."""
    taps = conv.kernel_size[0]
    if taps == 3 and x.shape[2] == 1 and conv.stride[0] == 1:
        return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=conv._padding[0])[:, :, None]
    if taps == 1:
        return F.conv3d(x, conv.weight, conv.bias)
    padding = conv._padding
    x = F.pad(x, (0, 0, 0, 0, padding[4], 0)) if padding[4] else x
    return F.conv3d(x, conv.weight, conv.bias, stride=conv.stride, padding=(0, padding[2], padding[0]))


def _residual(block: Any, x: Tensor) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x)
    y = _conv(block.conv1, _norm_silu(block.norm1, x))
    return _conv(block.conv2, _norm_silu(block.norm2, y)) + shortcut


def _resample(layer: Any, x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    if layer.mode == "upsample3d" and t > 1:
        y = _conv(layer.time_conv, x[:, :, 1:])
        y = y.reshape(b, 2, c, t - 1, h, w).transpose(1, 2).transpose(2, 3).reshape(b, c, 2 * (t - 1), h, w)
        x = torch.cat([x[:, :, :1], y], 2)
        t = x.shape[2]
    y = x.transpose(1, 2).reshape(b * t, c, h, w)
    filters = layer.resample[1]
    if layer.mode.startswith("up"):
        y = F.conv2d(F.interpolate(y, scale_factor=2.0, mode="nearest"), filters.weight, filters.bias, padding=1)
    else:
        y = F.conv2d(F.pad(y, (0, 1, 0, 1)), filters.weight, filters.bias, stride=2)
    x = y.view(b, t, *y.shape[1:]).transpose(1, 2)
    if layer.mode == "downsample3d" and t > 1:
        late = F.conv3d(x, layer.time_conv.weight, layer.time_conv.bias, stride=(2, 1, 1))
        x = torch.cat([x[:, :, :1], late], 2)
    return x


def _attention(layer: Any, x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    y = _norm(layer.norm, x.transpose(1, 2).reshape(b * t, c, h, w))
    qkv = F.conv2d(y, layer.to_qkv.weight, layer.to_qkv.bias).flatten(2).transpose(1, 2).unsqueeze(1)
    q, k, v = qkv.chunk(3, -1)
    y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(b * t, c, h, w)
    y = F.conv2d(y, layer.proj.weight, layer.proj.bias)
    return x + y.view(b, t, c, h, w).transpose(1, 2)


def _middle(block: Any, x: Tensor) -> Tensor:
    return _residual(block.resnets[1], _attention(block.attentions[0], _residual(block.resnets[0], x)))
