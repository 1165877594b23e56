#!/usr/bin/env bash
# local.sh OVERRIDES... - one node, all its GPUs; renders until everything is done, despite crashes of the launcher.
#
#   bash launch/local.sh stories=my_stories/ output=runs/night
#
# The same as `storymem-render launch=torchrun ...` with the environment of env.sh. Ctrl-C stops after the running step,
# a second Ctrl-C at once; the same command continues. ATTEMPTS=3 starts the group up to three times if it is lost.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# What the job names as the next command when it ends early.
export STORYMEM_COMMAND=${STORYMEM_COMMAND:-$(printf '%q ' bash "$0" "$@")}
for ((attempt = 1; attempt <= ${ATTEMPTS:-1}; attempt++)); do
  bash "$here/node.sh" "$@"
  code=$?
  [ "$code" = 1 ] || [ "$code" -gt 128 ] || break
  echo "attempt $attempt of ${ATTEMPTS:-1} ended with $code" >&2
done
# A stop on request of a person is no failure.
[ "$code" = 75 ] && code=0
exit "$code"
