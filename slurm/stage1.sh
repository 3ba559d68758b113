#!/usr/bin/env bash
# Stage 1 on a cluster: train the glimpse and the visual importance predictor.
#
#   sbatch --nodes=4 slurm/stage1.sh conf/backbones/qwen2_5_vl_7b.yaml data.path=data/tags out=runs/stage1
#   sbatch slurm/stage1.sh conf/smoke.yaml                   two nodes, with or without GPUs, a few minutes
#   sbatch --array=0-2 slurm/stage1.sh ... out=runs/s        seeds 0, 1, 2 in runs/s-0, runs/s-1, runs/s-2
#   slurm/stage1.sh --nodes=4 ...                            checks data and weights now, then submits (slurm/launch.sh)
#
# Arguments are those of `python -m src.train conf/stage1.yaml`. If the first one is a YAML file with a line `stage:` or
# `extends:`, it is a recipe itself and conf/stage1.yaml is left out. Takes whole nodes and all their GPUs; to share one:
# --oversubscribe --gpus-per-node=1 --cpus-per-task=8 --mem=64G. Before its time is up the job saves, requeues itself and
# continues at the next sample; so it does after a node has died, from the last checkpoint.
#SBATCH --job-name=stage1
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
recipe=conf/stage1.yaml
go train "$@"
