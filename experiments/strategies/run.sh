#!/usr/bin/env bash
# One training of stage 1 (six steps of eight samples) and one of stage 2, under every strategy, on two CPU processes.
# DeepSpeed must be there: DS_BUILD_OPS=0 pip install deepspeed.   Writes results.json, prints the tables of README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=268435456
out=runs/strategies
one=(data.workers=0 trainer.log_every=1 trainer.accelerator=cpu overwrite=true)
for strategy in auto ddp zero1 zero2 zero3 zero3_offload; do
  if [ $strategy = auto ]; then share=(trainer.devices=1 data.batch_size=8); else share=(trainer.devices=2 data.batch_size=4); fi
  .venv/bin/python -m src.train conf/smoke.yaml out=$out/stage1-$strategy data.path=$out/data trainer.strategy=$strategy \
    trainer.max_steps=6 trainer.val_every=3 pruner.options.dropout=0 loss.pressure_kind=budget loss.target=0.1 \
    "${one[@]}" "${share[@]}"
done
for strategy in ddp zero1 zero2 zero3 zero3_offload; do
  .venv/bin/python -m src.train conf/demo_plus.yaml init_from=$out/stage1-auto out=$out/stage2-$strategy data.path=$out/data \
    trainer.strategy=$strategy trainer.devices=2 data.batch_size=2 grpo.num_generations=8 grpo.micro_batch=6 \
    data.val_samples=8 trainer.max_steps=4 trainer.val_every=2 optim.warmup=1 "${one[@]}"
done
.venv/bin/python - $out experiments/strategies/results.json <<'PYTHON'
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

runs, target = map(Path, sys.argv[1:])
packages = {name: version(name) for name in ("torch", "transformers", "lightning", "deepspeed")}
results = {"machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU", "versions": packages}
metrics = {"stage1": ("loss", "grad_norm"), "stage2": ("reward", "keep_ratio/sampled", "completions/mean_length", "grad_norm")}
for stage, names in metrics.items():
    logs = {run: EventAccumulator(str(run / "tensorboard" / run.name)).Reload() for run in sorted(runs.glob(f"{stage}-*"))}
    results[stage] = {
        name: {
            run.name.partition("-")[2]: [round(event.value, 6) for event in log.Scalars(f"train/{name}")]
            for run, log in logs.items()
        }
        for name in names
    }
    for name, rows in results[stage].items():
        print(f"\n{stage}, train/{name} per step")
        for strategy, values in rows.items():
            print(f"| {strategy} | " + " | ".join(f"{value:.6f}" for value in values) + " |")
target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
PYTHON
