"""Decides whether a job compiles the transformer's blocks, from the work that is ahead of it.

Compiled code is faster, but the first shot waits for the compiler. Knows devices and estimates of work; what is
compiled, and how, is in ``models.compile``.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from storymem_dist.errors import ConfigError
from storymem_dist.hardware import peak_tflops
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.models.wan.presets import WAN22_A14B
from storymem_dist.parallel.session import Session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render.identity import device_name
from storymem_dist.weights.bundle import cache_folder

# Estimates, of which a decision needs the order of magnitude only; benchmarks/gpu_check.py measures them.
SAVED_SHARE = 0.07
"""Part of the denoising time that compiled code saves."""
COMPILE_SECONDS = 60.0
CACHED_SECONDS = 20.0
"""What the first shot waits for the compiler: without a cache, and with one."""
_USED_SHARE_OF_PEAK = 0.5
_PEAK_OF_UNKNOWN_DEVICES = 100.0  # TFLOP/s

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def decide_compile(
    parallel: ParallelSettings, session: Session, config: DiTConfig, tflop_ahead: Callable[[], float]
) -> tuple[ParallelSettings, str]:
    """Return ``parallel`` with ``compile=auto`` decided, and the decision with its reason in one line.

    Collective over the replica; its leader decides. ``tflop_ahead`` returns the work of the whole job for a model as
    large as A14B. Where blocks are compiled, what the compiler makes is kept in the user's cache from here on.
    """
    compiles, why = session.leader_decides(lambda: _decide(parallel, session, config, tflop_ahead))
    if compiles:
        keep_compiled_code()
    return replace(parallel, compile=compiles), f"{'on' if compiles else 'off'}: {why}"


def keep_compiled_code() -> None:
    """Let torch keep compiled code in the user's cache, not in the temporary folder; a folder that is set stays."""
    if (folder := _code_folder()) is not None:
        os.environ[_CACHE_VARIABLE] = str(folder)


def _code_folder() -> Path | None:
    """Where compiled code is kept; None without a home folder. torch sets the variable itself, to its own folder."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # here, since it takes a second to import

    given = os.environ.get(_CACHE_VARIABLE)
    if given and given != default_cache_dir():
        return Path(given)
    with suppress(ConfigError):
        return cache_folder() / "inductor"
    return None


def _decide(
    parallel: ParallelSettings, session: Session, config: DiTConfig, tflop_ahead: Callable[[], float]
) -> tuple[bool, str]:
    if parallel.compile != "auto":
        return bool(parallel.compile), f"parallel.compile={str(parallel.compile).lower()}"
    if parallel.weights == "zero3":
        return False, "parallel.weights=zero3 runs in eager mode only"
    if session.device.type != "cuda":
        return False, "the default on CPUs"
    if missing := missing_tool():
        return False, f"torch.compile needs {missing}, which is not installed"
    ahead = tflop_ahead() * _size(config) / session.world_size
    peak = peak_tflops(device_name(session.device)) or _PEAK_OF_UNKNOWN_DEVICES
    seconds = ahead / (peak * _USED_SHARE_OF_PEAK)
    saved, cost = SAVED_SHARE * seconds, CACHED_SECONDS if _has_compiled_code() else COMPILE_SECONDS
    is_worth = saved > cost
    return is_worth, (
        f"{'about' if is_worth else 'only about'} {_about(seconds)} of work are ahead, of which compiled code saves "
        f"{_about(saved)}; to compile takes {_about(cost)}"
    )


def missing_tool() -> str | None:
    """What torch.compile needs on a GPU and this machine lacks, in words; None where nothing is missing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    if not any(shutil.which(compiler.split()[0]) for compiler in compilers):
        return f"a C compiler ({' or '.join(compilers)})"
    return None


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _has_compiled_code() -> bool:
    folder = _code_folder()
    with suppress(OSError):
        return folder is not None and any(folder.glob("fxgraph/*"))
    return False


def _size(config: DiTConfig) -> float:
    """Parameters of the blocks' layers, as a part of A14B's."""
    parameters, of_a14b = (
        one.num_layers * one.dim * (8 * one.dim + 2 * one.ffn_dim) for one in (config, WAN22_A14B.t2v)
    )
    return parameters / of_a14b
