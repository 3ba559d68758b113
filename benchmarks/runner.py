"""Cases one after the other, each within its share of the time, their rows written as they come."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers

from benchmarks import ROOT, feeding, inference, training
from benchmarks.cases import Bench, Case
from benchmarks.clock import Late, free, said
from benchmarks.rows import Row, number, show, write
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
    gpu = given.gpu and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    size = "tiny" if given.tiny else "7b" if given.gpu else "mid"
    budget = given.budget_s or (230 if given.gpu else 590)
    out = given.out or ROOT / "benchmarks" / "results" / f"{size}-{device.type}.json"
    quiet()
    if not gpu:
        torch.set_num_threads(given.threads)
    about = {
        "machine": machine(device),
        "size": size,
        "versions": versions(),
        "arguments": vars(given) | {"out": str(out)},
    }
    world = World(size, device, torch.bfloat16 if gpu else torch.float32)
    rates = world.rates
    about["rates"] = {"TFLOP/s": rates.flops / 1e12, "GB/s": rates.bytes / 1e9}
    said_rates = f"{number(rates.flops / 1e12)} TFLOP/s {str(world.dtype)[6:]}, {number(rates.bytes / 1e9)} GB/s copied"
    title = f"{machine(device)}, {size}, {said_rates}; ms are " + ("the device's" if gpu else "of CPU time")
    print(f"{title} ({time.monotonic() - began:.0f} s)", flush=True)
    memory = given.memory_mib if given.memory_mib is not None else {"7b": 16384, "mid": 384, "tiny": 8}[size]
    bench = Bench(world, rounds=given.rounds, memory=memory * MIB or None, counting=not given.no_counts, warm_up=gpu)
    found: list[Row] = []
    took: dict[str, float] = {}
    left = [CASES[name] for name in names]
    try:
        while left:
            each = left.pop(0)
            weight = [(case.gpu if given.gpu else case.cpu) or ASKED for case in (each, *left)]
            share = (began + budget - time.monotonic()) * weight[0] / sum(weight)
            start = time.monotonic()
            for row in taken(bench, each, share):
                found.append(row)
                write(out, found, about | {"seconds": took})
            took[each.name] = time.monotonic() - start
            print(f"{each.name}: {took[each.name]:.0f} s", flush=True)
            free()
    finally:  # also of one who stops it
        write(out, found, about | {"seconds": took})
        show(found, title)
        print(f"{time.monotonic() - began:.0f} s; {out}")
    return 0


def taken(bench: Bench, each: Case, share: float) -> Iterator[Row]:
    """The rows of a case; its failure, or that it ran over, is one more."""
    if share < LEAST:
        yield Row(each.name, note="skipped: no time is left")
        return
    bench.until = time.monotonic() + share
    try:
        with at_most(max(share * GRACE, LEAST)):
            yield from each.run(bench)
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


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "lightning", "peft", "webdataset", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
