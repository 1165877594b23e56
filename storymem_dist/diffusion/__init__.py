"""Flow-matching sampling: latent sizes, conditioning, solvers, experts, guidance, the denoise loop.

Knows nothing about ranks or run folders.
"""
