#!/usr/bin/env bash
# The paper's table of answers in prose, Qwen2.5-VL-7B: twelve sets of Visual-CoT, a judge, three bounds (docs/reproduce.md).
#
#   sbatch --array=0-2 slurm/paper/freeform_qwen2_5_vl_7b.sh judge.base_url=http://node:8000/v1 judge.model=org/model
#
# Arguments are further ones of `python -m src.evaluate`. A job that SLURM starts again goes on where it was. The last
# thing that each does is to print what is published beside what there is by then.
#SBATCH --job-name=freeform_qwen2_5_vl_7b
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=96G
#SBATCH --time=48:00:00
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
source slurm/launch.sh
source slurm/paper/table.sh
table=freeform_qwen2_5_vl_7b
go freeform "$@"
