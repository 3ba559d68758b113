"""Ask: ``python -m src.ask photo.jpg "number on the red tag?"``.

Pictures first, the question last; several pictures belong to one question. The answer is printed as it comes, then how
many visual tokens were kept and how long it took, and ``picture`` shows which. Without ``model`` the shipped tiny model
answers, with its trained pruner; it knows questions about tags alone, and ``python -m src.ask`` shows one.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glimpseprune import config, files, resources
from glimpseprune.config import UserError, option
from glimpseprune.options import Dtype

SHIPPED, PICTURE, QUESTION = "data/demo-pruner", "data/tags.png", "number on the red tag?"
KNOWN = "number on the red tag?  numbers on red and blue?  is red left of blue?"
"""What the shipped model can answer."""


@dataclass
class AskConfig:
    BARE = "asked"

    asked: list[str] = option([], "pictures, then the question; of nothing, a picture that is shipped is asked about")
    model: str | None = option(None, "run folder, published folder or hub id (default: the shipped tiny model)")
    backbone: str | None = option(
        None, "folder or hub id of the LVLM: another one than `model` names, or alone, with a `pruner` without weights"
    )
    pruner: str | None = option(None, "another method, such as none or fastv (default: that of `model`)")
    options: dict[str, Any] = option({}, "of the method, such as options.threshold=0.3")
    max_keep: float | None = option(None, "most visual tokens, as a share", above=0, most=1)
    max_new_tokens: int = option(128, "most tokens of the answer", least=1, most=10**6)
    device: str = option("auto", "cpu, cuda, cuda:1; auto: a GPU where there is one")
    dtype: Dtype | None = option(None, "of the LVLM's weights (default: as the model says)")
    picture: str | None = option("kept.png", "PNG file to show in what was kept, replaced if it is there; null: none")


@config.entry(AskConfig)
def main(cfg: AskConfig) -> None:
    *pictures, question = cfg.asked or (PICTURE, QUESTION)
    if not pictures:
        raise UserError(f"give a picture and then a question: ask photo.jpg {shlex.quote(question)}")
    pictures = [resources.find(each) for each in pictures]
    for each in pictures:
        if not Path(each).is_file():
            raise UserError(f"there is no picture '{each}': give pictures first, and the question last, in quotes")
    if cfg.picture is not None and Path(cfg.picture).suffix.lower() != ".png":
        raise UserError(f"picture={cfg.picture}: give the name of a .png file, or null")
    out = None if cfg.picture is None else files.resolved(cfg.picture)
    shipped = cfg.model is None and cfg.backbone is None
    options = dict(cfg.options) | ({} if cfg.max_keep is None else {"max_keep": cfg.max_keep})

    from transformers import TextStreamer

    from glimpseprune import checkpoint, plot

    images = [plot.opened(each) for each in pictures]
    if not cfg.asked:
        print(f"{PICTURE}: {question}")
    model = checkpoint.load(
        resources.find(SHIPPED) if shipped else cfg.model,
        backbone=cfg.backbone,
        pruner=cfg.pruner,
        device=cfg.device,
        dtype=cfg.dtype,
        **options,
    )
    streamer = TextStreamer(model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = model.ask(images, question, max_new_tokens=cfg.max_new_tokens, streamer=streamer)
    print(answer.said(), flush=True)
    if out is not None:
        with files.whole(out) as partial:
            plot.kept(images, answer, f"{question}  {answer.text}").save(partial, format="png")
        print(f"what was kept: {cfg.picture}")
    if shipped:
        print(
            f"the shipped tiny model answers about pictures like {PICTURE}, and nothing else: {KNOWN}", file=sys.stderr
        )


if __name__ == "__main__":
    main()
