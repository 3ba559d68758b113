#!/usr/bin/env bash
# A private look on the tiny base, trained on the demo's questions and scored on 2,048 fresh ones that need the tokens.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=268435456
.venv/bin/python -m src.prepare source=tags out=runs/demo-data overwrite=true workers=2 image_format=jpg \
  options.count="{train: 3840, val: 126, test: 510}"
.venv/bin/python -m src.prepare source=tags out=runs/fresh-data overwrite=true workers=2 image_format=jpg \
  options.seed=7 options.kinds=[number,pair] options.count="{train: 6, val: 2048, test: 6}"
.venv/bin/python -m src.train conf/early.yaml data.path=runs/demo-data out=runs/early overwrite=true "$@"
.venv/bin/python -m src.evaluate ckpt=runs/early data.path=runs/fresh-data data.split=val 'controls=[none]' \
  data.batch_size=64 max_new_tokens=6 bootstrap=0 pictures=0 out=runs/early/fresh
.venv/bin/python -m src.evaluate ckpt=runs/early data.batch_size=64 max_new_tokens=6
