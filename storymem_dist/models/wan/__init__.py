"""The modules of Wan2.2 (diffusion transformer, text encoder, VAE) and their sizes. Knows nothing about files."""
