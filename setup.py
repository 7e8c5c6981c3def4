"""The README as PyPI shows it. All other settings are in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)]+)\)")


def readme() -> str:
    """Return the README with links into the repository.

    PyPI has none of the files that a relative link names. Without a `Repository` in `[project.urls]` only the text of
    such a link is kept.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository")
    link = rf"[\1]({repository}/blob/main/\2)" if repository else r"\1"
    return RELATIVE_LINK.sub(link, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(long_description=readme(), long_description_content_type="text/markdown")
