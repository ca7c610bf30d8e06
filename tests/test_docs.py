"""The documentation covers what is public, its links lead somewhere, and its code is code."""

import argparse
import ast
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import sft
from sft.cli import build_parser
from sft.profiling.profile import profile as profile_damage

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SOURCE = Path(sft.__file__).parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FUNCTIONS = (
    "apply", "benchmark", "compress", "export", "finetune", "inspect", "load", "plan", "profile",
    "quantize", "reconstruct", "report", "verify",
)  # fmt: skip
PASSED_TO = {"profile": profile_damage}
PAGE_OF_VERB = {"demo": "verbs/compress.md", "list": "command_line.md"}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(language: str, pages: list[Path]) -> list[tuple[str, str]]:
    """(where, code) of each fenced block in that language."""
    return [
        (f"{page.relative_to(ROOT)}#{number}", code)
        for page in pages
        for number, (found, code) in enumerate(BLOCK.findall(text_of(page)))
        if found == language
    ]


def verbs() -> dict[str, argparse.ArgumentParser]:
    """Every sub-command with its parser."""
    actions = build_parser()._actions
    (found,) = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found.choices)


def parameters_of(name: str) -> set[str]:
    """Every argument of a public function, also those that it only passes on."""
    found = inspect.signature(getattr(sft, name)).parameters
    names = {n for n, p in found.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    if len(names) < len(found):
        names |= set(inspect.signature(PASSED_TO[name]).parameters)
    return names


def by_id(cases: list[tuple[str, str]]) -> Callable[..., pytest.MarkDecorator]:
    return pytest.mark.parametrize("code", [c for _, c in cases], ids=[w for w, _ in cases])


def test_every_public_name_is_mentioned() -> None:
    whole = "\n".join(map(text_of, PAGES))
    missing = [n for n in sft.__all__ if not re.search(rf"\bsft\.{n}\b", whole)]
    assert not missing


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_command_has_a_page_that_names_its_options(verb: str) -> None:
    page = DOCS / PAGE_OF_VERB.get(verb, f"verbs/{verb}.md")
    shared = text_of(DOCS / "command_line.md")
    assert re.search(rf"\bsft {verb}\b", text_of(page))
    for action in verbs()[verb]._actions:
        option = action.option_strings[-1] if action.option_strings else "--help"
        if option != "--help":
            named = re.compile(rf"(?<![\w-]){option}(?![\w-])")
            assert named.search(text_of(page) + shared), f"{page.name} lacks {option}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_page_of_a_verb_names_every_argument(name: str) -> None:
    text = text_of(DOCS / "verbs" / f"{name}.md")
    call = re.search(rf"^sft\.{name}\((.*?)\)\s*(#|$)", text, re.MULTILINE | re.DOTALL)
    assert call, f"{name}.md does not show how to call sft.{name}"
    missing = [p for p in parameters_of(name) if not re.search(rf"\b{p}\b", call[1])]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    broken = [
        link
        for link in LINK.findall(BLOCK.sub("", text_of(page)))
        if not re.match(r"[a-z]+:|#", link) and not (page.parent / link.split("#")[0]).exists()
    ]
    assert not broken


def test_every_page_is_linked() -> None:
    linked = {
        (page.parent / link.split("#")[0]).resolve()
        for page in PAGES
        for link in LINK.findall(text_of(page))
    }
    assert not [p.name for p in PAGES[1:] if p.resolve() not in linked]


@by_id(blocks("python", PAGES))
def test_python_blocks_compile(code: str) -> None:
    compile(code, "block", "exec")


@by_id(blocks("sh", PAGES[1:]))
def test_commands_are_accepted_by_the_parser(code: str) -> None:
    for line in code.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "sft"
        build_parser().parse_args(arguments)


def test_every_key_of_a_result_is_explained() -> None:
    text = text_of(DOCS / "result.md")
    keys = {
        key.value
        for file in ("outcome.py", "job.py")
        for node in ast.walk(ast.parse((SOURCE / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }
    assert {"schema", "validation_score", "seconds"} <= keys
    assert not [k for k in sorted(keys) if f"`{k}`" not in text]
