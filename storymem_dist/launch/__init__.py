"""Starts ranks: in this process, with torchrun on this node, or as a SLURM job; and runs sweeps over settings.

Knows nothing of how a shot is rendered.
"""
