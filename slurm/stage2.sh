#!/usr/bin/env bash
# Stage 2 on a cluster: reinforce the language model on its pruned sequences, from a stage-1 run.
#
#   sbatch --nodes=4 slurm/stage2.sh init_from=runs/stage1 out=runs/stage2
#   sbatch slurm/stage2.sh init_from=runs/stage1 out=runs/stage2 $(cat logs/judge-17.args)    with the judge of job 17
#   slurm/stage2.sh --nodes=4 ...                            checks what it starts from now, then submits
#
# Arguments are those of `python -m src.train conf/stage2.yaml`. All else is as in slurm/stage1.sh.
#SBATCH --job-name=stage2
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/launch.sh
recipe=conf/stage2.yaml
go train "$@"
