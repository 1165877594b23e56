"""Who a process is in its job, and on what it runs: names from the environment, versions, device.

Knows the variables that launchers set; starts nothing.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from storymem_dist import __version__

_REPORTED_PACKAGES = ("torch", "diffusers", "transformers", "av", "accelerate")


def job_identity() -> str:
    """A name that all ranks and restarts of this job share, and no other job: empty for a process started by hand.

    ``STORYMEM_JOB_ID`` where a launcher sets it (all nodes of a SLURM job share it); else torchrun's run id; else the
    address at which the ranks met and the process that started them.
    """
    if given := os.environ.get("STORYMEM_JOB_ID"):
        return given
    if "RANK" not in os.environ:
        return ""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id != "none":
        return f"torchrun-{run_id}"
    return f"ranks-{os.environ.get('MASTER_ADDR', '')}-{os.environ.get('MASTER_PORT', '')}-{os.getppid()}"


def group_identity() -> str:
    """A name that the ranks which were started together share, and their restarts: that of the job and the node."""
    node = os.environ.get("STORYMEM_NODE", "")
    return f"{job_identity()}.node{node}" if node else job_identity()


def package_versions() -> dict[str, str]:
    """Versions of this project, Python and the packages that shape the result."""
    versions = {"storymem_dist": __version__, "python": platform.python_version()}
    for name in _REPORTED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
