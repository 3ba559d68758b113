#!/usr/bin/env bash
# An RL step of ours beside one of TRL's GRPOTrainer, on the shipped tiny model (ten minutes of CPU time) and on one of a
# middle size. Prints the tables of README.md, writes every step to tiny.json and mid.json.
# TRL is no dependency: give a python that has it, better in an environment of its own (and without torchvision):
#   PYTHON=<environment>/bin/python experiments/rl-speed/run.sh        after `pip install trl==1.16.0 -c constraints.txt`
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
$python benchmarks/grpo.py tiny 8 0 experiments/rl-speed/tiny.json
$python benchmarks/grpo.py mid 6 0 experiments/rl-speed/mid.json
