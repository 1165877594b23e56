"""Checks that every parallel layout computes on *this* machine what one device computes.

    python -m storymem_dist.selftest                                  one rank
    torchrun --nproc_per_node 8 -m storymem_dist.selftest             every layout that 8 ranks can hold

First each collective of a layout runs alone, with numbers whose result is known. Then models run: a small transformer
with guidance and a small VAE in fp32, the transformer with 8-bit layers (where the device can multiply them) and one
block of A14B's width in bf16, all compared with one device. Each difference is reported with layout, collective or
model, axis, and rank. The exit code is 1 if anything differs, fails or hangs. Needs no weights and no settings; it
verifies NCCL on a user's machine.
"""
