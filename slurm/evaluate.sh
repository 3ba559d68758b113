#!/usr/bin/env bash
# Evaluate a run folder, a published pruner, or methods without weights, on one GPU or several.
#
#   sbatch slurm/evaluate.sh ckpt=runs/stage1
#   sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=16 slurm/evaluate.sh ckpt=runs/stage1    eight processes share it
#   sbatch --gpus-per-node=0 slurm/evaluate.sh ckpt=runs/smoke       on a cluster without GPUs
#   slurm/evaluate.sh ckpt=runs/stage1                               checks first; knows by itself if there are GPUs
#
# Arguments are those of `python -m src.evaluate`. A job that SLURM starts again goes on where it was.
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
