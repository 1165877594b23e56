"""Identifies a process: job and group names from the environment, package versions, device name.

Knows the variables that launchers set; starts nothing.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_REPORTED_PACKAGES = ("storymem_dist", "torch", "diffusers", "transformers", "av", "accelerate")


def job_identity() -> str:
    """Return a name that all ranks and restarts of this job share, and no other job; empty for a single process.

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


def start_identity() -> str:
    """Return ``job_identity`` with the start of its SLURM job: a job that was queued again is another one here."""
    job = job_identity()
    return f"{job}.start{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def group_identity() -> str:
    """Return a name that the ranks of one launcher and their restarts share: that of the job and the node."""
    node = os.environ.get("STORYMEM_NODE", "")
    return f"{job_identity()}.node{node}" if node else job_identity()


def package_versions() -> dict[str, str]:
    """Return the versions of this project, Python and the packages that can change the result."""
    versions = {"python": platform.python_version()}
    for name in _REPORTED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def device_name(device: torch.device) -> str:
    """Return the product name of a GPU, else ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
