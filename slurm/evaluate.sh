#!/usr/bin/env bash
# Evaluate a run folder, or a published pruner, on one GPU.
#
#   sbatch slurm/evaluate.sh ckpt=runs/stage1
#   sbatch --gpus-per-node=0 slurm/evaluate.sh ckpt=runs/smoke       on a cluster without GPUs
#   slurm/evaluate.sh ckpt=runs/stage1                               checks first; knows by itself if there are GPUs
#
# Arguments are those of `python -m src.evaluate`.
#SBATCH --job-name=evaluate
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=48G
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/launch.sh
go evaluate "$@"
