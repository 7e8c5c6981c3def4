"""The Python blocks of a page, run as they stand on models that are at hand."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str) -> list[str]:
    """The Python blocks of a page of the project, in their order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def run(code: str, places: dict[str, str]) -> dict:
    """Run code with folders in place of names on the Hub; what it defined."""
    for name, place in places.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(place))
    scope: dict = {}
    exec(code, scope)
    return scope
