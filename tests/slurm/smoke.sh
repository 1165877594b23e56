#!/usr/bin/env bash
# shellcheck disable=SC2317  # checks are called by name
# smoke.sh - renders on a real SLURM (up.sh has started it: two virtual nodes) and compares with a local render.
#
#   SLCI_BASE=/tmp/slurm_ci bash tests/slurm/up.sh && PY=.venv/bin/python bash tests/slurm/smoke.sh [CHECK...]
#
# Checks: nodes array signal lost sweep. The model is tiny and the clips are a few pixels: the checks are that nothing is
# lost and that every byte equals that of a local run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
# shellcheck disable=SC1091
. "${SLCI_BASE:-/tmp/slurm_ci}/env.sh"
PY=$(realpath -s "${PY:-.venv/bin/python}")
work=$(mktemp -d "${TMPDIR:-/tmp}/storymem-slurm.XXXXXX")
bad=0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline
small=(model=tiny sampler.num_frames=5 sampler.height=32 sampler.width=48 memory.quality=none tracking=none
  parallel.device=cpu parallel=replicas)
cluster=(launch=slurm launch.slurm.cpus_per_task=4 launch.slurm.memory=4G "launch.slurm.time='10'")

ok() { if [ "$2" = "$3" ]; then echo "ok   $1"; else echo "FAIL $1: got [$2], want [$3]"; bad=1; fi; }
render() { "$PY" -m storymem_dist.cli "$@" "${small[@]}"; }
submit() { render "$@" "${cluster[@]}" | sed -n 's/^submitted job \([0-9]*\);.*/\1/p'; }
state() { [ -n "$1" ] || { echo "not submitted"; return; }; scontrol -o show job "$1" | grep -oE 'JobState=[A-Z_]+' | sort -u | cut -d= -f2 | tr '\n' ' ' | sed 's/ $//'; }
until_true() { # until_true SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" > /dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.3
  done
}
is_gone() { [ -z "$(squeue -h -j "$1" 2> /dev/null)" ]; }
gone() { [ -n "$1" ] || return; until_true 240 is_gone "$1" || { echo "job $1 does not end"; scancel "$1"; bad=1; }; }
media() { (cd "$1/stories" && find . \( -name '*.mp4' -o -name '*.png' \) -not -path '*/attempts/*' -print0 | sort -z | xargs -0 sha256sum | sha256sum); }
seen() { grep -qs "\"event\":\"$2\"" "$1"/events/*.jsonl; }
count() { cat "$1"/events/*.jsonl | grep -c "\"event\":\"$2\""; }

story() { # story NAME: a storyboard of two shots
  printf '{"story_name": "%s", "story_overview": "A test.", "scenes": [{"scene_num": 1, "video_prompts": ["%s, one", "%s, two"], "cut": [true, false]}]}' \
    "$1" "$1" "$1" > "$work/stories/$1.json"
}
mkdir -p "$work/stories" "$work/long"
for name in fox owl hare wolf; do story "$name"; done
mv "$work/stories/wolf.json" "$work/long/"

reference=""
local_render() { # the files that all runs over three stories must equal
  if [ -z "$reference" ]; then
    render stories="$work/stories" output="$work/local" sampler.num_inference_steps=3 > "$work/local.log" 2>&1 || bad=1
    reference=$(media "$work/local")
  fi
}

check_nodes() {
  local job run=$work/nodes
  local_render
  job=$(submit stories="$work/stories" output="$run" sampler.num_inference_steps=3 launch.slurm.nodes=2 \
    launch.slurm.gpus_per_node=2 launch.processes_per_node=2)
  gone "$job"
  ok "2 nodes x 2 ranks: job" "$(state "$job")" COMPLETED
  ok "2 nodes x 2 ranks: both nodes worked" "$(grep -ho 'ended with 0' "$run"/logs/node-*.out | wc -l)" 2
  ok "2 nodes x 2 ranks: bytes of a local run" "$(media "$run")" "$reference"
  ok "2 nodes x 2 ranks: nothing twice" "$(count "$run" ShotFinished)" 6
}

check_array() {
  local job run=$work/array
  local_render
  job=$(submit stories="$work/stories" output="$run" sampler.num_inference_steps=3 launch.slurm.template=render_array \
    launch.slurm.tasks=3 launch.slurm.gpus_per_node=0 launch.processes_per_node=1)
  gone "$job"
  ok "array of 3 tasks: jobs" "$(state "$job")" COMPLETED
  ok "array of 3 tasks: bytes of a local run" "$(media "$run")" "$reference"
  ok "array of 3 tasks: nothing twice" "$(count "$run" ShotFinished)" 6
}

check_signal() {
  local job run=$work/signal
  render stories="$work/long" output="$work/long-local" sampler.num_inference_steps=900 > "$work/long.log" 2>&1 || bad=1
  job=$(submit stories="$work/long" output="$run" sampler.num_inference_steps=900 launch.slurm.nodes=1 \
    launch.slurm.gpus_per_node=0 launch.processes_per_node=1)
  until_true 120 seen "$run" StepFinished || bad=1
  scancel --signal=USR1 --batch "$job"
  gone "$job"
  ok "signal in a shot: job" "$(state "$job")" COMPLETED
  ok "signal in a shot: came back" "$(grep -c '^job .* start 1,' "$run"/logs/slurm-"$job".out)" 1
  ok "signal in a shot: went on inside it" "$(count "$run" ShotResumed)" 1
  ok "signal in a shot: bytes of a local run" "$(media "$run")" "$(media "$work/long-local")"
}

check_lost() {
  local job run=$work/lost
  local_render
  job=$(submit stories="$work/stories" output="$run" sampler.num_inference_steps=3 launch.slurm.nodes=2 \
    launch.slurm.gpus_per_node=0 launch.processes_per_node=1 dispatch.lease_seconds=5)
  until_true 120 seen "$run" ShotStarted || bad=1
  scontrol update nodename=n2 state=down reason="test: lost for good"
  gone "$job"
  ok "a node lost: job" "$(state "$job")" COMPLETED
  ok "a node lost: bytes of a local run" "$(media "$run")" "$reference"
  ok "a node lost: it did not end by itself" "$(grep -c 'ended with' "$run"/logs/node-*-1.out)" 0
  scontrol update nodename=n2 state=resume > /dev/null 2>&1 # where it has not come back by itself
}

check_sweep() {
  local run=$work/sweep steps
  render --multirun hydra/launcher=submitit_slurm hydra.launcher.partition=main hydra.launcher.timeout_min=10 \
    hydra.launcher.mem_gb=4 hydra.launcher.cpus_per_task=4 hydra.launcher.signal_delay_s=30 \
    stories="$work/stories/fox.json" output="$run" sampler.num_inference_steps=2,3 > "$work/sweep.log" 2>&1
  ok "submitit sweep: exit code" $? 0
  for steps in 2 3; do
    render stories="$work/stories/fox.json" output="$work/one-$steps" sampler.num_inference_steps="$steps" \
      > "$work/one.log" 2>&1 || bad=1
    ok "submitit sweep: bytes of point $steps" "$(media "$run/sampler.num_inference_steps=$steps")" \
      "$(media "$work/one-$steps")"
  done
  ok "submitit sweep: table" "$(grep -c '^sampler.num_inference_steps=[23] *done' "$work/sweep.log")" 2
}

[ $# -gt 0 ] || set -- nodes array signal lost sweep
for name in "$@"; do
  began=$SECONDS
  "check_$name"
  echo "     ($name: $((SECONDS - began)) s)"
done
if [ "$bad" = 0 ]; then rm -rf "$work"; else echo "logs are in $work"; fi
exit "$bad"
