#!/usr/bin/env bash
# Turn a raw dataset into shards, on the CPUs of one node.
#
#   sbatch --cpus-per-task=32 slurm/prepare.sh source=tags out=data/tags
#
# Arguments are those of `python -m src.prepare`, but for workers: one per CPU.
#SBATCH --job-name=prepare
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=12:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source slurm/launch.sh
go prepare "$@"
