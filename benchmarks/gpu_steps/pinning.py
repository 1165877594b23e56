"""A program of step 9: page-lock tensors of a block's sizes one by one, and print what the allocator took, as JSON."""

import json
import sys

import torch


def main() -> None:
    """Arguments: width, width of the feed-forward, number of blocks."""
    dim, ffn_dim, num_blocks = map(int, sys.argv[1:])
    shapes = [(dim, dim)] * 8 + [(ffn_dim, dim), (dim, ffn_dim)]
    on_gpu = torch.cuda.is_available()
    kept = [torch.empty(shape, dtype=torch.bfloat16, pin_memory=on_gpu) for _ in range(num_blocks) for shape in shapes]
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"] if on_gpu else None
    print(json.dumps({"weights": sum(tensor.nbytes for tensor in kept), "pinned": pinned}))


if __name__ == "__main__":
    main()
