# shellcheck shell=bash
# batch.sh - sourced by the templates in slurm/: start the nodes, stop in time, requeue the job.
#
# A template sets START, an array with the command (srun ...) that starts node.sh on every node. It then sources this
# file with the overrides as arguments. SLURM sends USR1 to the batch script before the time is up (#SBATCH --signal).
# The script then writes STOP.JOB into logs/ of the run folder: every rank of this job, and of no other job in that
# folder, finishes its denoising step and saves. The job is requeued under the same number, at most
# STORYMEM_MAX_REQUEUES times.
here=$STORYMEM_LAUNCH
# shellcheck source=launch/env.sh
source "$here/env.sh"

output=$(storymem_output "$@")
if [ -z "$output" ]; then
  echo "the overrides are refused: $*" >&2
  exit 2
fi
mkdir -p "$output/logs"
# What the job names as the next command when it ends early: launch=slurm sets it; else this script, as it was submitted.
submitted=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | head -n 1)
export STORYMEM_COMMAND=${STORYMEM_COMMAND:-$(storymem_quoted sbatch "${submitted:-slurm/render.sbatch}" "$@")}
own_stop=$output/logs/STOP.$SLURM_JOB_ID
rm -f "$own_stop" # from before this job was requeued
export STORYMEM_STOP_FILES=$own_stop
export STORYMEM_OUTPUT=$output
# For parallel.across_nodes=true: where the nodes meet, and a port that another job on that node is unlikely to use.
STORYMEM_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export STORYMEM_HEAD STORYMEM_PORT=$((20000 + SLURM_JOB_ID % 20000))
unset STORYMEM_NODE # each node sets its own

times_up=0
trap 'times_up=1; touch "$own_stop"; echo "time is up: stopping after the running step"' USR1
# Preemption and scancel: the same, but SLURM decides whether the job is requeued.
trap 'touch "$own_stop"' TERM USR2 HUP

echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: $*"
"${START[@]}" bash "$here/node.sh" "$@" &
nodes=$!
while :; do
  wait "$nodes"
  code=$?
  kill -0 "$nodes" 2>/dev/null || break # a trapped signal ends wait before the nodes have ended
done
state=$(storymem_state "$output")
echo "nodes ended with $code, the batch is ${state:-unfinished}"
if [ "$state" = "done" ]; then
  exit 0 # also after the loss of a node: the others have done its work
fi
if [ "$times_up" = 1 ] && [ "$state" = stopped ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "${STORYMEM_MAX_REQUEUES:-20}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    sleep 120 # SLURM ends this script
    exit 75
  fi
  echo "not requeued again: this was start ${SLURM_RESTART_COUNT:-0}, STORYMEM_MAX_REQUEUES=${STORYMEM_MAX_REQUEUES:-20}" >&2
  exit 75
fi
[ "$code" = 0 ] && [ "$state" != stopped ] && code=1
exit "$code"
