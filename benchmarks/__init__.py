"""How fast, how large, how near to what the machine can do: ``python -m benchmarks``, see docs/benchmarks.md.

Runs from a bare checkout with torch, transformers, safetensors and numpy; what needs more says so and is skipped.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
