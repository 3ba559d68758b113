#!/usr/bin/env bash
# Train the shipped base from scratch (two cores, about half an hour) and put it where the demo looks for it.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=268435456
.venv/bin/python -m src.pretrain experiments/tiny-base/config.yaml out=runs/tiny-base "$@"
cp runs/tiny-base/curve.json experiments/tiny-base/
mkdir -p data/tiny-qwen2_5_vl && cp runs/tiny-base/model/* data/tiny-qwen2_5_vl/
