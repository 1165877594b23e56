#!/usr/bin/env bash
# up.sh - start a real, throw-away SLURM cluster on loopback (Debian 12 packages, no systemd).
#
#   SLCI_BASE=/tmp/slurm_ci bash up.sh && . /tmp/slurm_ci/env.sh
#   ... sbatch / srun / squeue ...
#   bash down.sh                      (or: bash up.sh down)
#
# Exits 3 where the packages cannot be installed, 1 for any other failure.
#
# Settings (environment):
#   SLCI_BASE=/tmp/slurm_ci   everything lives here (keep it short: unix socket paths are limited to 107 bytes)
#   SLCI_NODES=2              virtual nodes n1..nN, one slurmd each
#   SLCI_CPUS=64  SLCI_MEM_MB=512000  SLCI_GPUS=4  SLCI_GPU_TYPE=   what every node claims to have
#   SLCI_PARTITIONS=main      comma-separated; the first is the default
#   SLCI_FEATURES=            node features, for --constraint
#   SLCI_PORT=16817           slurmctld; slurmdbd +1, mariadbd +2, slurmd n1.. +10..
#   SLCI_ACCT=0               1: also mariadbd + slurmdbd, so that sacct / sacctmgr work
#   SLCI_INSTALL=1            0: never call apt-get
#   SLCI_HOSTS=1              1: where /etc/hosts is writable, map n1..nN (and this machine's own name, unless it is
#                              so already) to 127.0.0.1 there; down.sh removes the lines
#   SLCI_WAIT=30              seconds to wait for the nodes to become idle
set -euo pipefail
umask 022
BASE=${SLCI_BASE:-/tmp/slurm_ci}
NODES=${SLCI_NODES:-2} CPUS=${SLCI_CPUS:-64} MEM=${SLCI_MEM_MB:-512000}
GPUS=${SLCI_GPUS:-4} GTYPE=${SLCI_GPU_TYPE:-} PARTS=${SLCI_PARTITIONS:-main} FEATS=${SLCI_FEATURES:-}
PORT=${SLCI_PORT:-16817} ACCT=${SLCI_ACCT:-0} WAIT=${SLCI_WAIT:-30}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin
say() { echo "slurm_up: $*" >&2; }
die() { say "$*"; exit 1; }
no_packages() { say "$*"; exit 3; }
ms() { echo $(( $(date +%s%N) / 1000000 )); }
T0=$(ms)

