"""What the project says about itself is there: files, commands, versions, names in the pages for contributors."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml
from pages import ROOT

from prefix_adapter.version import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FORGE = sorted(path for kind in ("yml", "md") for path in (ROOT / ".github").rglob(f"*.{kind}"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CITATION = ROOT / "CITATION.cff"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *FORGE])


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_versions_agree():
    assert yaml.safe_load(read(ROOT / "CITATION.cff"))["version"] == __version__
    assert __version__ in re.findall(r"^## (.*)$", read(ROOT / "CHANGELOG.md"), re.MULTILINE)[0]


@pytest.mark.parametrize("repository", [None, "https://forge.example/us/it"])
def test_the_readme_on_pypi_has_no_relative_link(repository, monkeypatch):
    given = {}
    urls = {"urls": {"Repository": repository}} if repository else {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: given.update(settings))
    monkeypatch.setattr("tomllib.loads", lambda text: {"project": urls})
    runpy.run_path(str(ROOT / "setup.py"))
    links = re.findall(r"\]\(([^)]+)\)", given["long_description"])
    assert links and all(link.startswith(("https://", "#")) for link in links)
    assert (f"[Backbones]({repository}/blob/main/docs/backbones.md)" in given["long_description"]) == bool(repository)
    assert "Backbones" in given["long_description"]


def test_the_address_is_the_same_everywhere():
    """Until the project has a public address, `repo_url` is a placeholder, and other files have none."""
    shown = re.search(r"^repo_url: (\S+)$", read(ROOT / "mkdocs.yml"), re.MULTILINE)[1]
    is_placeholder = "# A placeholder" in read(ROOT / "mkdocs.yml")
    others = [
        PROJECT["project"].get("urls", {}).get("Repository"),
        yaml.safe_load(read(CITATION)).get("repository-code"),
    ]
    assert others == ([None, None] if is_placeholder else [shown, shown])


def test_the_list_of_placeholders_is_complete():
    """Files that name the placeholder's address, and files that call something a placeholder, are in CONTRIBUTING."""
    section = read(ROOT / "CONTRIBUTING.md").partition("### Before the first release\n")[2]
    address = re.search(r"^repo_url: https://(\S+)$", read(ROOT / "mkdocs.yml"), re.MULTILINE)[1]
    code = [*ROOT.glob("*.py"), *(ROOT / "prefix_adapter").rglob("*.py")]
    settings = [*ROOT.glob("*.toml"), *ROOT.glob("*.yml"), *ROOT.glob("*.cff"), *ROOT.glob("*.in"), *FORGE]
    texts = {path: read(path) for path in {*PAGES, *code, *settings}}
    found = {path for path, text in texts.items() if address in text}
    found |= {path for path in settings if re.search(r"(?i)# .*\b(placeholder|todo|fixme)\b", texts[path])}
    assert {str(path.relative_to(ROOT)) for path in found} <= set(re.findall(r"`([\w./]+)`", section))
    assert not [path for path, text in texts.items() if re.search(r"\b(TODO|FIXME|XXX)\b", text)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_exists(path):
    jobs = yaml.safe_load(read(path))["jobs"].values()
    commands = [step["run"] for job in jobs for step in job.get("steps", ()) if "run" in step]
    rows = [row for job in jobs for row in job.get("strategy", {}).get("matrix", {}).get("include", ())]
    for job in jobs:
        commands += job.get("strategy", {}).get("matrix", {}).get("command", ())
    commands += [row["constraints"] for row in rows]
    assert commands
    text = "\n".join(commands)
    for word in re.findall(r"(?<![\w/.])[\w.-]*/?[\w./-]+(?:\.txt|\.sh|\.py|\.md|\.cff|/run)\b", text):
        assert (ROOT / word).is_file(), word
    text += "\n".join(read(ROOT / script) for script in re.findall(r"bash (\S+)", text))
    extras = {extra for names in re.findall(r"\.\[([\w,-]+)\]", text) for extra in names.split(",")}
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    markers = {marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"pytest.* -m (\w+)", text)) <= markers
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert not rows or rows[0]["python"] == oldest


@pytest.mark.parametrize("path", [path for path in FORGE if path.suffix == ".yml"], ids=lambda path: path.stem)
def test_the_files_of_the_forge_are_yaml(path):
    assert isinstance(yaml.safe_load(read(path)), dict)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    named = re.findall(
        r"(?<![\w/.-])((?:tests|examples|benchmarks|docs|\.ci)/[\w/.-]+\.(?:py|sh|yaml|md|txt))", read(page)
    )
    assert not [path for path in named if not (ROOT / path).is_file()]


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_the_links_of_a_page_outside_the_site(page):
    """mkdocs checks the pages in `docs`."""
    for path, anchor in re.findall(r"\]\((?![a-z]+:)([^)#]*)#?([\w-]*)\)", read(page)):
        target = ROOT / path if path else page
        assert target.is_file(), path
        headings = re.findall(r"^#+ (.*)$", read(target), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, (
            anchor
        )


def test_what_contributors_are_told_to_change_exists():
    code = [name for name in re.findall(r"`([^`\n]+)`", read(ROOT / "CONTRIBUTING.md")) if " " not in name]
    roots = [ROOT, ROOT / "prefix_adapter", ROOT / "prefix_adapter" / "training"]
    paths = [name for name in code if "/" in name]
    assert len(paths) > 20 and not [path for path in paths if not any((root / path).exists() for root in roots)]
    files = [
        ROOT / "pyproject.toml",
        *(path for name in ("prefix_adapter", "tests") for path in (ROOT / name).rglob("*.py")),
    ]
    sources = "\n".join(map(read, files))
    names = [name for name in code if re.fullmatch(r"[A-Z_]{5,}|_\w+|[A-Z]\w+(\.[a-z]\w{4,})?", name)]
    parts = {part for name in names if not (ROOT / name).exists() for part in name.split(".")}
    assert len(parts) > 10 and not [part for part in parts if not re.search(rf"\b{part}\b", sources)]
