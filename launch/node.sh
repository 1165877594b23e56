#!/usr/bin/env bash
# node.sh OVERRIDES... - what each node of a job runs: one torchrun group over its GPUs, with restarts.
#
#   bash launch/node.sh stories=my_stories/ output=runs/night
#
# Nodes share work through the run folder: start this on any number of nodes, at any time. Exit codes:
#   0   done
#   75  stopped on request, shots are left: requeue the job (EX_TEMPFAIL). STORYMEM_STOP_CODE is used instead where a
#       person stopped it (a STOP file, storymem-queue) and no signal
#   else failed: 6 some shots, 2-5 a reported mistake, 1 a crash that restarts did not cure (see docs/running.md)
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# First of all: bash as process 1 of a container does not even end from a signal that it has no trap for.
asked=0 render="" group_stop=""
ask() {
  asked=1
  [ -z "$group_stop" ] || echo SIGTERM >"$group_stop"
  [ -z "$render" ] || kill -"$1" "$render" 2>/dev/null
}
trap 'ask TERM' TERM USR1 USR2 HUP
trap 'ask INT' INT

# shellcheck source=launch/env.sh
source "$here/env.sh"

# What the job names as the next command when it ends early.
export STORYMEM_COMMAND=${STORYMEM_COMMAND:-$(storymem_quoted bash "$0" "$@")}

output=$(storymem_output "$@")
across=()
nodes=${SLURM_NNODES:-${STORYMEM_NODES:-1}}
if [ "$nodes" -gt 1 ] && [ -n "${STORYMEM_HEAD:-}" ]; then
  # Used with parallel.across_nodes=true only: otherwise each node's group is separate.
  across=(launch.num_nodes="$nodes" launch.node_rank="${SLURM_NODEID:-${JOB_COMPLETION_INDEX:-0}}"
    launch.head="$STORYMEM_HEAD" launch.port="${STORYMEM_PORT:-29400}")
fi
if [ -n "${STORYMEM_GROUP:-}" ]; then
  # The nodes of a replica stop together, whichever of them is asked to.
  group_stop=$output/logs/STOP.$STORYMEM_JOB_ID.$STORYMEM_GROUP
  mkdir -p "$output/logs"
  rm -f "$group_stop" # from before this node came back
  export STORYMEM_STOP_FILES=${STORYMEM_STOP_FILES:+$STORYMEM_STOP_FILES:}$group_stop
fi
if [ "$asked" = 1 ]; then
  echo "node ${STORYMEM_NODE}: asked to stop before it began"
  exit 75
fi

"$STORYMEM_PYTHON" -m storymem_dist.cli "$@" launch=torchrun "${across[@]}" &
render=$!
# The launcher turns a signal into a stop between two denoising steps, which takes at most one step.
[ "$asked" = 0 ] || kill -TERM "$render" 2>/dev/null
while :; do
  wait "$render"
  code=$?
  kill -0 "$render" 2>/dev/null || break # a trapped signal ends wait before the process has ended
done
if [ "$code" = 0 ] && [ "$(storymem_state "$output")" = stopped ]; then
  code=75
  storymem_was_signalled "$output" || code=${STORYMEM_STOP_CODE:-75}
elif [ "$code" = 143 ] && [ "$asked" = 1 ]; then
  code=75 # asked to stop before the launcher was ready to
fi
echo "node ${STORYMEM_NODE}: ended with $code"
exit "$code"
