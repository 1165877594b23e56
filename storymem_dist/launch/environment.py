"""The environment of a render and of the ranks that ``launch=torchrun`` starts: what this program sets, and why.

``launch/env.sh`` adds what a site decides (Python, job names, caches, network). A variable that is already set keeps
its value, except where a comment says otherwise.
"""

import os
import secrets
import socket
import tempfile
from pathlib import Path

from storymem_dist.dispatch.stop import STOP_FILES_VARIABLE

_DEFAULTS = {
    # When a collective times out, NCCL reports which one and which ranks; it keeps the last 2000 in memory.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    # Warnings only; use INFO to examine a link.
    "NCCL_DEBUG": "WARN",
    # The text encoder's tokenizer must not start a thread pool in every rank.
    "TOKENIZERS_PARALLELISM": "false",
}


def set_cache_folders(output: str | Path) -> None:
    """Keep caches in the run folder ``output`` where the user's own cannot be written: no home, or a read-only one.

    ``XDG_CACHE_HOME`` serves this program's generated weights, Hugging Face, torch and W&B. Call it before any of them
    is imported. What is set, and can be written, stays; a folder that somebody chose for one of them stays in any case.
    """
    caches = Path(output).absolute() / "cache" / "home"
    home = os.environ.get("HOME", "~")
    chosen = os.environ.get("XDG_CACHE_HOME")
    usual = Path(chosen) if chosen else Path(os.path.expanduser(home)) / ".cache"  # noqa: PTH111  # never raises
    if not _can_write(usual):
        os.environ["XDG_CACHE_HOME"] = str(caches)
        os.environ.setdefault("TRITON_CACHE_DIR", str(caches / "triton"))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))


def _can_write(folder: Path) -> bool:
    """Whether files can be made in ``folder``; makes it where it is missing."""
    if not folder.is_absolute():
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def set_rank_environment(*, num_processes: int, stop_file: Path) -> None:
    """Set what the ``num_processes`` ranks of this node, and torch's agent in this process, read.

    ``stop_file`` is added to the files that ask this job alone to stop.
    """
    # Set always: without it, ranks of a restarted group find the addresses of the dead group in the agent's store
    # (pytorch issue 135712), and 4 of 14 restarts failed or hung.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ.setdefault("STORYMEM_JOB_ID", f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
    others = [path for path in os.environ.get(STOP_FILES_VARIABLE, "").split(os.pathsep) if path]
    os.environ[STOP_FILES_VARIABLE] = os.pathsep.join([*others, str(stop_file)])
