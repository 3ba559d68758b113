#!/usr/bin/env bash
# The demo's training with three seeds on one data set, each scored on 2,048 test questions.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=268435456
.venv/bin/python -m src.prepare source=tags out=runs/demo-data overwrite=true workers=2 image_format=jpg options.count="{train: 3840, val: 510, test: 2046}"
for seed in 0 1 2; do
  .venv/bin/python -m src.train conf/demo.yaml out=runs/demo-$seed overwrite=true seed=$seed data.path=runs/demo-data "$@"
  .venv/bin/python -m src.evaluate ckpt=runs/demo-$seed
done
