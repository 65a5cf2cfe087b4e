"""README, docs and the pages beside them: every link, path, name of code, config and command in them exists."""

import functools
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

import boltznce
from boltznce import config
from boltznce.benchmarks.run import BENCHMARKS
from boltznce.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = (r"\.ci", "boltznce", "configs", "docs", "notebooks", "scripts", "tests")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path) -> list[str]:
    """The code blocks of a page."""
    return re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """The code within its lines, outside of the blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(command, its words), by its script or not; ``…`` stands for what a user fills in."""
    found = [re.search(r"(?:python scripts/(\w+)\.py|^boltznce (\w+))([^#&]*)", line) for line in lines(page)]
    return [(match[1] or match[2], shlex.split(match[3].replace("…", "x"))) for match in found if match]


def lines(page: Path) -> list[str]:
    """All that is code."""
    return [*spans(page), *(line for block in blocks(page) for line in block.splitlines())]


def test_there_are_pages_and_commands():
    named = {"README", "CHANGELOG", "CONTRIBUTING", "results", "benchmarks", "choices", "equations", "own_parts"}
    named |= {"boltznce", "tbg", "tabg"}  # docs/papers
    assert named <= {page.stem for page in PAGES}
    assert len([command for page in PAGES for command in commands(page)]) > 40


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_paths_exist(page):
    named = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*")
    for word in (word for line in lines(page) for word in line.split()):
        if named.fullmatch(word):
            assert (ROOT / word).exists(), word


@pages
def test_what_tests_and_installations_are_asked_for_exists(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    markers = [marker.partition(":")[0] for marker in project["tool"]["pytest"]["ini_options"]["markers"]]
    for line in lines(page):
        assert set(re.findall(r"pip install.*\[([\w,]+)\]", line)) <= set(project["project"]["optional-dependencies"])
        assert set(re.findall(r"pytest -m (\w+)", line)) <= set(markers)
        assert set(re.findall(r"^test_\w+$", line)) <= names_of_tests(), line


@functools.cache
def names_of_tests() -> set[str]:
    files = (ROOT / "tests").glob("test_*.py")
    return {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE)}


def test_version_license_and_papers_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == boltznce.__version__
    assert f"\n## {boltznce.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == project["license"] == "MIT"
    (holder,) = citation["authors"]
    assert f"Copyright (c) 2026 {holder['name']}" in (ROOT / "LICENSE").read_text()
    readme = (ROOT / "README.md").read_text()
    assert len(citation["references"]) == 3
    for paper in citation["references"]:
        assert f"]({paper['url']})" in readme


@pages
def test_names_of_code_exist(page):
    for module, names in re.findall(r"`(boltznce/[\w/]+)\.py`\S*: ((?:`[\w.]+`(?:, )?)+)", page.read_text()):
        for name in re.findall(r"`([\w.]+)`", names):
            found = importlib.import_module(module.replace("/", "."))
            for part in name.split("."):
                found = getattr(found, part)
    for name in re.findall(r"\bbz\.(\w+)", page.read_text()):
        assert name in boltznce.__all__, name


def test_every_equation_has_its_code():
    rows = [line for line in (ROOT / "docs" / "equations.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| what ")]
    assert len(rows) > 30
    for row in rows:
        assert re.search(r"\| \[`boltznce/[\w/]+\.py`\]\(\S+\): `\w", row), row


@pages
def test_commands_compose(page):
    if page.stem == "own_parts":  # run by tests/test_own_parts.py, in a folder that has what they name
        return
    for script, words in commands(page):
        assert script in COMMANDS
        words = one_member(words) if "-m" in words else words
        composed = compose(script, tuple(word for word in words if not word.startswith("-")))
        if script == "benchmark":
            assert composed.what in BENCHMARKS


def one_member(words: list[str]) -> list[str]:
    """Of a sweep, without its launcher, which need not be installed, and what is to be found by search."""
    kept = [word for word in words if not word.startswith(("launcher=", "hydra.")) and "(" not in word]
    return [word.partition(",")[0] for word in kept]


@functools.cache
def compose(script: str, words: tuple[str, ...]) -> DictConfig:
    return config.compose(script, words)


SEQUENCES = ("AK", "KS", "ACE-AAA-NME")  # that stand in the pages as systems


@functools.cache
def contexts() -> list[DictConfig]:
    """Settings of the commands that a reader may have in mind."""
    known = [("train", ()), ("sample", ("run=x",)), ("simulate", ()), ("train", ("system=dipeptides",))]
    known += [("train", ("system=gaussians8",)), ("benchmark", ()), ("import", ("files=x", "temperature=300"))]
    known += [("train", (f"method={method}",)) for method in ("tabg", "tbg", "forward_kl", "fab")]
    return [compose(*each) for each in known]


@pages
def test_settings_exist(page):
    """``method=tabg`` and the like, which belong to a command that the reader knows: some command has them."""
    for span in sorted(set(spans(page))):
        words = [word.lstrip("+").partition("=") for word in span.split()]
        if all(re.fullmatch(r"\+?[\w.@]+=[\w./,-]+", word) for word in span.split()):
            for key, _, value in words:
                group = key.partition("@")[0]
                if (config.config_dir() / group).is_dir():
                    assert set(value.split(",")) <= {
                        *config.available(group),
                        *names_below(group),
                        "AK",
                        "KS",
                        "ACE-AAA-NME",
                    }
                else:
                    assert any(has(settings, key) for settings in contexts()), span


def names_below(group: str) -> set[str]:
    """``tabg/aldp`` of a group that has folders."""
    folder = config.config_dir() / group
    return {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}


def has(settings: DictConfig, key: str) -> bool:
    """Whether a key stands in settings, whatever its value."""
    above, _, last = key.rpartition(".")
    parent = OmegaConf.select(settings, above) if above else settings
    return isinstance(parent, DictConfig) and last in parent
