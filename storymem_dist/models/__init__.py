"""Single-device models. Nothing in here imports torch.distributed."""
