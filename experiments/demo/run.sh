#!/usr/bin/env bash
# The demo's training with ten seeds on one data set, each scored on 2,048 fresh questions that need the tokens; seed 0
# on 1,023 of the 2,046 test questions, too, of all kinds and with all controls (../plus asks all of them).
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=268435456
.venv/bin/python -m src.prepare source=tags out=runs/demo-data overwrite=true workers=2 image_format=jpg \
  options.count="{train: 3840, val: 510, test: 2046}"
.venv/bin/python -m src.prepare source=tags out=runs/fresh-data overwrite=true workers=2 image_format=jpg \
  options.seed=7 options.kinds=[number,pair] options.count="{train: 6, val: 2048, test: 6}"
for seed in 0 1 2 3 4 5 6 7 8 9; do
  .venv/bin/python -m src.train conf/demo.yaml out=runs/demo-$seed overwrite=true seed=$seed data.path=runs/demo-data "$@"
  .venv/bin/python -m src.evaluate ckpt=runs/demo-$seed data.path=runs/fresh-data data.split=val 'controls=[none]' \
    data.batch_size=64 max_new_tokens=6 bootstrap=0 pictures=0 out=runs/demo-$seed/fresh
done
.venv/bin/python -m src.evaluate ckpt=runs/demo-0 limit=1023
