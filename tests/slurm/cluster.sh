#!/usr/bin/env bash
# A throw-away SLURM on one machine: a controller, two nodes without GPUs, munge; no systemd, no cgroups, no database.
#
#   tests/slurm/cluster.sh start FOLDER      then: export SLURM_CONF=FOLDER/slurm.conf, and sbatch, squeue ... as usual
#   tests/slurm/cluster.sh node FOLDER NAME  start the daemon of one node (again, after it was killed)
#   tests/slurm/cluster.sh stop FOLDER       kill all jobs and daemons; FOLDER with its logs stays
#
# Needs root and Debian's packages: apt-get install --no-install-recommends slurm-wlm munge
set -euo pipefail
action=$1 folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf
# Ranks meet at the name of the first node, so it must resolve. Loopback addresses do, without touching /etc/hosts.
nodes=(127.0.0.1 127.0.0.2)
port=${SLURM_PORT:-17817}

configure() {
    mkdir -p "$folder"/{munge,state,spool}
    chmod 755 "$folder/munge"
    (umask 077 && head -c 128 /dev/urandom > "$folder/munge/key")
    cat > "$SLURM_CONF" << CONF
ClusterName=throwaway
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired: 120 s by default.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
# The two nodes claim more than the machine has.
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout=9
SlurmctldTimeout=10
KillWait=5
MinJobAge=3600
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
$(for i in "${!nodes[@]}"; do
    echo "NodeName=${nodes[i]} NodeAddr=${nodes[i]} NodeHostname=localhost Port=$((port + 1 + i)) CPUs=4 RealMemory=64000"
done)
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    configure
    munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge/seed" --force
    slurmctld
    for name in "${nodes[@]}"; do slurmd -N "$name"; done
    for _ in $(seq 100); do
        [ "$(sinfo -h -N -t idle -o %N 2> /dev/null | wc -l)" = ${#nodes[@]} ] && return
        sleep 0.2
    done
    echo "the cluster does not come up:" >&2
    tail -n 20 "$folder"/*.log >&2
    return 1
}

stop() {
    scancel --user=root 2> /dev/null || true
    for _ in $(seq 50); do if [ -z "$(squeue -h 2> /dev/null)" ]; then break; else sleep 0.2; fi; done
    for file in "$folder"/slurmd.*.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
        [ -f "$file" ] || continue
        pid=$(cat "$file")
        # A file that a killed daemon left may name a process that is not ours.
        if grep -qE '^(slurm|munge)' "/proc/$pid/comm" 2> /dev/null; then kill "$pid"; fi
    done
}

case $action in
    start) start ;;
    node) slurmd -N "$3" ;;
    stop) stop ;;
    *) sed -n '2,8p' "$0" >&2 && exit 2 ;;
esac
