"""README and docs: Python that parses and names what is there, commands and options that exist, links that lead on."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

import mixturelens as ml
from mixturelens.cli import app
from mixturelens.suite import PromptRow

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), ROOT / "artifacts" / "real" / "README.md"]
LONGEST = 110
"""Lines of the README."""

each = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks, also those that stand indented under an item of a list."""
    fenced = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
    for indent, language, text in fenced.findall(page.read_text(encoding="utf-8")):
        yield Block(language, "\n".join(line.removeprefix(indent) for line in text.splitlines()))


def prose(page: Path) -> str:
    """The page without blocks and code."""
    without = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", without)


def source_of(module: str) -> str:
    """Text of a module of this repository, which is not imported for it."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.is_file(), f"no module {module}"
    return file.read_text(encoding="utf-8")


@each
def test_python_parses_and_names_what_is_there(page: Path) -> None:
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ml":
                assert node.attr in ml.__all__, f"ml.{node.attr}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mixturelens":
                text = source_of(node.module or "")
                for name in node.names:
                    assert re.search(rf"\b{name.name}\b", text), f"{node.module}.{name.name}"


@each
def test_names_of_the_api_in_the_text_are_there(page: Path) -> None:
    for name in re.findall(r"`ml\.(\w+)", page.read_text(encoding="utf-8")):
        assert name in ml.__all__, f"ml.{name}"


def command_lines(page: Path) -> Iterator[list[str]]:
    for block in blocks(page):
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
                words.whitespace_split = True
                for end, command in itertools.groupby(words, lambda word: set(word) <= set(";&|")):
                    if not end:
                        yield list(command)


@each
def test_commands_and_options_exist(page: Path) -> None:
    program: Any = typer.main.get_command(app)
    for program_name, *words in command_lines(page):
        if program_name == "mixturelens":
            parse(program, words)
        elif program_name == "make":
            targets = set(re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
            assert set(words) <= {target for line in targets for target in line.split()}, words
        elif program_name == "python" and words[0] == "-m":
            source_of(words[1])
        elif program_name == "python":
            assert (ROOT / words[0]).is_file(), words[0]


def parse(command: Any, words: list[str]) -> None:
    """Raises AssertionError where a command, an option or an argument is not there; nothing is run."""
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    with command.context_class(command, info_name=command.name) as context:
        try:
            _, left, _ = command.make_parser(context).parse_args(list(words))
        except Exception as error:  # typer brings its own click, whose errors have no public name
            raise AssertionError(f"{command.name}: {error}") from error
    assert not left, f"{command.name}: {left} is left over"


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    program: Any = typer.main.get_command(app)
    parse(program, ["verdict", "--before", "S", "--after", "R", "--suite", "suite.yaml"])
    for wrong in (["verdicts", "RUN"], ["verdict", "RUN", "--befor"], ["verdict", "--out"], ["report", "a", "b", "c"]):
        with pytest.raises(AssertionError):
            parse(program, wrong)
    page = tmp_path / "page.md"
    page.write_text("```python\nimport mixturelens as ml\nml.open_pair()\n```\n[a](gone.md) [b](#nowhere)\n# Here\n")
    with pytest.raises(AssertionError, match=r"ml\.open_pair"):
        test_python_parses_and_names_what_is_there(page)
    with pytest.raises(AssertionError, match=r"gone\.md"):
        test_links_lead_to_files_and_headings(page)


@pytest.mark.parametrize("page", [DOCS / "quickstart.md", DOCS / "suites.md"], ids=lambda page: page.name)
def test_the_suite_that_a_page_shows_can_be_loaded(page: Path, tmp_path: Path) -> None:
    shown = next(block.text for block in blocks(page) if block.language == "yaml" and "policies:" in block.text)
    rows = re.findall(r'^ +({"id".*})$', (DOCS / "quickstart.md").read_text(encoding="utf-8"), re.MULTILINE)
    (tmp_path / "suite.yaml").write_text(shown, encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert ml.load_suite(tmp_path / "suite.yaml").cues == ("plain", "odd")


@each
def test_lines_of_prompts_are_read(page: Path) -> None:
    rows = [json.loads(line) for block in blocks(page) if block.language == "json" for line in block.text.splitlines()]
    for row in rows:
        assert PromptRow.model_validate(row).spans


def slug(heading: str) -> str:
    """What code forges and MkDocs call the place of a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def headings(page: Path) -> set[str]:
    return {slug(text) for text in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


@each
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def test_every_page_is_in_the_navigation() -> None:
    def leaves(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from leaves(inner)

    found = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(leaves(found["nav"])) == sorted(file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md"))


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST
    assert max(map(len, lines)) <= 120
