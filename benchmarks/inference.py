"""The cases of inference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import ANSWER, Bench, case, rows
from benchmarks.clock import Spread, elapsed, free, said
from benchmarks.counters import Counts, peak
from benchmarks.rows import Row
from benchmarks.world import MIB, SIZES, Prompt, Ragged, Side, World, thin
from glimpseprune import decoder
from glimpseprune.decoder import View

LONG = 256
"""New tokens."""
BATCHES = (8, 16, 1, 4)
QUESTIONS = 4


# ---------------------------------------------------------------------------------------------------------- one prompt


@case(gpu=24, cpu=90)
def prefill(bench: Bench) -> Iterator[Row]:
    """From pixels to the logits of the last position."""
    world, prompt = bench.world, bench.world.prompt
    sides = world.sides()
    runs = {side.name: lambda side=side: side.prefill(prompt) for side in sides}
    bounds = {side.name: world.bounds(side, prompt).prefill for side in sides}
    counts = {side.name: bench.count(runs[side.name], side, prompt) for side in sides}
    yield from rows("prefill", bench.take(runs), bounds, counts=counts)


@case(gpu=14, cpu=50)
def decoder_prefill(bench: Bench) -> Iterator[Row]:
    """Prefill of what the tower has encoded: layers, glimpse, VIP, selection."""
    world, prompt = bench.world, bench.world.prompt
    sides = world.sides()[1:]
    bounds = {side.name: world.bounds(side, prompt).decoder for side in sides}
    with torch.no_grad():
        encoded = {side.name: decoder.see(world.backbone, side.pruner, prompt) for side in sides}

    @torch.no_grad()
    def run(side: Side) -> Tensor:
        state = decoder.prefill(side.backbone, encoded[side.name], side.pruner)
        return side.backbone.logits(state.hidden[:, -1:])

    yield from rows("decoder prefill", bench.take({side.name: lambda side=side: run(side) for side in sides}), bounds)


@case(gpu=12, cpu=50)
def split(bench: Bench) -> Iterator[Row]:
    """A prefill by part, each waited for; the glimpse is what the layers below K take beyond those without one, and
    selecting what a decision takes beyond its logits."""
    world, prompt = bench.world, bench.world.prompt
    sides = world.sides()[1:]
    bounds = {side.name: world.bounds(side, prompt) for side in sides}
    turns = bench.take({side.name: stages(side, prompt) for side in sides})
    turns.derive("glimpse", "with glimpse", "below K")
    turns.derive("select", "decide", "vip")
    for part in ("encode", "below K", "glimpse", "vip", "select", "above K", "head"):
        least = {name: bound.part(part) for name, bound in bounds.items()}
        yield from rows(f"split: {part}", turns, least, part=part)


def stages(side: Side, prompt: Prompt) -> dict[str, Callable[[], None]]:
    """The parts of a prefill, each of which goes on from the one before, and the layers below K without the glimpse."""
    pruner = side.pruner
    held: dict[str, Any] = {}

    def encode() -> None:
        held["encoded"] = decoder.see(side.backbone, pruner, prompt)

    def alone() -> None:
        decoder.approach(side.backbone, decoder.start(held["encoded"]), pruner)

    def below() -> None:
        held["state"] = decoder.approach(side.backbone, decoder.start(held["encoded"]), pruner, held["encoded"])

    def predict() -> None:
        pruner.logits(View(held["state"], held["encoded"], side.backbone, pruner.stops[0]))

    def decide() -> None:
        held["state"] = decoder.decide(side.backbone, held["encoded"], held["state"], pruner)

    def above() -> None:
        held["state"] = decoder.advance(side.backbone, held["encoded"], held["state"], pruner)

    def head() -> None:
        side.backbone.logits(held["state"].hidden[:, -1:]).argmax(-1)

    look = {"below K": alone, "with glimpse": below, "vip": predict, "decide": decide, "above K": above}
    chain = look if pruner.stops else {"above K": lambda: (below(), above())}
    return {name: torch.no_grad()(run) for name, run in {"encode": encode, **chain, "head": head}.items()}


@case(gpu=12, cpu=40)
def tower(bench: Bench) -> Iterator[Row]:
    """Pixels to visual tokens; ours with and without the states that the VIP sees."""
    world, prompt = bench.world, bench.world.prompt
    sides = world.sides()[:3]
    named = {side.name: side for side in sides[:2]} | {"for a VIP": sides[2]}
    runs = {name: lambda side=side: side.tower(prompt) for name, side in named.items()}
    least = world.bounds(sides[1], prompt).tower
    counts = {name: bench.count(runs[name], side, prompt) for name, side in named.items()}
    yield from rows("tower", bench.take(runs), dict.fromkeys(named, least), counts=counts)


@case(gpu=36, cpu=70)
def generate(bench: Bench) -> Iterator[Row]:
    """To the first token, per further one, and 32 in all."""
    world, prompt = bench.world, bench.world.prompt
    sides = world.sides()
    if world.device.type == "cuda":
        sides = [*sides, replace(sides[2], name=f"{sides[2].name}, launched", replays=False)]
    lengths = {"first token": 1, f"{ANSWER} tokens": ANSWER}
    runs = {
        side.name: {part: lambda side=side, n=n: side.generate(prompt, n) for part, n in lengths.items()}
        for side in sides
    }
    bounds = {side.name: world.bounds(side, prompt) for side in sides}
    counts = {side.name: per_token(bench, side) for side in sides}
    turns = bench.take(runs)
    turns.derive("token", f"{ANSWER} tokens", "first token", ANSWER - 1)
    yield from rows("per token", turns, {n: b.token for n, b in bounds.items()}, part="token", counts=counts)
    for part, n in lengths.items():
        yield from rows(part, turns, {name: bound.generate(n) for name, bound in bounds.items()}, part=part)


def per_token(bench: Bench, side: Side, short: int = 2, long: int = 4) -> Counts | None:
    """What one more token asks for, whatever is in the cache."""
    prompt = bench.world.batch(1)
    few, many = (bench.count(lambda n=n: side.generate(prompt, n), side, prompt) for n in (short, long))
    if few is None or many is None:
        return None

    def each(name: str) -> int:
        return round((getattr(many, name) - getattr(few, name)) / (long - short))

    return Counts(each("kernels"), each("syncs"), each("launches") if many.launches is not None else None)


@case(gpu=8, cpu=30)
def memory(bench: Bench) -> Iterator[Row]:
    """Most bytes above the weights, and those that stay when the prompt has been read (bound: the cache)."""
    world, prompt = bench.world, bench.world.prompt
    sides = world.sides()
    first: dict[str, float] = {}
    for side in sides:
        bound = world.bounds(side, prompt).cache / MIB
        world.forget()  # so that what graphs hold counts
        most, stays = peak(lambda side=side: side.prefill(prompt), world.device)
        world.forget()
        answers, _ = peak(lambda side=side: side.generate(prompt, 8), world.device)
        for name, size, least in (
            ("peak of prefill", most, None),
            ("after prefill", stays, bound),
            ("peak of generate", answers, None),
        ):
            value = size / MIB
            over = first.setdefault(name, value)
            ratio = Spread.of([value / over]) if over and side is not sides[0] else None
            yield Row(name, side.name, "MiB", Spread.of([value]), bound=least, ratio=ratio)


@case(gpu=18, cpu=50)
def generate_long(bench: Bench) -> Iterator[Row]:
    """256 tokens."""
    world, prompt = bench.world, bench.world.prompt
    sides = world.sides()
    turns = bench.take({side.name: lambda side=side: side.generate(prompt, LONG) for side in sides})
    yield from rows(f"{LONG} tokens", turns, {side.name: world.bounds(side, prompt).generate(LONG) for side in sides})


# ------------------------------------------------------------------------------------------------------------- batches


@case(gpu=42, cpu=100)
def batch(bench: Bench) -> Iterator[Row]:
    """32 tokens behind 8, 16, 1 and 4 unequal prompts, which keep unequal fractions; on a CPU 8 also one at a time."""
    for number, size in enumerate(BATCHES):
        looped = number == 0 and bench.world.device.type == "cpu"
        yield from batch_of(bench, size, bench.within(len(BATCHES) - number), looped)
        free()


def batch_of(bench: Bench, size: int, until: float, looped: bool) -> Iterator[Row]:
    prompt, sides = bench.world.batch(size), bench.world.sides(Ragged)
    bounds = {side.name: bench.world.bounds(side, prompt).generate(ANSWER) for side in sides}
    runs: dict[str, Callable] = {side.name: lambda side=side: side.generate(prompt, ANSWER) for side in sides}
    if looped:
        alone, side = bench.world.rows_of(prompt), sides[2]
        runs[f"{side.name}, in a loop"] = lambda: [side.generate(row, ANSWER) for row in alone]
    yield from rows(f"batch of {size}", bench.take(runs, until), bounds, samples=size)


@case(gpu=12, cpu=50)
def questions(bench: Bench) -> Iterator[Row]:
    """32 tokens behind each of 4 questions on one image, in one batch; ours sees the image once."""
    prompt, sides = bench.world.questions(QUESTIONS), bench.world.sides()
    bounds = {side.name: bench.world.bounds(side, prompt).generate(ANSWER) for side in sides}
    turns = bench.take({side.name: lambda side=side: side.generate(prompt, ANSWER) for side in sides})
    yield from rows(f"{QUESTIONS} questions", turns, bounds, samples=QUESTIONS)


@case(gpu=26, cpu=60)
def largest_batch(bench: Bench) -> Iterator[Row]:
    """32 tokens a sample at the largest batch, found by doubling, whose tensors fit into what is allowed."""
    world = bench.world
    first = None
    sides = world.sides(Ragged)
    for number, side in enumerate(sides):
        size, why, took = fitting(bench, side, bench.within(len(sides) - number))
        if not size:
            yield Row("largest batch", side.name, note=why)
            continue
        spread = Spread.of([ms / size for ms in took])
        first = first or spread.median
        yield Row(
            "largest batch",
            f"{side.name}: {size}",
            "ms/sample",
            spread,
            ratio=Spread.of([spread.median / first]) if number else None,
            rate=1e3 / spread.median,
            rounds=len(took),
            note=why,
            more={"batch": size, "ended by": why},
        )


def fitting(bench: Bench, side: Side, until: float) -> tuple[int, str, list[float]]:
    """The largest power of two of prompts that fits, why no more was tried, and what it took."""
    world, gpu = bench.world, bench.world.device.type == "cuda"
    size, took = 0, []
    limit = bench.memory
    world.forget()
    if gpu and limit is not None:
        whole = torch.cuda.get_device_properties(world.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + limit) / whole))
    try:
        while True:
            tried = 2 * size or 1
            prompt = world.batch(tried)
            if not gpu and limit is not None:
                most, _ = peak(partial(side.generate, prompt, 2), world.device)
                if most > limit:
                    return size, "memory", took
            began = time.monotonic()
            try:
                times = [
                    elapsed(lambda prompt=prompt: side.generate(prompt, ANSWER), world.device)[0] for _ in range(2)
                ]
            except torch.OutOfMemoryError:
                return size, "memory", took
            size, took = tried, times
            if time.monotonic() + 2.5 * (time.monotonic() - began) > until:
                return size, "time", took
            free()
    except Exception as error:  # costs what larger batches would have shown
        return size, said(error), took
    finally:
        if gpu and limit is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)
        free()


# -------------------------------------------------------------------------------------------------------------- counted


@case(gpu=0, cpu=60)
def counts(bench: Bench) -> Iterator[Row]:
    """Kernels and host syncs of the 7B model's depth and columns, at next to no width; without a GPU."""
    world = bench.world
    if world.device.type == "cuda":
        return
    narrow = World(thin(SIZES["tiny" if world.size_name == "tiny" else "7b"]), world.device, world.dtype)
    own = Bench(narrow, bench.until, warm_up=False)
    for side in narrow.sides():
        whole = own.count(lambda side=side: side.prefill(narrow.prompt), side, narrow.prompt)
        yield Row("counts: prefill", side.name, kernels=whole.kernels, syncs=whole.syncs, more={"syncs": whole.where})
    for side in narrow.sides():
        token = per_token(own, side)
        yield Row("counts: token", side.name, kernels=token.kernels, syncs=token.syncs)
