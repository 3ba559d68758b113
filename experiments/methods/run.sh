#!/usr/bin/env bash
# The demo's run beside four methods without weights, at one cost of each kind: tokens kept, K/V held, decoder FLOPs.
set -euo pipefail
cd "$(dirname "$0")/../.."
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=268435456
.venv/bin/python -m src.prepare source=tags out=runs/methods-data overwrite=true workers=2 image_format=jpg \
  options.count="{train: 3840, val: 126, test: 2046}"
.venv/bin/python -m src.train conf/demo.yaml out=runs/methods data.path=runs/methods-data overwrite=true "$@"
for budget in kept=.06 kv=.42 decoder_flops=.85; do
  .venv/bin/python -m src.evaluate ckpt=runs/methods methods=[glimpse,fastv,pyramiddrop,visionzip,divprune] \
    budget.$budget limit=1023 out=runs/methods-${budget%=*} overwrite=true
  .venv/bin/python -m src.report runs/methods-${budget%=*}
  # These two number survivors anew, as published, which takes rows and columns from M-RoPE: here without.
  .venv/bin/python -m src.evaluate backbone.path=data/tiny-qwen2_5_vl data.path=runs/methods-data \
    methods=[pyramiddrop,divprune] options.pyramiddrop.renumber=false options.divprune.renumber=false \
    controls=[none,zero] budget.$budget limit=1023 out=runs/methods-${budget%=*}-positions-kept overwrite=true
done
