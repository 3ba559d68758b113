#!/usr/bin/env bash
# Stage 1 -> stage 2 -> evaluate: three jobs, each queued behind the one before. Run it on the login node, without sbatch.
#
#   slurm/pipeline.sh [OPTIONS] out=runs/x STAGE1 ARGUMENTS [-- STAGE2 ARGUMENTS [-- EVALUATE ARGUMENTS]]
#   slurm/pipeline.sh --nodes=4 out=runs/x conf/backbones/qwen2_5_vl_7b.yaml data.path=data/tags -- trainer.max_steps=500
#
# Run folders are <out>/stage1 and <out>/stage2; the scores are in the second. OPTIONS are sbatch's, for both trainings.
# All arguments are checked before anything is queued. A stage that fails takes those behind it off the queue; one that
# is requeued keeps them waiting. DRY_RUN=1 checks and prints.
set -euo pipefail
cd "$(dirname "$0")/.."
source slurm/launch.sh

options=() out="" part=0 stage1=() stage2=() evaluate=()
for word in "$@"; do
    case $part:$word in
        *:--) part=$((part + 1)) ;;
        0:-*) options+=("$word") ;;
        0:out=*) out=${word#out=} ;;
        0:*) stage1+=("$word") ;;
        1:*) stage2+=("$word") ;;
        2:*) evaluate+=("$word") ;;
        *) fail "there are three stages at most" ;;
    esac
done
[ -n "$out" ] || fail "give out=<folder for both run folders>"
command -v "${PYTHON[0]}" > /dev/null || fail "there is no ${PYTHON[0]}: run \`make install\`, or set PYTHON in slurm/env.sh"

recipe=conf/stage1.yaml
train_arguments "${stage1[@]}"
"${PYTHON[@]}" -m src.preflight train "${arguments[@]}" out="$out/stage1"
# Stage 2 will take backbone, pruner and data from a run that is not there yet: for now from the arguments of stage 1.
"${PYTHON[@]}" -m src.preflight train "${arguments[@]}" conf/stage2.yaml "${stage2[@]}" out="$out/stage2"
"${PYTHON[@]}" -m src.preflight evaluate ckpt="$out/stage2" "${evaluate[@]}" planned=true

# Queue a script with $options behind another job (or "") and leave its number in $job.
queue() {
    local after=$1 script=$2
    shift 2
    local command=(sbatch --parsable --kill-on-invalid-dep=yes ${after:+"--dependency=afterok:$after"})
    command+=("${options[@]}" "$script" "$@")
    if [ -n "${DRY_RUN:-}" ]; then
        run "${command[@]}"
        job=$(basename "$script" .sh)
    else
        job=$("${command[@]}")
        job=${job%%;*} # of <job>;<cluster>
    fi
}

queue "" slurm/stage1.sh "${stage1[@]}" out="$out/stage1"
first=$job
queue "$first" slurm/stage2.sh init_from="$out/stage1" "${stage2[@]}" out="$out/stage2"
second=$job
options=()
if no_gpus slurm/evaluate.sh; then options=(--gpus-per-node=0); fi
queue "$second" slurm/evaluate.sh ckpt="$out/stage2" "${evaluate[@]}"
echo "queued: stage 1 $first, stage 2 $second, evaluation $job; their logs will be in logs/"
