"""The one command that makes nano's weights, at its smallest: it ends with a model that renders, also after kill -9."""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from storymem_dist.models.wan.vae import WanVae
from storymem_dist.weights.packed import read_packed
from tools.nano import vae_passes, world
from tools.nano.__main__ import main

SMALL = (
    "--vae-steps=2",
    "--vae-base-dim=4",
    "--shards=1",
    *("--clips", "2", "1", "1"),
    "--dit-steps=16",
    *("--batch=2", "--dim=48", "--ffn-dim=32", "--heads=2", "--layers=1"),
    "--no-compile",
    "--save-every=0",
)


def arguments(work: Path, *more: str) -> list[str]:
    return ["--work", str(work), "--out", str(work / "nano.safetensors"), *SMALL, *more]


def run_until(state: Path, work: Path) -> None:
    """Start the command in a process of its own and kill it once ``state`` is there."""
    process = multiprocessing.get_context("fork").Process(target=main, args=(arguments(work, "--judged=0"),))
    process.start()
    deadline = time.monotonic() + 200
    while not state.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert state.exists() and process.exitcode == -9, "it was killed in the middle"


@pytest.mark.timeout(900)  # a minute of one core
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(arguments(whole, "--judged=1", "--judged-steps=2"))
    shown = capsys.readouterr().out
    assert '"first shot"' in shown and '"remembered"' in shown, "the judge saw what came out"

    run_until(killed / "vae.pt", killed)
    run_until(killed / "dit.pt", killed)
    step = torch.load(killed / "dit.pt", weights_only=True)["step"]
    assert 0 < step < 16, "the transformer was in training"
    assert not (killed / "nano.safetensors").exists()
    main(arguments(killed, "--judged=0"))
    assert (killed / "nano.safetensors").read_bytes() == (whole / "nano.safetensors").read_bytes()

    packed = read_packed(whole / "nano.safetensors")
    assert packed.config.num_layers == 1 and packed.config.in_dim == 36
    assert all(value.isfinite().all() for value in (*packed.dit.values(), *packed.vae.values()))


@torch.no_grad()
def test_whole_clip_passes_are_those_of_the_renderer() -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderKLWan(base_dim=4, z_dim=16).eval()
    vae = WanVae(autoencoder)
    pixels, _ = world.render(world.sample_clips(1, torch.Generator().manual_seed(1)), height=32, width=32)
    latents = vae_passes.encode(autoencoder, pixels)
    mean, std = (
        torch.tensor(values)[:, None, None, None]
        for values in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
    )
    normalized = vae.encode(pixels[0])
    assert torch.allclose((latents[0] - mean) / std, normalized, atol=1e-4)
    assert torch.allclose(vae_passes.decode(autoencoder, latents)[0].clamp(-1, 1), vae.decode(normalized), atol=1e-4)
