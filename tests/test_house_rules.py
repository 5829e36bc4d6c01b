"""The rules of docs/style.md that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT, environment

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

SOURCES = sorted((ROOT / "bigan").rglob("*.py"))
# The pages that have to name a word to forbid it, or that quote old names.
PROSE = [
    path
    for path in [
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
    if path.name != "style.md"
]
AVOIDED = {
    "recipe": r"\brecipes?\b",
    "rehearsal": r"\brehears\w*",
    "anew": r"\banew\b",
    "life of a run": r"(?<!half-)\b(life|lives) of\b",
    "issue number": r"\bissue \d",
}


def places(path: Path, pattern: str) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if re.search(pattern, line, re.IGNORECASE):
            yield f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    long = [f"{p.relative_to(ROOT)}: {num}" for p, num in lengths.items() if num > MAX_FILE_LINES]
    assert not long


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long


def test_networks_have_full_names() -> None:
    """Literals of letters elsewhere: the pipelines of ADA and the types of tar members."""
    sources = [path for path in SOURCES if path.name not in ("ada.py", "tar.py")]
    assert not [place for path in sources for place in places(path, r"""["'](?-i:g|d|ema)["']""")]


@pytest.mark.parametrize("word", AVOIDED)
def test_avoided_words_do_not_occur(word: str) -> None:
    assert not [place for path in (*SOURCES, *PROSE) for place in places(path, AVOIDED[word])]


def test_packages_import_only_from_lower_layers() -> None:
    code = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[done.stdout.find("Contracts:") :]
