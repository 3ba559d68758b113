#!/usr/bin/env bash
# The paper's table of short answers, LLaVA-1.5-7B: lmms-eval's tasks at three bounds (docs/reproduce.md).
#
#   sbatch slurm/paper/short_llava1_5_7b.sh
#
# What is run is conf/paper/short_llava1_5_7b.yaml, by lmms-eval (docs/lmms-eval.md), whose tasks and weights must have been
# downloaded. A job that SLURM starts again takes what was answered from lmms-eval's cache.
#SBATCH --job-name=short_llava1_5_7b
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
table=short_llava1_5_7b
go short "$@"
