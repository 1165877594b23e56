# The image that launch/kubernetes/ and the SITE: lines of slurm/*.sbatch name. Checked with `hadolint Dockerfile` (2.15.1); nobody has built it yet.
#
#   docker build -t storymem_dist .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" storymem_dist storymem-doctor
#
# Base: plain Python, not nvidia/cuda. torch's Linux wheels bring the CUDA runtime, cuDNN and NCCL that they were built
# with, and the driver comes from the host (NVIDIA Container Toolkit, pyxis, `apptainer --nv`); an nvidia/cuda image would
# add a second CUDA that nothing uses. Python 3.11 is the version of constraints.txt. Take an nvidia/cuda *devel* image
# with Python 3.11 instead to compile extras that need nvcc (flash-attn).
FROM python:3.11-slim-bookworm

# For containers that are started without --gpus' defaults: the driver libraries that torch needs.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1

# A C compiler: parallel.compile=true builds its launchers with it. Debian's versions are those of the base image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/storymem_dist

# torch in a layer of its own: it is by far the largest part and changes least. constraints.txt pins its version without
# a local suffix, so that pip takes the CUDA build on Linux.
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch

COPY pyproject.toml setup.py README.md LICENSE ./
COPY conf/ conf/
COPY examples/ examples/
COPY launch/ launch/
COPY slurm/ slurm/
COPY storymem_dist/ storymem_dist/
RUN pip install --no-cache-dir --constraint constraints.txt .

RUN useradd --create-home --uid 1000 storymem \
    && install --directory --owner=storymem /work
# a number, so that the host can resolve it
USER 1000
WORKDIR /work

CMD ["storymem-render", "--help"]
