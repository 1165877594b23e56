#!/usr/bin/env bash
# node.sh OVERRIDES... - what each node of a job runs: one torchrun group over its GPUs, with restarts.
#
#   bash launch/node.sh stories=my_stories/ output=runs/night
#
# Nodes share work through the run folder: start this on any number of nodes, at any time. Exit codes:
#   0   done
#   75  stopped on request, shots are left: requeue the job (EX_TEMPFAIL)
#   else failed: 6 some shots, 2-5 a reported mistake, 1 a crash that restarts did not cure (see docs/running.md)
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
source "$here/env.sh"

# What the job names as the next command when it ends early.
export STORYMEM_COMMAND=${STORYMEM_COMMAND:-$(storymem_quoted bash "$0" "$@")}

output=$(storymem_output "$@")
across=()
if [ "${SLURM_NNODES:-1}" -gt 1 ] && [ -n "${STORYMEM_HEAD:-}" ]; then
  # Used with parallel.across_nodes=true only: otherwise each node's group is separate.
  across=(launch.num_nodes="$SLURM_NNODES" launch.node_rank="$SLURM_NODEID"
    launch.head="$STORYMEM_HEAD" launch.port="${STORYMEM_PORT:-29400}")
fi

"$STORYMEM_PYTHON" -m storymem_dist.cli "$@" launch=torchrun "${across[@]}" &
render=$!
# The launcher turns these signals into a stop between two denoising steps, which takes at most one step.
trap 'kill -TERM "$render" 2>/dev/null' TERM USR1 USR2 HUP
trap 'kill -INT "$render" 2>/dev/null' INT
while :; do
  wait "$render"
  code=$?
  kill -0 "$render" 2>/dev/null || break # a trapped signal ends wait before the process has ended
done
if [ "$code" = 0 ] && [ "$(storymem_state "$output")" = stopped ]; then code=75; fi
echo "node ${STORYMEM_NODE}: ended with $code"
exit "$code"
