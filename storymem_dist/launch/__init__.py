"""How ranks start: in this process, with torchrun on this node, or as a SLURM job; and sweeps over settings."""
