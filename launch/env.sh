# shellcheck shell=bash
# env.sh - sourced by the other scripts: what a site decides about the environment of a render, and why.
# A variable that is already set keeps its value, so a site or a user can override each of them.

# --- names ---------------------------------------------------------------------------------------------------------
# The Python of the environment in which storymem_dist is installed.
export STORYMEM_PYTHON=${STORYMEM_PYTHON:-python3}
# One name for all nodes, restarts and requeues of a job: the job does not retry a shot that failed in it, and applies
# dispatch.rerender once. The tasks of an array are one job. Without this name every torchrun group is a separate job.
export STORYMEM_JOB_ID=${STORYMEM_JOB_ID:-slurm-${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-$(hostname)-$$}}}
# Distinguishes the torchrun groups of one job, in the live view and the report. JOB_COMPLETION_INDEX is the number of a
# pod in a Kubernetes job.
pod=$((${STORYMEM_GROUP:-0} * ${STORYMEM_NODES:-1} + ${JOB_COMPLETION_INDEX:-0}))
export STORYMEM_NODE=${STORYMEM_NODE:-${SLURM_ARRAY_TASK_ID:-${SLURM_NODEID:-$pod}}}

# launch=torchrun sets what the ranks themselves need (NCCL, allocator, threads): storymem_dist/launch/environment.py.
# NCCL chooses a network card. A site with several names the fast one:
#   export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# --- caches --------------------------------------------------------------------------------------------------------
# All files are local: compute nodes without network must not wait for a hub that cannot answer.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# Compiled kernels (parallel.compile) survive restarts. One folder per user and node: network file systems are slow
# with many small files, and the ranks of one node share them.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/storymem-inductor-$(id -u)}

# --- Python --------------------------------------------------------------------------------------------------------
# Lines appear in the log when they are written.
export PYTHONUNBUFFERED=1

# storymem_state FOLDER: print the state of a run folder, or of a sweep's run folders: done, stopped or failed; nothing
# if no job has ended there.
storymem_state() {
  local states
  states=$(sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p' "$1"/stop.json "$1"/*/stop.json 2>/dev/null)
  case $states in
    *stopped*) echo stopped ;;
    *failed*) echo failed ;;
    *"done"*) echo "done" ;;
  esac
}

# storymem_was_signalled FOLDER: whether a job stopped there because of a signal, not because of a person's request.
storymem_was_signalled() {
  grep -qs '"reason": *"SIG[A-Z0-9]*"' "$1"/stop.json "$1"/*/stop.json
}

# storymem_quoted WORDS...: print a command as one line that a shell reads back.
storymem_quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# storymem_output ARGUMENTS: print the output folder of a command line.
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
