"""Starts ranks: in this process, with torchrun on this node, or as a job of SLURM or Kubernetes; runs sweeps.

Knows nothing of how a shot is rendered.
"""
