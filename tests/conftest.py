"""Settings that every test shares: few threads (so that timings and bytes repeat), quiet libraries, no network."""

import logging
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch

from storymem_dist.errors import ConfigError
from storymem_dist.models.quantized_linear import check_linears

torch.set_num_threads(1)
# a shell that starts the tests in the background ignores these, and so would every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """Restore the environment variables: a program that a test calls in this process sets some for its libraries."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def loggers_stay_enabled() -> Iterator[None]:
    """Let warnings of all loggers through: Hydra silences the root and those that exist when it starts a job here."""
    _let_loggers_speak()
    yield
    _let_loggers_speak()


def _let_loggers_speak() -> None:
    logging.root.setLevel(logging.WARNING)
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_gpu, has_float8 = torch.cuda.is_available(), _multiplies_float8()
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        params = getattr(getattr(item, "callspec", None), "params", {})
        if not has_float8 and ("float8" in item.keywords or str(params.get("linears")).startswith("float8")):
            item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} has no float8 products on a CPU"))


def _multiplies_float8() -> bool:
    try:
        check_linears("float8", torch.device("cpu"))
    except ConfigError:
        return False
    return True
