"""The environment of the ranks that ``launch=torchrun`` starts: every variable that this program sets, and why.

``launch/env.sh`` adds what a site decides (Python, job names, caches, network). A variable that is already set keeps
its value, except where a comment says otherwise.
"""

import os
import secrets
import socket
from pathlib import Path

from storymem_dist.dispatch.stop import STOP_FILES_VARIABLE

_DEFAULTS = {
    # Token counts, and so the sizes of allocations, change from shot to shot: segments that grow avoid fragmentation.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # A collective that fails or times out ends its rank, so that the group restarts instead of hanging.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    # When a collective times out, NCCL reports which one and which ranks; it keeps the last 2000 in memory.
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    # Warnings only; use INFO to examine a link.
    "NCCL_DEBUG": "WARN",
    # The text encoder's tokenizer must not start a thread pool in every rank.
    "TOKENIZERS_PARALLELISM": "false",
}


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
