"""Wan2.2: diffusion transformer, text encoder, VAE, checkpoints, LoRAs."""
