"""What a machine says about compiling the transformer's blocks, and where compiled code is kept.

Whether a job compiles is part of its plan (``planner.plan``): compiled code is faster, but the first shot waits for the
compiler. What is compiled, and how, is in ``models.compile``.
"""

import importlib.util
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from storymem_dist.errors import ConfigError
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.weights.bundle import cache_folder

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compile_fact(parallel: ParallelSettings, device: torch.device) -> tuple[bool | None, str]:
    """Return whether blocks are compiled, with the reason, where that needs no plan; else None."""
    if parallel.compile != "auto":
        return bool(parallel.compile), f"parallel.compile={str(parallel.compile).lower()}"
    if parallel.weights == "zero3":
        return False, "parallel.weights=zero3 runs in eager mode only"
    if device.type != "cuda":
        return False, "the default on CPUs"
    if missing := missing_tool():
        return False, f"torch.compile needs {missing}, which is not installed"
    return None, ""


def keep_compiled_code() -> None:
    """Let torch keep compiled code in the user's cache, not in the temporary folder; a folder that is set stays."""
    if (folder := _code_folder()) is not None:
        os.environ[_CACHE_VARIABLE] = str(folder)


def has_compiled_code() -> bool:
    """Whether an earlier job has left compiled code where this one looks for it."""
    folder = _code_folder()
    with suppress(OSError):
        return folder is not None and any(folder.glob("fxgraph/*"))
    return False


def _code_folder() -> Path | None:
    """Where compiled code is kept; None without a home folder. torch sets the variable itself, to its own folder."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # here, since it takes a second to import

    given = os.environ.get(_CACHE_VARIABLE)
    if given and given != default_cache_dir():
        return Path(given)
    with suppress(ConfigError):
        return cache_folder() / "inductor"
    return None


def missing_tool() -> str | None:
    """What torch.compile needs on a GPU and this machine lacks, in words; None where nothing is missing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    if not any(shutil.which(compiler.split()[0]) for compiler in compilers):
        return f"a C compiler ({' or '.join(compilers)})"
    return None
