"""Checkpoints of a run: ``<out>/checkpoints/step-<step>.ckpt`` and their index, checkpoints.json.

The index names every whole checkpoint with its hash. A checkpoint is written under another name, moved to its own, and
only then entered, each at one stroke: a kill at any time leaves those before it valid, and one that is damaged later is
found out by its hash, reported, and the one before it used. Kept are the last few and the best; the weights of the best
are also a run folder of their own, ``<out>/best``.

What is in one is Lightning's affair (loops, optimiser, schedule, callbacks, place in the data) and
:class:`.StageModule`'s (the weights that train). Random numbers need no state, see its ``on_train_batch_start``.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L

from glimpseprune import config, files, runs
from glimpseprune.checkpoint import CONFIG, TRAINABLE
from glimpseprune.config import UserError
from glimpseprune.options import TrainConfig
from glimpseprune.running.callbacks import collapsed

FOLDER, INDEX, BEST = "checkpoints", "checkpoints.json", "best"
_NAME = re.compile(r"step-\d{8,}\.ckpt")


def newest(out: str | Path) -> Path | None:
    """The newest checkpoint of the run folder ``out`` that is whole, or None if it has none. Changes nothing.

    Every process reads the file once for its hash.

    Raises:
        UserError: there are checkpoints, all of them damaged; or the index is.
    """
    folder = Path(out) / FOLDER
    index = _read(folder)
    for name, entry in sorted(index.items(), reverse=True):
        reason = _damage(folder / name, entry["sha256"])
        if reason is None:
            return folder / name
        warnings.warn(f"checkpoint {folder / name} {reason}: the one before it is used", stacklevel=2)
    if index:
        raise UserError(f"all {len(index)} checkpoints in {folder} are damaged: start again with overwrite=true")
    return None


def entry(file: Path) -> dict[str, Any]:
    """What the index says of a checkpoint: ``step``, ``world`` (processes that wrote it) and so on."""
    return _read(file.parent).get(file.name, {})


class Checkpoints(L.Callback):
    """Writes one after every validation and at the end, after :class:`.RunFolder` has written the weights.

    A kill during a validation goes back to the one before: a validation that is not in a checkpoint is never lost.
    ``last``: how many of the last stay; ``monitor``: the validation metric that says which is best, and whether that is
    its ``min`` or ``max``.
    """

    def __init__(self, out: str | Path, last: int, monitor: tuple[str, str]):
        self.out, self.folder = Path(out), Path(out) / FOLDER
        self.last, self.monitor = last, monitor

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or collapsed(trainer):
            return
        score = trainer.callback_metrics.get(self.monitor[0])
        self.save(trainer, None if score is None else float(score))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        done = trainer.strategy.broadcast(_name(trainer.global_step) in _read(self.folder))
        if not done and not collapsed(trainer):
            self.save(trainer)

    def save(self, trainer: L.Trainer, score: float | None = None) -> Path:
        """Write the checkpoint of this step; all ranks together."""
        name = _name(trainer.global_step)
        file = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        # One process writes; all take part, for weights may be spread over them.
        with files.whole(file) if trainer.is_global_zero else nullcontext(file) as partial:
            trainer.save_checkpoint(partial, weights_only=False)
            found = {"step": trainer.global_step, "world": trainer.world_size}
            if trainer.is_global_zero:
                found = {"sha256": _hash(partial)} | found
        if trainer.is_global_zero:
            # Later ones are damaged, or we would have gone on from them.
            earlier = {old: there for old, there in _read(self.folder).items() if old < name}
            index = earlier | {name: found | ({} if score is None else {"score": score})}
            if _best(index, self.monitor[1]) == name:
                self._copy_best()
            self._write(index)
            runs.drop(self.out)
        trainer.strategy.barrier()
        return file

    def _copy_best(self) -> None:
        """Before its checkpoint is entered: who goes on from that does not validate once more."""
        (self.out / BEST).mkdir(exist_ok=True)
        files.copy(self.out / TRAINABLE, self.out / BEST / TRAINABLE)
        # Not copied: paths in it are relative to it.
        config.save(config.read(TrainConfig, self.out / CONFIG), self.out / BEST / CONFIG)

    def _write(self, index: dict[str, dict[str, Any]]) -> None:
        """Put ``index`` in place, less those that need not stay, then delete what it does not name."""
        kept = set(sorted(index)[-self.last :]) | {_best(index, self.monitor[1])}
        index = {name: entry for name, entry in index.items() if name in kept}
        files.write_json(self.folder / INDEX, index, indent=2)
        for file in self.folder.glob("step-*.ckpt*"):
            if file.name not in index:
                file.unlink()


def _name(step: int) -> str:
    return f"step-{step:08d}.ckpt"


def _best(index: dict[str, dict[str, Any]], mode: str) -> str | None:
    scored = {name: entry["score"] for name, entry in index.items() if "score" in entry}
    return (min if mode == "min" else max)(scored, key=scored.__getitem__) if scored else None


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    if not (folder / INDEX).is_file():
        return {}
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return {name: entry for name, entry in index.items() if _NAME.fullmatch(name) and entry["sha256"]}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is damaged ({error}): start again with overwrite=true") from None


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _damage(file: Path, sha256: str) -> str | None:
    if not file.is_file():
        return "is missing"
    return None if _hash(file) == sha256 else "is damaged (its hash is not that of the index)"
