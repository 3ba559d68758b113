"""The cases of what stands around a model: an evaluation, and reading shards."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.cases import Bench, case, rows
from benchmarks.rows import Row
from benchmarks.world import Side
from glimpseprune.types import Inputs, Sample

ROWS, TOKENS = 4, 8
"""Of a batch that is evaluated."""
SAMPLES, SIDE = 64, 336
"""Of a shard: how many, and pixels of an image's side."""


@case(gpu=10, cpu=40)
def evaluate(bench: Bench) -> Iterator[Row]:
    """A batch of 4 through the engine of src.evaluate, 8 tokens an answer: one method, and three on one encoding;
    beside Hugging Face's generate, one sample after the other."""
    from PIL.Image import new  # which tells pictures from each other by their pixels

    from glimpseprune.evaluation import Evaluation, Method

    world = bench.world
    plain, none, *pruned = world.sides()
    prompt = world.batch(ROWS)
    alone = world.rows_of(prompt)
    pictures = [new("L", (28, 28), shade) for shade in range(ROWS)]
    inputs = Inputs(prompt, [Sample(str(row), "?", ("a",), [picture]) for row, picture in enumerate(pictures)])
    words = SimpleNamespace(batch_decode=lambda rows, **_: ["a"] * len(rows))
    world.backbone.processor = SimpleNamespace(tokenizer=words)
    options = {"max_new_tokens": TOKENS, "temperature": 0.0, "sample_keep": False, "samples": 1, "seed": 0}

    def run(sides: list[Side]) -> Callable[[], Any]:
        methods = [Method(side.name, side.pruner, world.backbone, side.name) for side in sides]
        config = SimpleNamespace(**options, pictures=0)
        return lambda: Evaluation(config, methods, {"match": lambda said, answers: said in answers}).batch(inputs)

    runs = {
        "generate, in a loop": lambda: [plain.generate(row, TOKENS) for row in alone],
        "none": run([none]),
        pruned[0].name: run(pruned[:1]),
        "all three": run([none, *pruned]),
    }
    yield from rows(f"evaluate {ROWS}", bench.take(runs), samples=ROWS)


@case(gpu=8, cpu=30)
def shards(bench: Bench) -> Iterator[Row]:
    """Samples from a shard, images decoded: our reader in order and in a training's order, beside walking the same tar
    with Python's own reader and Pillow."""
    import numpy as np
    import PIL.Image

    from glimpseprune.data.shards import write
    from glimpseprune.data.stream import ShardDataset, ShardLoader

    random = np.random.default_rng(0)

    def picture() -> PIL.Image.Image:
        low = random.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
        return PIL.Image.fromarray(low).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)

    def plain(path: Path) -> int:
        read = 0
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if not member.name.endswith(".json"):
                    read += len(PIL.Image.open(io.BytesIO(data)).convert("RGB").tobytes())
        return read

    with tempfile.TemporaryDirectory() as folder:
        samples = (Sample(f"{n:04}", "?", ("a",), [picture()]) for n in range(SAMPLES))
        write(samples, folder, split="train", shard_size=SAMPLES)
        (path,) = Path(folder).glob("*.tar")
        data = ShardDataset(folder, "train")
        loader = ShardLoader(data, list, 8, shuffle=True)
        runs = {
            "tarfile and Pillow": lambda: plain(path),
            "in order": lambda: sum(len(sample.images) for sample in data),
            "in a training's order": lambda: sum(map(len, loader)),
        }
        device, bench.world.device = bench.world.device, torch.device("cpu")  # whatever trains, a CPU reads
        try:
            yield from rows(f"shards, {SAMPLES} of {SIDE} px", bench.take(runs), samples=SAMPLES)
        finally:
            bench.world.device = device
