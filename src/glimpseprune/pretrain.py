"""``python -m src.pretrain``: train the tiny Qwen2.5-VL of the embedded default from scratch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from zipfile import is_zipfile

from glimpseprune import config, files, runs
from glimpseprune.config import UserError
from glimpseprune.tiny.config import PretrainConfig


@config.entry(PretrainConfig)
def main(cfg: PretrainConfig) -> None:
    from glimpseprune.running import strategies

    strategies.devices(cfg.accelerator, 1)
    with runs.Run(cfg.out) as run:
        require_room(cfg, run.out)
        run.claim()
        with config.advising(lambda: advice(run.out)):
            fit(cfg, run)


def require_room(cfg: PretrainConfig, out: Path) -> None:
    """Raise UserError where another run is, or no checkpoint to go on from."""
    if cfg.resume is not None and not is_zipfile(cfg.resume):  # which torch's checkpoints are
        raise UserError(f"resume={cfg.resume}: there is no such checkpoint, as <out>/checkpoints/last.ckpt is")
    if runs.is_empty(out):
        return
    if cfg.resume is None and not cfg.overwrite:
        raise UserError(
            f"out={out} is not empty: give another folder, overwrite=true, or resume={out}/checkpoints/last.ckpt"
        )
    runs.require_ours(out, PretrainConfig)


def advice(out: Path) -> str:
    last = out / "checkpoints" / "last.ckpt"
    return f"go on with: {config.command(f'resume={last}')}" if last.is_file() else ""


def fit(cfg: PretrainConfig, run: runs.Run) -> None:
    """Train a tiny Qwen2.5-VL from scratch on the tags data and save it as a Hugging Face folder."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    from glimpseprune.running.callbacks import Begin
    from glimpseprune.tiny.module import PretrainModule

    out = run.out
    L.seed_everything(cfg.seed, workers=True)
    module = PretrainModule(cfg)
    trainer = L.Trainer(
        accelerator=cfg.accelerator,
        devices=1,
        precision=cfg.precision,
        max_epochs=1,
        val_check_interval=cfg.val_every,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        callbacks=[
            Begin(cfg, run, anew=cfg.resume is None),
            ModelCheckpoint(out / "checkpoints", every_n_train_steps=cfg.val_every, save_top_k=0, save_last=True),
        ],
        logger=TensorBoardLogger(out, name=None, version="tensorboard"),
    )
    began, cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, ckpt_path=cfg.resume)
    trainer.validate(module, verbose=False)
    seconds = {"wall": round(time.perf_counter() - began, 1), "cpu": round(time.process_time() - cpu, 1)}
    files.write_json(out / "curve.json", {"seconds": seconds, "curve": module.curve}, indent=1)
    with files.folder(out / "model") as partial:
        module.save(str(partial))
    print(json.dumps(module.curve[-1], indent=1))
    print(f"model saved in {out / 'model'} ({seconds['cpu']} CPU-s)")
