# shellcheck shell=bash
# env.sh - sourced by the other scripts: every environment variable that a render sets, and why.
# What is set already stays as it is, so a site or a user can override each of them.

# --- who and where -------------------------------------------------------------------------------------------------
# The Python that runs the renderer: that of the environment in which storymem_dist is installed.
export STORYMEM_PYTHON=${STORYMEM_PYTHON:-python3}
# One name for all nodes, restarts and requeues of a job: a shot that failed in this job is not tried again by it, and
# dispatch.rerender counts once. An array's tasks are one job. Without it every torchrun group would be its own job.
export STORYMEM_JOB_ID=${STORYMEM_JOB_ID:-slurm-${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-$(hostname)-$$}}}
# Tells the torchrun groups of one job apart, in the live view and the report.
export STORYMEM_NODE=${STORYMEM_NODE:-${SLURM_ARRAY_TASK_ID:-${SLURM_NODEID:-0}}}

# --- torch's launcher ----------------------------------------------------------------------------------------------
# After a restart, ranks must not find the dead group's addresses in the agent's store (pytorch issue 135712). Without
# it 4 of 14 restarts failed or hung.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# --- NCCL (no effect without GPUs) ---------------------------------------------------------------------------------
# A collective that fails or times out (parallel.collective_timeout_seconds) ends its rank, so that the group restarts
# instead of hanging.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# When one times out, say which collective and which ranks: the last 2000 are kept in memory, which costs nothing.
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# Only warnings; INFO when a link is to be examined.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A network card is chosen by NCCL. Sites with several name the fast one:
#   export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# --- memory --------------------------------------------------------------------------------------------------------
# Segments that can grow: clips of different lengths (memory keyframes add tokens) would otherwise fragment the GPU.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# --- threads -------------------------------------------------------------------------------------------------------
# Tokenizers of the text encoder must not start a thread pool in every rank.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# OMP_NUM_THREADS is set by launch=torchrun: the node's cores divided by its ranks.

# --- caches --------------------------------------------------------------------------------------------------------
# Everything is found in local paths; compute nodes without network must not wait for a hub that cannot answer.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# Compiled kernels (parallel.compile=true) survive restarts, one folder per user and node: network file systems are slow
# at the many small files, and ranks of one node share them.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/storymem-inductor-$(id -u)}

# --- Python --------------------------------------------------------------------------------------------------------
# Lines appear in the log when they are written.
export PYTHONUNBUFFERED=1

# storymem_state FOLDER: how the render in a run folder, or the sweep of run folders, stands: done, stopped, failed, or
# nothing when no job has ended there.
storymem_state() {
  local states
  states=$(sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p' "$1"/stop.json "$1"/*/stop.json 2>/dev/null)
  case $states in
    *stopped*) echo stopped ;;
    *failed*) echo failed ;;
    *"done"*) echo "done" ;;
  esac
}

# storymem_output ARGUMENTS: the output folder that a command line means.
storymem_output() {
  local argument found=${STORYMEM_OUTPUT:-}
  if [ -z "$found" ]; then
    for argument in "$@"; do
      case $argument in output=*) found=${argument#output=} ;; esac
    done
  fi
  if [ -z "$found" ]; then
    found=$("$STORYMEM_PYTHON" -m storymem_dist.cli "$@" --cfg job | sed -n 's/^output: *//p')
  fi
  echo "$found"
}
