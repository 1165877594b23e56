#!/usr/bin/env bash
# down.sh - stop the cluster that up.sh started in SLCI_BASE. Signals only saved PIDs
# (each checked against the start time saved with it), and removes SLCI_BASE.
#   SLCI_KEEP=1   keep the folder (logs) as SLCI_BASE.old
#   SLCI_REAP=0   only report processes that jobs left behind (exit status 3); default: end them
#                  (descendants of the saved slurmd PIDs; needs python3 when the cluster was started)
# shellcheck disable=SC2046,SC2086
set -uo pipefail
BASE=${SLCI_BASE:-/tmp/slurm_ci}
PATH=$PATH:/usr/sbin:/sbin
[ -e "$BASE/.slurm_up" ] || { echo "slurm_down: nothing of mine in $BASE" >&2; exit 0; }
export SLURM_CONF=$BASE/etc/slurm.conf
stat_start() { local s; s=$(cat /proc/"$1"/stat 2>/dev/null) || { echo 0; return; }; s=${s##*) }; set -- $s; if [ "$1" = Z ]; then echo 0; else echo "${20}"; fi; }
mine() { [ "$2" != 0 ] && [ "$(stat_start "$1")" = "$2" ]; }
rc=0

# jobs first: slurmstepd outlives slurmd by design
case $(timeout 5 scontrol ping 2>/dev/null) in *'is UP'*)
  ids=$(timeout 5 squeue -h -o %A 2>/dev/null | sort -u)
  if [ -n "$ids" ]; then
    timeout 20 scancel $ids 2>/dev/null
    for _ in $(seq 1 100); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
  fi;;
esac
# what jobs left behind: descendants of the saved slurmd PIDs other than slurmd itself
tree() {  # tree PID: its descendants, from the world-readable /proc/*/stat
  cat /proc/[0-9]*/stat 2>/dev/null | awk -v root="$1" '
    { line = $0; sub(/^.*\) /, "", line); split(line, f, " "); match($0, /\(.*\)/); comm = substr($0, RSTART + 1, RLENGTH - 2)
      pp[$1] = f[2]; st[$1] = f[1]; nm[$1] = comm }
    END { for (p in pp) { q = p; n = 0; while (q in pp && q != root && q > 1 && n++ < 200) q = pp[q]; if (q == root && p != root && st[p] != "Z") print p, nm[p] } }'
}
if [ -f "$BASE/run/pids" ]; then
  while read -r pid st name; do
    case $name in slurmd.*) ;; *) continue;; esac
    mine "$pid" "$st" || continue
    while read -r p comm; do
      case $comm in slurmd|slurmd-wlm) continue;; esac
      echo "slurm_down: left by a job on ${name#slurmd.}: $p $(tr '\0' ' ' < /proc/"$p"/cmdline 2>/dev/null | cut -c1-120)" >&2
      if [ "${SLCI_REAP:-1}" = 1 ]; then kill -KILL "$p" 2>/dev/null; else rc=3; fi
    done < <(tree "$pid")
  done < "$BASE/run/pids"
  # daemons, last started first
  while read -r pid st name; do
    mine "$pid" "$st" || continue
    kill -TERM "$pid" 2>/dev/null
    for _ in $(seq 1 200); do mine "$pid" "$st" || break; sleep 0.05; done
    if mine "$pid" "$st"; then echo "slurm_down: $name ($pid) took SIGKILL" >&2; kill -KILL $(tree "$pid" | cut -d' ' -f1) "$pid" 2>/dev/null; rc=2; fi
  done < <(tac "$BASE/run/pids")
fi
mark="# slurm_up $BASE"
if [ -w /etc/hosts ] && grep -qF "$mark" /etc/hosts; then   # rewritten in place: a container's /etc/hosts is a mount
  new=$(grep -vF "$mark" /etc/hosts); printf '%s\n' "$new" > /etc/hosts
fi
if [ "${SLCI_KEEP:-0}" = 1 ]; then rm -rf "$BASE.old"; mv "$BASE" "$BASE.old"; else rm -rf "$BASE"; fi
echo "slurm_down: done" >&2
exit $rc
