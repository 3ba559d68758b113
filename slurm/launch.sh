# How the scripts here work; they read this file, nobody runs it.
#
#   sbatch [OPTIONS] slurm/stage1.sh ARGUMENTS        from the repository root; the job checks itself when it starts
#   slurm/stage1.sh [OPTIONS] ARGUMENTS               checks first (.venv, config, data, weights, run folder), then sbatch
#   DRY_RUN=1 slurm/stage1.sh [OPTIONS] ARGUMENTS     checks, and prints what would be submitted and run
#
# OPTIONS are sbatch's, in the form --key=value. Within an allocation (salloc) a script runs there, at once.
# shellcheck shell=bash
source slurm/env.sh

fail() {
    echo "error: $*" >&2
    exit 2
}

in_job() { [ -n "${SLURM_JOB_ID:-}" ]; }

# Run a command, or print it if this is a dry run.
run() {
    if [ -z "${DRY_RUN:-}" ]; then "$@"; else printf '%q ' "$@" && echo; fi
}

# go COMMAND [OPTIONS] ARGUMENTS: what a script does with its own arguments. COMMAND names check_COMMAND and run_COMMAND.
go() {
    local command=$1 options=()
    shift
    if ! in_job; then
        while [[ ${1:-} == -* ]]; do options+=("$1") && shift; done
        case " ${options[*]-} " in *" -h "* | *" --help "*) sed -n '/^# /s/^# //p' "$0" && exit ;; esac
        no_gpus "$0" && options=(--gpus-per-node=0 "${options[@]}")
    fi
    command -v "${PYTHON[0]}" > /dev/null || fail "there is no ${PYTHON[0]}: run \`make install\`, or set PYTHON in slurm/env.sh"
    "check_$command" "$@"
    if in_job; then
        export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # nodes mostly have no network, and waiting for it takes minutes
        "run_$command" "$@"
    else
        run sbatch "${options[@]}" "$0" "$@"
        [ -z "${DRY_RUN:-}" ] || "run_$command" "$@"
    fi
}

# The header of a script asks for GPUs, but this cluster has none.
no_gpus() {
    local gres
    grep -q '^#SBATCH --gpus' "$1" && gres=$(sinfo --noheader --format=%G 2> /dev/null) && [[ $gres != *gpu* ]]
}

# ------------------------------------------------------------------------------------------------------------ training

# What `python -m src.train` is given: $recipe first, unless the first argument is a YAML file with a line `stage:` or
# `extends:`, which is a recipe itself and stands in for it; in an array job, seed=<task> and out=<out>-<task> last.
train_arguments() {
    local out=""
    [[ ${1:-} == *.y*ml && ! -f $1 ]] && fail "there is no file $1"
    if [[ ${1:-} == *.y*ml ]] && grep -qE '^(stage|extends):' "$1"; then arguments=("$@"); else arguments=("${recipe:?}" "$@"); fi
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        for word in "$@"; do [[ $word != out=* ]] || out=${word#out=}; done
        [ -n "$out" ] || fail "an array job writes to <out>-<task>: give out=..."
        arguments+=("seed=$SLURM_ARRAY_TASK_ID" "out=$out-$SLURM_ARRAY_TASK_ID")
    fi
}

check_train() {
    train_arguments "$@"
    # In the job this is the only process yet: data are made here, so that no two ranks ever do it at the same time.
    in_job && [ -z "${DRY_RUN:-}" ] && arguments+=(make_data=true)
    "${PYTHON[@]}" -m src.preflight train "${arguments[@]}"
}

run_train() {
    train_arguments "$@"
    one_per_gpu --label
    run srun "${options[@]}" bash slurm/rank.sh "${PYTHON[@]}" -m src.train "${arguments[@]}"
}

# one_per_gpu OPTIONS: srun's options for a task on each GPU that answers, or on each node; they share the node's CPUs.
one_per_gpu() {
    local tasks
    options=(--kill-on-bad-exit=1 "$@")
    if in_job; then
        local gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
        gpus=${gpus##*:} # of a100:8
        # A whole node brings its GPUs to the job, but not to the job's steps, unless they ask.
        [ "$gpus" = 0 ] || options+=("--gpus-per-node=$gpus")
        nvidia-smi > /dev/null 2>&1 || gpus=0
        tasks=${TASKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
        unset SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK # the job's, against which newer versions of srun would hold ours
        options+=("--cpus-per-task=$((SLURM_CPUS_ON_NODE > tasks ? SLURM_CPUS_ON_NODE / tasks : 1))")
    fi
    options=("--ntasks-per-node=${tasks:-GPUS}" "${options[@]}")
}

# ---------------------------------------------------------------------------------------------- evaluation, preparation

# A job that SLURM starts again goes on where it was.
resuming_arguments() {
    arguments=("$@")
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || arguments+=(resume=true)
}

check_evaluate() {
    resuming_arguments "$@"
    "${PYTHON[@]}" -m src.preflight evaluate "${arguments[@]}"
}

run_evaluate() {
    resuming_arguments "$@"
    one_per_gpu
    run srun "${options[@]}" "${PYTHON[@]}" -m src.evaluate "${arguments[@]}"
}

check_prepare() { :; }

run_prepare() {
    local workers=${SLURM_CPUS_PER_TASK:-1}
    resuming_arguments "$@"
    run srun --ntasks=1 "--cpus-per-task=$workers" "${PYTHON[@]}" -m src.prepare "workers=$workers" "${arguments[@]}"
}
