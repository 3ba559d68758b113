"""python -m benchmarks [--gpu] [--cases a,b] [--list] [--tiny] [--budget-s S] [--against FILE] [--out FILE]"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=sys.modules["benchmarks"].__doc__)
    parser.add_argument("--gpu", action="store_true", help="7B shapes in bf16 on a GPU (else: mid-size ones on a CPU)")
    parser.add_argument("--tiny", action="store_true", help="shapes of no size: a dry run of the same code")
    parser.add_argument("--cases", help="some of them, with commas between (default: all)")
    parser.add_argument("--list", action="store_true", help="say what cases there are")
    parser.add_argument("--budget-s", type=float, help="seconds for all (default: 230 on a GPU, 590 on a CPU)")
    parser.add_argument("--rounds", type=int, default=15, help="at most so many for each figure")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--memory-mib", type=int, help="for the largest batch, above the weights; 0: the whole GPU")
    parser.add_argument("--no-counts", action="store_true", help="count neither kernels nor host syncs")
    parser.add_argument("--against", type=Path, help="JSON file of another run on this machine, to be compared with")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/<size>-<device>.json)")
    given = parser.parse_args(argv)
    if not given.gpu:
        keep_memory()
    os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ  # the profiler talks
    from benchmarks import runner  # not before: it imports torch

    return runner.run(given, began)


def keep_memory() -> None:
    """Let glibc keep large blocks, as the Makefile's variables do: giving each activation back and faulting it in again
    makes torch on a CPU up to ten times slower. No effect where there is another libc."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
        mallopt(parameter, value)


if __name__ == "__main__":
    sys.exit(main())
