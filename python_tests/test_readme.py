"""What the README and the pages of ``docs/`` show: code that runs, commands that exist, numbers and links that are
there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_python_blocks(page, tmp_path, monkeypatch):
    """The blocks of a page run as they stand, in one session."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    session: dict = {"__name__": "a_page"}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), session)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_links(page):
    """Every make target that is named is one, and every file that is linked to is there."""
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_the_table_is_what_was_measured():
    """``docs/methods.py`` wrote it."""
    assert (ROOT / "docs/methods.md").read_text() in (ROOT / "README.md").read_text()
