"""Check what the wheel and the source distribution of a folder hold: `python tests/wheel/contents.py dist`."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def compare(what: Path, held: set[str], wanted: set[str]) -> None:
    if held != wanted:
        sys.exit(f"{what}: missing {sorted(wanted - held)}, not wanted {sorted(held - wanted)}")
    print(f"{what}: {len(held)} files, as wanted")


dist = Path(sys.argv[1])
listed = subprocess.run(["git", "ls-files", "prefix_adapter"], cwd=ROOT, check=True, capture_output=True, text=True)
package = set(listed.stdout.split())

wheel = one(dist, "*.whl")
name = "-".join(wheel.name.split("-")[:2])
info = {f"{name}.dist-info/{file}" for file in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
compare(wheel, set(zipfile.ZipFile(wheel).namelist()), package | info | {f"{name}.dist-info/licenses/LICENSE"})

with zipfile.ZipFile(wheel) as archive:
    metadata = archive.read(f"{name}.dist-info/METADATA").decode("utf-8")
if broken := re.findall(r"\]\((?![a-z]+:|#)[^)]+\)", metadata):
    sys.exit(f"{wheel}: PyPI would show links to files that it does not have: {broken}")
if "# prefix-adapter" not in metadata:
    sys.exit(f"{wheel}: the README is missing")

source = one(dist, "*.tar.gz")
with tarfile.open(source) as archive:
    files = {member.name.removeprefix(f"{name}/") for member in archive if not member.isdir()}
egg = ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt")
made = {"PKG-INFO", "setup.cfg"} | {f"prefix_adapter.egg-info/{file}" for file in egg}
kept = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
compare(source, files, package | made | kept)
