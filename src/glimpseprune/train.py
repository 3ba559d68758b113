"""Train: ``python -m src.train conf/stage1.yaml data.path=data/gqa out=runs/stage1``.

Reads a config, loads the frozen LVLM, streams shards and fits a LightningModule of ``training/``. The run folder then
holds config.yaml, trainable.safetensors, metrics.jsonl, a TensorBoard log and Lightning's checkpoints; it can be
resumed (``resume=true``; a job that SLURM starts again resumes by itself), evaluated (``python -m src.evaluate
ckpt=<out>``) and started from (``init_from=<out>``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glimpseprune import config, files, processes, resources, runs, training
from glimpseprune.config import UserError
from glimpseprune.options import TrainConfig
from glimpseprune.prepare import make_missing
from glimpseprune.types import Sample

SAMPLES = 64
"""Of the data, looked at for boxes before a training that goes by them."""
INSTEAD = "give data with boxes, or conf/stage1.yaml, which needs none"


def inherited(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a run takes over from the run folder it starts from, unless told otherwise."""
    source = Path(resources.find(str(given.get("init_from")))) / "config.yaml"
    if not source.is_file():
        if given.get("init_from") is not None and "path" not in given.get("backbone", {}):
            raise UserError(f"init_from={given['init_from']} is no run folder, which would say what backbone it has")
        return {}
    saved = config.read(TrainConfig, source)
    pruner = given.get("pruner", {}).get("name", saved.pruner.name) == saved.pruner.name
    return {
        "backbone": vars(saved.backbone),
        "data": {name: getattr(saved.data, name) for name in ("path", "val_path", "fields", "storage")},
        "lora": None if saved.lora is None else vars(saved.lora),
        **({"pruner": vars(saved.pruner)} if pruner else {}),
    }


@config.entry(TrainConfig, inherited)
def main(cfg: TrainConfig) -> None:
    training.require(cfg.stage)
    require_launcher(cfg)
    with runs.Run(cfg.out) if is_first_process() else nullcontext() as run:
        fit(cfg, run)


