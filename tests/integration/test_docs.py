"""The tutorial's Python runs as it stands: its ``python`` blocks in order, in one namespace, in an empty folder.

A block that is not meant to run (a command line, an outline) is not marked ``python``.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import types
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """(line of its first statement, code) of each ``python`` block."""
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in FENCE.finditer(text)]


def run(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Run the page's blocks as one module (dataclasses look theirs up). A failure's traceback shows the page and its line."""
    module = types.ModuleType(f"docs_{path.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code in blocks(path.read_text(encoding="utf-8")):
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), vars(module))
    return vars(module)


def code_lines(code: str) -> int:
    """Lines of code: not blank, not a comment, not in a docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    spoken = {line for t in tokens if t.type not in silent for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            spoken -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(spoken)


def test_blocks_are_found_with_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\nx = 1\n```\n\n```\nnot run\n```\n\n```python\ny = x + 1\nraise ValueError(y)\n```\n")
    assert [line for line, _ in blocks(page.read_text())] == [4, 12]
    with pytest.raises(ValueError, match="2") as raised:
        run(page, monkeypatch)
    assert raised.traceback[-1].lineno + 1 == 13


def test_docstrings_comments_and_blank_lines_do_not_count() -> None:
    code = 'class A:\n    """What.\n\n    More.\n    """\n\n    # why\n    x: int = 1\n\n'
    code += "    def f(\n        self,\n    ) -> int:\n        return 1  # one\n"
    assert code_lines(code) == 6


def test_the_tutorial_runs_and_its_method_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = DOCS / "tutorial.md"
    assert "FedProx" in run(page, monkeypatch), "the tutorial builds FedProx"
    (definition,) = [code for _, code in blocks(page.read_text(encoding="utf-8")) if "class FedProx" in code]
    assert code_lines(definition) <= 40, "imports included"
