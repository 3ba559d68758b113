"""``python -m src.pretrain``: train the tiny Qwen2.5-VL of the embedded default from scratch."""

from __future__ import annotations

import json
import time
from pathlib import Path

from glimpseprune import config, files
from glimpseprune.tiny.config import PretrainConfig


@config.entry(PretrainConfig)
def main(cfg: PretrainConfig) -> None:
    """Train a tiny Qwen2.5-VL from scratch on the tags data and save it as a Hugging Face folder."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    from glimpseprune.tiny.module import PretrainModule

    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    config.save(cfg, out / "config.yaml")
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
            ModelCheckpoint(out / "checkpoints", every_n_train_steps=cfg.val_every, save_top_k=0, save_last=True)
        ],
        logger=TensorBoardLogger(out, name=None, version="tensorboard"),
    )
    began, cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, ckpt_path=cfg.resume)
    trainer.validate(module, verbose=False)
    seconds = {"wall": round(time.perf_counter() - began, 1), "cpu": round(time.process_time() - cpu, 1)}
    files.write_json(out / "curve.json", {"seconds": seconds, "curve": module.curve}, indent=1)
    module.save(str(out / "model"))
    print(json.dumps(module.curve[-1], indent=1))
    print(f"model saved in {out / 'model'} ({seconds['cpu']} CPU-s)")
