"""``python -m src.<verb>`` runs the package of this checkout, whatever copy of it is installed.

Two copies in one process would be two sets of classes and registries, so a second identity is refused: here where a
copy from elsewhere was imported before, and by the package where it is imported as ``src.glimpseprune``.
"""

import signal
import sys
from pathlib import Path

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while a command is imported, Ctrl-C ends it as SIGTERM does

HERE = Path(__file__).resolve().parent

sys.path.insert(0, str(HERE))
import glimpseprune  # noqa: E402

sys.path.remove(str(HERE))  # or src/evaluate.py would stand in for a library called evaluate

if Path(glimpseprune.__file__).resolve().parent != HERE / "glimpseprune":
    raise ImportError(
        f"glimpseprune was imported from {Path(glimpseprune.__file__).parent} before src, whose package is "
        f"{HERE / 'glimpseprune'}: import one of them only"
    )
