"""Puts a complete state dict into a module built on the meta device, or reports precisely why it does not fit.

For models that are loaded whole (text encoder, VAE); ``loading`` streams the transformer. Knows nothing about files.
"""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from storymem_dist.errors import CheckpointError, shortened

_NUM_NAMED_KEYS = 3


def assign_state_dict(module: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Make the tensors of ``state`` the parameters of ``module``, without copying.

    Raises:
        CheckpointError: a key is missing, left over or of another shape; names ``where`` and the first few keys.
    """
    shapes = {key: parameter.shape for key, parameter in module.state_dict().items()}
    check_no_keys(f"{where}: weights are missing", [key for key in shapes if key not in state])
    check_no_keys(f"{where}: weights have no place in the model", [key for key in state if key not in shapes])
    for key, shape in shapes.items():
        if state[key].shape != shape:
            raise CheckpointError(f"{where}: {key} has shape {list(state[key].shape)}; the model has {list(shape)}")
    module.load_state_dict(state, strict=True, assign=True)


def check_no_keys(problem: str, keys: Collection[str]) -> None:
    """Raise ``CheckpointError`` naming ``problem`` and the first few of ``keys`` if there are any."""
    if keys:
        raise CheckpointError(f"{problem}: {first_keys(keys)}")


def first_keys(keys: Collection[str]) -> str:
    """The first few keys, and how many more there are."""
    named = [shortened(key if key.isprintable() else ascii(key)) for key in sorted(keys)[:_NUM_NAMED_KEYS]]
    first = ", ".join(named)
    return f"{first} and {len(keys) - _NUM_NAMED_KEYS} more" if len(keys) > _NUM_NAMED_KEYS else first
