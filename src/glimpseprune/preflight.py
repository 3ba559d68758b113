"""Before a job is queued: ``python -m src.preflight train conf/stage1.yaml ...``.

Takes the arguments of src.train, or with ``evaluate`` in its place those of src.evaluate. Says on a login node, in
seconds, what would otherwise fail when the job has started at last: a typo, missing data or weights, a run folder in
use. Nothing is loaded: whether weights fit, and whether there is enough memory for them, is left to the run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glimpseprune import config, hub, resources, training
from glimpseprune.config import UserError, option
from glimpseprune.data.shards import Shards, Store
from glimpseprune.evaluate import EvaluateConfig, asked_tasks, replace_data, require_data
from glimpseprune.evaluate import check as check_options
from glimpseprune.options import DataOptions, TrainConfig
from glimpseprune.prepare import described, make_missing
from glimpseprune.results import require_room
from glimpseprune.train import inherited, last_checkpoint
from glimpseprune.weights import require_files


@dataclass
class TrainCheck(TrainConfig):
    make_data: bool = option(False, "make the shards that data.prepare describes, if they are missing")


@dataclass
class EvaluateCheck(EvaluateConfig):
    planned: bool = option(False, "ckpt is still to be trained: look at the other arguments only")


@config.entry(TrainCheck, inherited)
def train(cfg: TrainCheck) -> None:
    """What a training needs; raises UserError where it is not there."""
    from glimpseprune.pruners import options_of  # which imports torch; an evaluation needs none

    last = last_checkpoint(cfg)
    training.require(cfg.stage)
    options_of(cfg.pruner.name, cfg.pruner.options)
    check_weights(cfg.backbone.path, "backbone.path")
    if cfg.init_from is not None:
        check_checkpoint(cfg.init_from, "init_from")
    if cfg.make_data:
        make_missing(cfg.data.path, cfg.data.prepare)
    if described(cfg.data.path, cfg.data.prepare) and not Path(cfg.data.path).exists():
        samples = "will be made"
    else:
        folders = {"train": cfg.data.path, "val": cfg.data.val_path or cfg.data.path}
        store = Store.of(cfg.data)
        samples = ", ".join(f"{len(Shards(path, split, store=store))} {split}" for split, path in folders.items())
        for path in cfg.data.mix:
            samples += f", and {len(Shards(path, 'train', store=store))} of {path}"
    begin = f"continues from {last}" if last else f"starts in {cfg.out}"
    print(f"preflight: {cfg.stage} {begin}; backbone {cfg.backbone.path}; data {cfg.data.path} ({samples})")


@config.entry(EvaluateCheck)
def evaluate(cfg: EvaluateCheck) -> None:
    """What an evaluation needs; raises UserError where it is not there."""
    check_options(cfg)
    if cfg.planned:
        return
    require_room(cfg.place, cfg.resume or cfg.overwrite)
    data, path, backbone = DataOptions(), cfg.data.path or "", cfg.backbone.path
    if cfg.ckpt is not None:
        check_checkpoint(cfg.ckpt, "ckpt")
    saved = None if cfg.ckpt is None else Path(resources.find(cfg.ckpt)) / "config.yaml"
    if saved is not None and saved.is_file():
        saved = config.read(TrainConfig, saved)
        data, path = saved.data, path or saved.data.path
        backbone = backbone or saved.backbone.path
    replace_data(data, cfg.data)
    asked = asked_tasks(cfg, path)
    for name, task in asked.items():
        if task.data:
            require_data(name, task)
            Shards(task.data, task.split, store=Store.of(data))
    if backbone is not None:
        check_weights(backbone, "backbone.path")
    if cfg.methods or cfg.options:
        from glimpseprune.evaluate import checkpoint_config, planned

        planned(cfg, checkpoint_config(cfg))
    what = cfg.ckpt or f"{', '.join(cfg.methods or [cfg.pruner.name])} on {backbone}"
    on = ", ".join(f"{name} ({task.split} of {task.data})".strip() for name, task in asked.items() if name)
    on = on or ", ".join(f"the split {task.split} of {task.data}" for task in asked.values())
    print(f"preflight: evaluates {what} on {on}")


def check_weights(path: str, key: str) -> Path:
    """The folder with the weights of an LVLM, all of them; ``path`` is a folder or a hub id that was downloaded."""
    try:
        folder = hub.folder(path, download=False)
        require_files(folder)
    except UserError as error:
        raise UserError(f"{key}={path}: {error}") from None
    return folder


def check_checkpoint(path: str, key: str) -> None:
    """A run folder or a published folder with its weights."""
    try:
        folder = hub.folder(path, download=False)
    except UserError as error:
        raise UserError(f"{key}={path}: {error}") from None
    names = (resources.TRAINABLE, hub.PUBLISHED)
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{key}={path} holds no weights: neither {names[0]} (a run folder) nor {names[1]}")


def main(argv: Sequence[str] | None = None) -> None:
    command, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    commands = {"train": train, "evaluate": evaluate}
    if command in ("-h", "--help"):
        print(config.as_typed(f"usage: python -m src.preflight <train or evaluate> ...\n\n{__doc__.strip()}"))
        return
    with config.answering("python -m src.preflight"):
        if command not in commands:
            raise UserError(f"give {' or '.join(commands)}, then the arguments of that command")
    commands[command](arguments)
