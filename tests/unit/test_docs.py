"""Pages name only files that exist, the page of keys is made from the models, and the map says a word of each file."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from tools import map as code_map
from tools import python_versions, spec_keys

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = ("cluster", "tracking", "jobs", "serve", "tests", "tools", "benchmarks", "docs")
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w\*?")


def paths_named_in(text: str) -> set[str]:
    """Paths in the repository, in prose, links and commands; relative links are those of pages in docs/."""
    return set(PATH.findall(text))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    named = paths_named_in(page.read_text(encoding="utf-8"))
    assert [path for path in sorted(named) if not list(ROOT.glob(path))] == []


def test_a_wrong_path_is_found() -> None:
    assert paths_named_in("see `jobs/nothing.py:12` and [x](docs/a.md), not my/jobs/x.py") == {
        "jobs/nothing.py",
        "docs/a.md",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_page_of_keys_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert spec_keys.main(["--check"]) == 0, capsys.readouterr().out


class Inner(BaseModel):
    """An inner section."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    share: float = Field(0.5, ge=0, lt=1)
    """A share."""
    bare: int = 1


class Outer(BaseModel):
    """A spec."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    one: Inner
    many: dict[str, Inner] = {}
    """Some of them."""
    size: int | Inner | None = 3
    """A size."""


def test_every_key_of_a_model_is_listed_with_type_default_and_help() -> None:
    found = {key.path: key for section in spec_keys.sections(Outer) for key in section.keys}
    assert list(found) == [
        "one", "many", "size",
        "one.share", "one.bare", "many.<name>.share", "many.<name>.bare", "size.share", "size.bare",
    ]  # fmt: skip
    assert found["one"] == spec_keys.Key("one", "section", "", "An inner section.")
    assert found["many"] == spec_keys.Key("many", "mapping of names to sections", "–", "Some of them.")
    assert found["size"] == spec_keys.Key("size", "integer or section or `null`", "`3`", "A size.")
    assert found["one.share"] == spec_keys.Key("one.share", "number ≥ 0, < 1", "`0.5`", "A share.")
    assert spec_keys.without_help(spec_keys.sections(Outer)) == ["one.bare", "many.<name>.bare", "size.bare"]


def test_the_map_has_a_line_for_every_file_of_the_four_folders() -> None:
    lines = list(code_map.lines(("cluster", "tracking", "jobs", "serve")))
    assert [line for line in lines if len(line.split()) < 4 and not line.endswith("/")] == []
    modules = [path for folder in ("cluster", "tracking", "jobs", "serve") for path in (ROOT / folder).rglob("*.py")]
    assert len([line for line in lines if line.split()[0].endswith(".py")]) == len(
        [path for path in modules if path.name != "__init__.py"]
    )


def test_the_pages_name_the_python_versions_that_are_tested() -> None:
    versions = python_versions.named_versions((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"3\.\d\d", readme.split("Python ", 1)[1].split("(", 1)[0]) == versions
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"Python {versions[0]} to {versions[-1]} is needed" in (ROOT / "tools/install").read_text(encoding="utf-8")
