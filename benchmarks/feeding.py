"""The cases of what stands around a model: an evaluation, and reading shards."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.cases import Bench, case, rows
from benchmarks.rows import Row
from benchmarks.world import Side
from glimpseprune.types import Inputs, Sample

ROWS, TOKENS = 4, 8
"""Of a batch that is evaluated."""
SAMPLES, SHARDS, SIDE = 96, 4, 336
"""How many, in how many shards; and pixels of an image's side."""
BATCH, WORKERS = 8, 2
PLAIN = "tarfile and Pillow"


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


@case(gpu=12, cpu=60)
def shards(bench: Bench) -> Iterator[Row]:
    """Samples from shards, images decoded: our reader in order and in a training's order, beside walking the same tars
    with Python's own reader and Pillow, and beside webdataset's pipeline; in this process (CPU time), then each with
    as many workers (wall time). JPEG photographs, and PNG."""
    import numpy as np
    import PIL.Image

    from glimpseprune.data.shards import write

    random = np.random.default_rng(0)

    def picture() -> PIL.Image.Image:
        low = random.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
        return PIL.Image.fromarray(low).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)

    device, bench.world.device = bench.world.device, torch.device("cpu")  # whatever trains, a CPU reads
    try:
        for part, (image_format, workers) in enumerate(product(("jpg", "png"), (0, WORKERS))):
            with tempfile.TemporaryDirectory() as folder:
                samples = (Sample(f"{n:04}", "?", ("a",), [picture()]) for n in range(SAMPLES))
                size = SAMPLES // SHARDS
                write(samples, folder, split="train", shard_size=size, image_format=image_format)
                sides = readers(Path(folder), workers)
                ours = list(sides)[2:]
                for first in list(sides)[:2]:
                    until = bench.within(2 * (4 - part) - (first != PLAIN))
                    turns = bench.take({name: sides[name] for name in (first, *ours)}, until)
                    if workers:  # the CPU time of other processes is not seen here
                        turns.own = turns.wall
                    where = f", {workers} workers" if workers else ""
                    yield from rows(f"shards, {image_format}{where}", turns, samples=SAMPLES)
    finally:
        bench.world.device = device


def readers(folder: Path, workers: int) -> dict[str, Callable[[], int]]:
    """Name -> reading all samples once, in batches of ``BATCH``: two to compare with, then ours."""
    import webdataset

    from glimpseprune.data.stream import ShardDataset, ShardLoader

    paths = sorted(map(str, folder.glob("*.tar")))
    data = ShardDataset(folder, "train")
    found = webdataset.WebDataset(paths, shardshuffle=False, nodesplitter=None).decode("pil")
    options = {"num_workers": workers, "collate_fn": len, "persistent_workers": workers > 0}
    options |= {"multiprocessing_context": "fork"} if workers else {}
    loaders = {
        PLAIN: DataLoader(Tars(paths), BATCH, **options),
        "webdataset": DataLoader(found, BATCH, **options),
        "ours, in order": ShardLoader(data, len, BATCH, workers=workers),
        "ours, as a training": ShardLoader(data, len, BATCH, shuffle=True, workers=workers),
    }
    return {name: partial(read_all, loader) for name, loader in loaders.items()}


def read_all(loader: Iterable[int]) -> int:
    """How many samples came; raises if some did not, for that would be no comparison."""
    read = sum(loader)
    assert read == SAMPLES, f"{read} of {SAMPLES} samples were read"
    return read


class Tars(IterableDataset):
    """Tars as one would read them: Python's reader, Pillow, the json as it is; shards are dealt to workers."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import PIL.Image

        worker = get_worker_info()
        mine = self.paths[worker.id :: worker.num_workers] if worker else self.paths
        for path in mine:
            sample: dict[str, Any] = {}
            with tarfile.open(path) as tar:
                for member in tar:
                    data = tar.extractfile(member).read()
                    key, _, suffix = member.name.partition(".")
                    if sample and sample["key"] != key:
                        yield sample
                        sample = {}
                    is_json = suffix == "json"
                    sample |= {"key": key}
                    sample[suffix] = json.loads(data) if is_json else PIL.Image.open(io.BytesIO(data)).convert("RGB")
            yield sample
