"""Cases one after the other, each within its share of the time, their rows written as they come."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers

from benchmarks import ROOT, feeding, inference, training
from benchmarks.cases import Bench, Case
from benchmarks.clock import Late, free, said
from benchmarks.rows import Row, number, show, values, write
from benchmarks.world import MIB, World

CASES: dict[str, Case] = {
    each.name: each
    for each in (
        inference.prefill,
        inference.decoder_prefill,
        inference.split,
        inference.tower,
        inference.generate,
        inference.memory,
        inference.batch,
        inference.questions,
        inference.largest_batch,
        training.stage_1,
        training.rl,
        training.rl_trl,
        inference.generate_long,
        inference.counts,
        feeding.evaluate,
        feeding.shards,
    )
}
"""Most important first."""
GRACE = 1.15
"""A case is stopped when it has taken so many times its share; it ends by itself before."""
ASKED = 60
"""Of a case that runs only where it is asked for."""
LEAST = 2.0
"""Seconds without which no case is begun."""
BUDGET = {True: 230, False: 590}
"""Seconds for all, on a GPU or not."""
MEMORY = {"7b": 16384, "mid": 384, "tiny": 8}
"""MiB for the largest batch."""


def run(given: argparse.Namespace, began: float) -> int:
    """What the command line asks for; 0, or 2 for a mistake in it."""
    usual = [name for name, each in CASES.items() if (each.gpu if given.gpu else each.cpu)]
    names = given.cases.split(",") if given.cases else usual
    if given.list:
        for each in CASES.values():
            print(f"{each.name:18} {each.about}")
        return 0
    if unknown := [name for name in names if name not in CASES]:
        return wrong(f"no case '{unknown[0]}': choose from {', '.join(CASES)}")
    if given.gpu and not (torch.cuda.is_available() or given.tiny):
        return wrong("--gpu: torch finds no CUDA device here; --gpu --tiny runs the same code on a CPU")
    if given.against and not given.against.is_file():
        return wrong(f"--against: there is no file '{given.against}'")
    gpu = given.gpu and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    size = "tiny" if given.tiny else "7b" if given.gpu else "mid"
    quiet()
    if not gpu:
        torch.set_num_threads(given.threads)
    world = World(size, device, torch.bfloat16 if gpu else torch.float32)
    about = described(world)
    print(f"{about['title']} ({time.monotonic() - began:.0f} s)", flush=True)
    memory = given.memory_mib if given.memory_mib is not None else MEMORY[size]
    bench = Bench(world, rounds=given.rounds, memory=memory * MIB or None, counting=not given.no_counts, warm_up=gpu)
    out = given.out or ROOT / "benchmarks" / "results" / f"{size}-{device.type}.json"
    before = values(given.against) if given.against else {}
    found: list[Row] = []
    try:
        for row in all_of(bench, names, began + (given.budget_s or BUDGET[given.gpu]), given.gpu, about):
            row.before = before.get((row.case, row.side))
            found.append(row)
            write(out, found, about)
    finally:  # also of one who stops it
        show(found, about["title"])
        print(f"{time.monotonic() - began:.0f} s; {out}")
    return 0


def all_of(bench: Bench, names: list[str], until: float, gpu: bool, about: dict[str, Any]) -> Iterator[Row]:
    """The rows of the cases, each of which has its share of the time that is left."""
    weights = {name: (CASES[name].gpu if gpu else CASES[name].cpu) or ASKED for name in names}
    took = about.setdefault("seconds", {})
    for place, name in enumerate(names):
        began = time.monotonic()
        share = (until - began) * weights[name] / sum(weights[each] for each in names[place:])
        yield from taken(bench, CASES[name], share)
        took[name] = time.monotonic() - began
        print(f"{name}: {took[name]:.0f} s", flush=True)
        free()


def described(world: World) -> dict[str, Any]:
    """The machine, what it can do, and what is measured on it."""
    rates, device = world.rates, world.device
    gpu = device.type == "cuda"
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    machine = torch.cuda.get_device_name(device) if gpu else cpu
    can = f"{number(rates.flops / 1e12)} TFLOP/s {str(world.dtype)[6:]}, {number(rates.bytes / 1e9)} GB/s copied"
    return {
        "title": f"{machine}, {world.size_name}, {can}; ms are {'of the device' if gpu else 'of CPU time'}",
        "machine": machine,
        "size": world.size_name,
        "TFLOP/s": rates.flops / 1e12,
        "GB/s": rates.bytes / 1e9,
        "commit": commit(),
        "versions": versions(),
    }


def taken(bench: Bench, each: Case, share: float) -> Iterator[Row]:
    """The rows of a case; its failure, or that it ran over, is one more."""
    if share < LEAST:
        yield Row(each.name, note="skipped: no time is left")
        return
    bench.until = time.monotonic() + share
    count = 0
    try:
        with at_most(max(share * GRACE, LEAST)):
            for count, row in enumerate(each.run(bench), start=1):  # noqa: B007
                yield row
        if not count:
            yield Row(each.name, note=f"{share * GRACE:.0f} s were not enough for one round")
    except ImportError as error:
        yield Row(each.name, note=f"skipped: needs {error.name or error}")
    except Late:
        yield Row(each.name, note=f"stopped after {share * GRACE:.0f} s")
    except Exception as error:
        traceback.print_exc(limit=-4)
        yield Row(each.name, note=f"failed: {said(error)}")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise :class:`Late` in a block that takes longer; and again, where that was only taken note of."""

    def late(*_: object) -> None:
        raise Late

    usual = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


def wrong(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", message=".*cannot be recorded as a CUDA graph")


def commit() -> str:
    """Of the checkout; empty where that is none."""
    try:
        asked = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "lightning", "peft", "webdataset", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
