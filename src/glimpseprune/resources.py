"""What the package brings along: configs, DeepSpeed's JSONs, the embedded LVLM, by their names in a checkout.

``shipped/`` holds them. In the repository it is links to ``conf/`` and into ``data/``, so that nothing is there twice;
in a wheel, files. To ship more, link it there.
"""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).with_name("shipped")


def find(path: str | Path) -> str:
    """``path`` if that is there, seen from the working directory; else where the package brings what is called so, such
    as ``conf/stage1.yaml`` or ``data/tiny-qwen2_5_vl``; else ``path`` again, whose absence is not told here."""
    shipped = SHIPPED / path
    inside = shipped.is_relative_to(SHIPPED) and ".." not in shipped.parts
    return str(shipped if inside and shipped.exists() and not Path(path).exists() else path)
