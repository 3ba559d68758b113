# What is special about your cluster: the one file here to edit. Every job reads it on its first node, and so does the
# login node: `slurm/stage1.sh ...` by itself, a plain `sbatch slurm/stage1.sh ...` after `source slurm/env.sh`.

# shellcheck shell=bash

# Options that all jobs need. They win over a script's #SBATCH lines; options of the command line win over them.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my-project
# export SBATCH_GPUS_PER_NODE=8   # where whole nodes (--exclusive) do not bring their GPUs with them

# module load cuda/12.8
# export HF_HOME=/scratch/$USER/huggingface
# export NCCL_SOCKET_IFNAME=ib0
# TASKS_PER_NODE=8                # where nvidia-smi cannot count the GPUs; default: one task per GPU, or one

# A container goes here, too: PYTHON=(apptainer exec --nv image.sif python). Jobs requeue themselves through scontrol,
# which must then be in it.
[ -n "${PYTHON+set}" ] || PYTHON=("$PWD/.venv/bin/python")
# An environment of its own, for vLLM wants another torch: python3 -m venv .venv-judge; .venv-judge/bin/pip install vllm
[ -n "${VLLM+set}" ] || VLLM=("$PWD/.venv-judge/bin/vllm")

export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# On CPUs torch is up to ten times faster when glibc keeps large activations instead of handing them back.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=268435456