def fit(cfg: TrainConfig, run: runs.Run | None) -> None:
    """Train; ``run`` is the folder, in the process that takes care of it."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        processes.end_with(os.getppid())  # the first process on this machine, or torchrun
    last = last_checkpoint(cfg)
    if run is not None:
        run.claim()
        make_missing(cfg.data.path, cfg.data.prepare)

    import lightning as L
    import torch

    from glimpseprune import backbones, checkpoint
    from glimpseprune.data.collate import Collator
    from glimpseprune.data.limits import Limits, tokens_of
    from glimpseprune.data.module import ShardDataModule
    from glimpseprune.data.shards import Store
    from glimpseprune.pruners import glimpse
    from glimpseprune.running import slurm, strategies
    from glimpseprune.running.astray import Astray
    from glimpseprune.running.callbacks import Begin, GuardRails, RunFolder
    from glimpseprune.running.checkpoints import Checkpoints
    from glimpseprune.running.interrupts import Interrupts
    from glimpseprune.running.logs import Journal, loggers, quiet
    from glimpseprune.running.nonfinite import StopOnNonFinite
    from glimpseprune.running.stalls import Stall
    from glimpseprune.running.throughput import Throughput

    quiet()
    stage = training.stage_of(cfg.stage)
    out = Path(cfg.out)
    if cfg.lora is None and cfg.init_from is not None and checkpoint.read_config(cfg.init_from).lora is not None:
        raise UserError(f"lora=null, but {cfg.init_from} has adapters: leave lora out, or merge them with src.export")
    # Everything but the numbers: what is wrong with the options is said before a model is loaded.
    architecture = backbones.architecture(resources.find(cfg.backbone.path))
    outline = checkpoint.outline(architecture, cfg.backbone, cfg.pruner, cfg.lora)
    if (token := cfg.pruner.options.get("init_token")) is not None:
        glimpse.token_id(outline.backbone.load_processor(resources.find(cfg.backbone.path)), str(token))
    outline = stage(cfg, outline.backbone, outline.pruner)
    strategies.read(cfg.trainer.strategy)
    own = {"devices": cfg.trainer.devices, "num_nodes": cfg.trainer.nodes}
    placement = slurm.placement() if slurm.launched() else own
    devices = strategies.devices(cfg.trainer.accelerator, placement["devices"])
    backbones.require_attention(cfg.backbone.attention, devices[0])
    data = ShardDataModule(
        cfg.data.path,
        batch_size=cfg.data.batch_size,
        val_limit=cfg.data.val_samples,
        workers=cfg.data.workers,
        seed=cfg.seed,
        together=cfg.data.together,
        verify=cfg.data.verify,
        store=Store.of(cfg.data),
        mix=cfg.data.mix,
        val_folder=cfg.data.val_path,
        bucket=cfg.data.bucket,
        limits=Limits(cfg.data.max_pixels, cfg.data.max_tokens, cfg.data.above),
    )
    name = strategies.choose(
        cfg.trainer.strategy,
        processes=len(devices) * placement["num_nodes"],
        cuda=devices[0] != "cpu",
        deepspeed=find_spec("deepspeed") is not None,
        trained=sum(p.numel() for p in outline.trainable()),
    )
    require_data(cfg, data.datasets["train"], len(devices) * placement["num_nodes"])
    strategy = strategies.build(name, cfg.optim.clip)
    plugins = [*placement.pop("plugins", []), *([strategies.Direct()] if isinstance(strategy, str) else [])]
    weights = outline.backbone.lm_head.weight.dtype
    half = weights != torch.float32 or cfg.trainer.precision in ("bf16-true", "16-true")
    if {"decoder", "vision"} & set(cfg.train) and half and isinstance(strategy, str):
        raise UserError(
            "train: updates of weights in half precision would be rounded away: give backbone.dtype=float32 "
            "(and trainer.precision=bf16-mixed), or trainer.strategy=zero2"
        )
    astray = Astray(cfg, strategy)
    if last is not None:
        require_same(cfg, last, len(devices) * placement["num_nodes"])
    checkpoints = Checkpoints(out, cfg.trainer.last_checkpoints, stage.best)
    # What was logged after the checkpoint comes again: TensorBoard is told to forget it.
    again = None if last is None else torch.load(last, mmap=True, weights_only=True)["global_step"] + 1
    trainer = L.Trainer(
        accelerator=cfg.trainer.accelerator,
        **placement,
        plugins=plugins,
        strategy=strategy,
        precision=strategies.precision(cfg.trainer.precision, strategy, weights),
        max_steps=cfg.trainer.max_steps,
        accumulate_grad_batches=cfg.trainer.accumulate if outline.automatic_optimization else 1,
        gradient_clip_val=(cfg.optim.clip or None) if outline.automatic_optimization else None,
        val_check_interval=outline.batches(cfg.trainer.val_every),
        check_val_every_n_epoch=None,
        log_every_n_steps=cfg.trainer.log_every,
        num_sanity_val_steps=0,
        enable_checkpointing=False,  # Lightning's; ours is below
        enable_progress_bar=False,  # nor its bar, nor its table of modules: see Journal
        enable_model_summary=False,
        logger=loggers(cfg.trainer.logger, out, again),
        callbacks=[
            Begin(cfg, run, anew=last is None),  # first of all
            astray,
            Throughput(cfg.watch, cfg.trainer.log_every),
            Journal(out, cfg.trainer.max_steps, cfg.trainer.log_every),
            StopOnNonFinite(out, cfg.watch),
            *([] if cfg.stage != "grpo" else [GuardRails(cfg.guard)]),
            RunFolder(cfg),
            checkpoints,
            slurm.Requeue(checkpoints) if slurm.launched() else Interrupts(checkpoints),
            *([Stall(out / "heartbeats", cfg.watch.stall_minutes)] if cfg.watch.stall_minutes else []),
        ],
    )
    L.seed_everything(cfg.seed, workers=True)
    with strategies.splitting(trainer):
        model = checkpoint.load(
            cfg.init_from,
            backbone=cfg.backbone,
            pruner=cfg.pruner,
            lora=cfg.lora,
            device=strategies.mine(devices),
            fresh=True,
        )
    data.collate, data.tokens = Collator(model.backbone), tokens_of(model.backbone)
    tell_left_out(data)
    module = stage(cfg, model.backbone, model.pruner)
    if cfg.lora is not None and cfg.lora.first_layer is None:
        cfg.lora.first_layer = module.depth  # where they are, whatever pruner loads them

    trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
    if data.damaged:
        print(f"{sum(data.damaged.values())} damaged samples were replaced: {dict(data.damaged.most_common(5))}")
    strategies.leave()
    if trainer.is_global_zero:
        print(config.as_typed(f"run folder: {cfg.out}   evaluate it: python -m src.evaluate ckpt={cfg.out}"))


def tell_left_out(data: Any) -> None:
    """Say what of the samples takes no part, and why."""
    above = data.measure()
    for role, dataset in data.datasets.items():
        for reason, count in sorted((dataset.shards.left_out + above.get(role, Counter())).items()):
            if is_first_process():
                print(f"note: {count} samples for {role} of {dataset.shards.folder} are left out: {reason}")


def require_launcher(cfg: TrainConfig) -> None:
    """Raises UserError where a training on several nodes was started on this one only, and would wait for the others
    for ever. Who starts them all tells each who is the first: srun, torchrun, a person."""
    if cfg.trainer.nodes > 1 and not {"SLURM_STEP_ID", "MASTER_ADDR", "JSM_NAMESPACE_RANK"} & set(os.environ):
        raise UserError(
            f"trainer.nodes={cfg.trainer.nodes}: nobody starts the other nodes: use sbatch slurm/stage1.sh, or on each "
            f"node torchrun --nnodes={cfg.trainer.nodes} --rdzv-endpoint=<first node>:29500 -m src.train ..."
        )


def require_data(cfg: TrainConfig, dataset: Sequence[Sample], processes: int) -> None:
    """Raises UserError where the training samples are too few for a step, or have no boxes where the loss is about
    boxes; some that have none are no part of it, and a line says how many."""
    key, size = f"data.path={cfg.data.path}", cfg.data.batch_size
    if len(dataset) < size * processes:
        raise UserError(f"data.batch_size={size} on {processes} processes: {key} has {len(dataset)} training samples")
    needs = f"loss.mask={cfg.loss.mask:g}" if cfg.stage == "glimpse" and cfg.loss.mask else ""
    needs = "grpo.masks=boxes" if cfg.stage == "grpo" and cfg.grpo.masks == "boxes" else needs
    if not needs:
        return
    looked = [dataset[index] for index in sorted({len(dataset) * part // SAMPLES for part in range(SAMPLES)})]
    boxed = sum(sample.boxes is not None for sample in looked)
    if not boxed:
        raise UserError(f"{needs} goes by boxes, and none of {len(looked)} samples of {key} has any: {INSTEAD}")
    if boxed < len(looked) and is_first_process():
        print(f"note: {boxed} of {len(looked)} samples of {key} have boxes; {needs} says nothing about the others")


def is_first_process() -> bool:
    """Whether this process, of those that train together, takes care of the run folder; launchers say so."""
    rank = next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0")
    return int(rank) == int(os.environ.get("NODE_RANK", "0")) == 0


def last_checkpoint(cfg: TrainConfig) -> Path | None:
    """The checkpoint to resume from, if any; UserError where two runs would mix in one folder. Changes nothing."""
    out = files.resolved(cfg.out)
    again = _is_own_work(out)
    if again or cfg.resume:
        from glimpseprune.running.checkpoints import newest

        if (last := newest(out)) is not None:
            return last
    if cfg.resume:
        begin = "" if runs.is_empty(out) else ", and overwrite=true"
        raise UserError(
            f"resume=true, but '{out}' has no checkpoint (in {out / 'checkpoints'}): start without it{begin}"
        )
    if is_first_process() and not again and not runs.is_empty(out):
        if not cfg.overwrite:
            raise UserError(f"out={out} is not empty: give resume=true, overwrite=true, or another folder")
        runs.require_ours(out, TrainConfig)
    return None


def require_same(cfg: TrainConfig, last: Path, processes: int) -> None:
    """Raise UserError where the run whose checkpoint ``last`` is would go on as another one."""
    from glimpseprune import checkpoint
    from glimpseprune.running.checkpoints import entry

    out = last.parents[1]
    if not (out / checkpoint.CONFIG).is_file():
        return
    saved = checkpoint.read_config(out)
    world = entry(last).get("world", processes)
    was, is_ = (c.data.batch_size * c.trainer.accumulate * n for c, n in ((saved, world), (cfg, processes)))
    if was != is_:
        raise UserError(
            f"resume=true: a step was of {was} samples (data.batch_size={saved.data.batch_size} x trainer.accumulate="
            f"{saved.trainer.accumulate} x {world} processes), would be of {is_}: give data.batch_size and "
            f"trainer.accumulate that come to the same on {processes}"
        )
    saved.data.batch_size, saved.trainer.accumulate = cfg.data.batch_size, cfg.trainer.accumulate
    runs.require_same(saved, cfg, out)


def _is_own_work(out: Path) -> bool:
    """Whether SLURM has started this job again (a requeue, a dead node), and ``out`` is what it wrote before."""
    job, file = os.environ.get("SLURM_JOB_ID"), out / runs.JOB
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and file.is_file() and file.read_text() == job