if [ "${1:-up}" = down ]; then exec bash "$HERE/down.sh"; fi
case $BASE in /*) ;; *) die "SLCI_BASE must be absolute";; esac
[ ${#BASE} -le 70 ] || die "SLCI_BASE is too long for unix sockets"
if [ -e "$BASE" ]; then
  [ -e "$BASE/.slurm_up" ] || die "$BASE exists and is not mine"
  die "$BASE is there already: run down.sh first"
fi

# ---- packages -------------------------------------------------------------
need=(); for b in munged mungekey slurmctld slurmd sbatch; do command -v $b >/dev/null || need=(slurmctld slurmd slurm-client munge); done
if [ "$ACCT" = 1 ]; then for b in slurmdbd mariadbd; do command -v $b >/dev/null || need+=(slurmdbd mariadb-server-core); done; fi
if [ ${#need[@]} -gt 0 ]; then
  if [ "${SLCI_INSTALL:-1}" != 1 ] || [ "$(id -u)" != 0 ]; then no_packages "missing packages: ${need[*]}"; fi
  # keep apt from starting the daemons, unless a policy-rc.d does that already
  pol=/usr/sbin/policy-rc.d made=0
  if [ ! -e $pol ]; then printf '#!/bin/sh\nexit 101\n' > $pol; chmod 755 $pol; made=1; fi
  export DEBIAN_FRONTEND=noninteractive
  tmp=$(mktemp); rc=0
  { apt-get update -q && apt-get install -y -q --no-install-recommends "${need[@]}"; } > "$tmp" 2>&1 || rc=$?
  if [ $made = 1 ]; then rm -f $pol; fi
  [ $rc = 0 ] || { tail -20 "$tmp" >&2; rm -f "$tmp"; no_packages "apt-get failed"; }
  rm -f "$tmp"
fi
T1=$(ms)

# ---- files ----------------------------------------------------------------
ME=$(id -un)
mkdir -p "$BASE"/{etc,state,log,run,dev,munge,spool}
chmod 755 "$BASE"; chmod 700 "$BASE/munge"; : > "$BASE/.slurm_up"
C=$BASE/etc/slurm.conf
mungekey --create --keyfile="$BASE/munge/key"
names=(); for i in $(seq 1 "$NODES"); do names+=("n$i"); mkdir -p "$BASE/spool/n$i"; done
nodelist=$(IFS=,; echo "${names[*]}")

# NoInAddrAny / NoCtldInAddrAny make every daemon, and srun, listen on the address that gethostname() resolves to, which
# must then be 127.0.0.1 (Debian's 127.0.1.1 will not do: replies come from 127.0.0.1)
HN=$(uname -n)
loop() { [ "$(getent ahostsv4 "$HN" | awk 'NR == 1 { print $1 }')" = 127.0.0.1 ]; }
if [ "${SLCI_HOSTS:-1}" = 1 ] && [ -w /etc/hosts ]; then
  for h in "${names[@]}"; do echo "127.0.0.1 $h # slurm_up $BASE"; done >> /etc/hosts
  loop || echo "127.0.0.1 $HN # slurm_up $BASE" >> /etc/hosts
fi
bind=CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
loop || { bind="# $HN is not 127.0.0.1"; say "warning: $HN does not resolve to 127.0.0.1; daemons listen on all addresses"; }

cat > "$C" <<CONF
ClusterName=loop
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=$ME
SlurmdUser=$ME
SlurmctldPort=$PORT
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket=$BASE/run/munge.sock,cred_expire=10
CredType=cred/munge
$bind
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool/%n
SlurmctldPidFile=$BASE/run/slurmctld.own.pid
SlurmdPidFile=$BASE/run/slurmd.%n.own.pid
SlurmctldLogFile=$BASE/log/slurmctld.log
SlurmdLogFile=$BASE/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
GresTypes=gpu
# take CPUs / RealMemory below as they are, whatever the hardware has
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=1
ReturnToService=2
JobRequeue=1
KillWait=5
InactiveLimit=0
MinJobAge=3600
MaxArraySize=10001
Include $BASE/etc/acct.conf
CONF
echo "AccountingStorageType=accounting_storage/none" > "$BASE/etc/acct.conf"
gres=; if [ "$GPUS" -gt 0 ]; then gres="Gres=gpu:${GTYPE:+$GTYPE:}$GPUS"; fi
k=0
for n in "${names[@]}"; do
  echo "NodeName=$n NodeAddr=127.0.0.1 NodeHostname=localhost Port=$((PORT + 10 + k)) CPUs=$CPUS RealMemory=$MEM $gres ${FEATS:+Features=$FEATS} State=UNKNOWN" >> "$C"
  k=$((k + 1))
done
def=YES
for p in ${PARTS//,/ }; do echo "PartitionName=$p Nodes=$nodelist Default=$def MaxTime=INFINITE DefaultTime=60 State=UP" >> "$C"; def=NO; done

# gpu gres needs device files, all of different names; links to /dev/null are enough (plain files give no CUDA_VISIBLE_DEVICES)
: > "$BASE/etc/gres.conf"
if [ "$GPUS" -gt 0 ]; then
  for i in $(seq 0 $((GPUS - 1))); do ln -s /dev/null "$BASE/dev/gpu$i"; done
  last=$((GPUS - 1)); range="[0-$last]"; if [ "$last" = 0 ]; then range=0; fi
  echo "NodeName=$nodelist Name=gpu ${GTYPE:+Type=$GTYPE} File=$BASE/dev/gpu$range Flags=nvidia_gpu_env" > "$BASE/etc/gres.conf"
fi
ver=$(slurmd -V | awk '{print $2}')
if [ "${ver%%.*}" -ge 23 ]; then echo "CgroupPlugin=disabled" > "$BASE/etc/cgroup.conf"; fi

cat > "$BASE/env.sh" <<ENV
export SLURM_CONF=$C
export SLCI_BASE=$BASE
case :\$PATH: in *:/usr/sbin:*) ;; *) export PATH=\$PATH:/usr/sbin;; esac
ENV
export SLURM_CONF=$C

# ---- daemons --------------------------------------------------------------
# start NAME CMD...: own session, no terminal, PID and kernel start time saved for down.sh
start() {
  local name=$1; shift
  ( cd "$BASE/run" && exec setsid "$@" ) < /dev/null > "$BASE/log/$name.out" 2>&1 &
  local pid=$!
  echo "$pid $(stat_start $pid) $name" >> "$BASE/run/pids"
}
# shellcheck disable=SC2086  # the fields of the line are wanted one by one
stat_start() { local s; s=$(cat /proc/"$1"/stat 2>/dev/null) || { echo 0; return; }; s=${s##*) }; set -- $s; if [ "$1" = Z ]; then echo 0; else echo "${20}"; fi; }
fail() { say "$1 failed"; tail -n 8 "$BASE"/log/* >&2 || :; SLCI_BASE=$BASE bash "$HERE/down.sh" >&2 || :; exit 1; }
until_ok() {  # until_ok NAME CMD...
  local name=$1 end; shift; end=$(( $(ms) + WAIT * 1000 ))
  until "$@" > /dev/null 2>&1; do
    if [ "$(ms)" -ge $end ]; then
      fail "waiting $WAIT s for $name"
    fi
    sleep 0.05
  done
}

start munged munged --foreground --key-file="$BASE/munge/key" --socket="$BASE/run/munge.sock" \
  --pid-file="$BASE/run/munged.own.pid" --seed-file="$BASE/munge/seed" --log-file="$BASE/log/munged.log" --num-threads=2
munge_ok() { munge --socket="$BASE/run/munge.sock" -n | unmunge --socket="$BASE/run/munge.sock"; }
until_ok munged munge_ok

if [ "$ACCT" = 1 ]; then
  mkdir -p "$BASE/db"
  # what mariadb-install-db does, without my_print_defaults (which would need the client packages)
  q=/usr/share/mysql
  { printf '%s\n' "CREATE DATABASE IF NOT EXISTS mysql;" "USE mysql;" "SET @auth_root_socket=NULL;"
    cat $q/mysql_system_tables.sql $q/mysql_performance_tables.sql $q/mysql_system_tables_data.sql; } |
    sed '/@current_hostname/d' |
    mariadbd --no-defaults --bootstrap --user="$ME" --datadir="$BASE/db" --silent-startup --enforce-storage-engine= \
      --loose-innodb-buffer-pool-size=10M --innodb-log-file-size=4M > "$BASE/log/dbinit.out" 2>&1 || fail "mariadbd --bootstrap"
  pw=$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')
  cat > "$BASE/munge/init.sql" <<SQL
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE OR REPLACE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '$pw';
CREATE OR REPLACE USER 'slurm'@'localhost' IDENTIFIED BY '$pw';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1', 'slurm'@'localhost';
SQL
  start mariadbd mariadbd --no-defaults --user="$ME" --datadir="$BASE/db" --socket="$BASE/run/db.sock" --pid-file="$BASE/run/mariadbd.own.pid" \
    --bind-address=127.0.0.1 --port=$((PORT + 2)) --init-file="$BASE/munge/init.sql" --skip-name-resolve --innodb-buffer-pool-size=64M --innodb-log-file-size=4M --innodb-lock-wait-timeout=900
  db_ok() { (exec 3<> /dev/tcp/127.0.0.1/$((PORT + 2))); }
  until_ok mariadbd db_ok
  dbind="#"; if loop; then dbind=CommunicationParameters=NoInAddrAny; fi
  cat > "$BASE/etc/slurmdbd.conf" <<DBD
AuthType=auth/munge
AuthInfo=socket=$BASE/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=$ME
$dbind
LogFile=$BASE/log/slurmdbd.log
PidFile=$BASE/run/slurmdbd.own.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 2))
StorageUser=slurm
StoragePass=$pw
StorageLoc=slurm_acct_db
DBD
  chmod 600 "$BASE/etc/slurmdbd.conf"
  cat > "$BASE/etc/acct.conf" <<ACC
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$BASE/run/munge.sock
AccountingStorageTRES=gres/gpu
ACC
  start slurmdbd slurmdbd -D
  dbd_ok() { sacctmgr -n -i show cluster; }
  until_ok slurmdbd dbd_ok
  sacctmgr -i add cluster loop > "$BASE/log/sacctmgr.out" 2>&1 || :
fi

start slurmctld slurmctld -D -f "$C"
# slurmd runs under a small child subreaper: proctrack/linuxproc loses processes whose parent has died. Under the
# subreaper they (and the daemonised slurmstepd) stay descendants of a PID that down.sh knows
cat > "$BASE/run/reap.py" <<'PY'
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
pid = os.fork()
if pid == 0:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.execvp(sys.argv[1], sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *a: os.kill(pid, signal.SIGTERM))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
while True:
    got, status = os.wait()
    if got == pid:
        sys.exit(os.waitstatus_to_exitcode(status) & 255)
PY
sup=(); if command -v python3 > /dev/null; then sup=(python3 "$BASE/run/reap.py"); fi
for n in "${names[@]}"; do start "slurmd.$n" "${sup[@]}" "$(command -v slurmd)" -D -N "$n" -f "$C"; done
ctld_ok() { case $(scontrol ping) in *'is UP'*) ;; *) return 1;; esac; }
until_ok slurmctld ctld_ok
idle_ok() { [ "$(sinfo -h -N -p "${PARTS%%,*}" -t idle -o %N | wc -l)" = "$NODES" ]; }
until_ok nodes idle_ok

T2=$(ms)
say "SLURM $ver up: $NODES nodes, $GPUS GPUs each, packages $((T1 - T0)) ms, daemons $((T2 - T1)) ms; now: . $BASE/env.sh"
