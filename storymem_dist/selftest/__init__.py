"""Does every parallel layout compute on *this* machine what one device computes?

    python -m storymem_dist.selftest                                  one rank
    torchrun --nproc_per_node 8 -m storymem_dist.selftest             every layout that 8 ranks can hold

First each collective of a layout is tried by itself with numbers whose result is known, then a small transformer with
guidance and a small VAE in fp32, then the transformer with layers in eight bits (where the device can multiply them)
and one block of A14B's width in bf16, all against the same computation on one device. What differs is named: layout,
collective or model, axis, and rank. The exit code is 1 if anything differs, fails or hangs. Needs no weights and no
settings; it is how NCCL is proved on a user's machine.
"""
