"""The README's code blocks run as they stand, in one session."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    session: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), session)


def test_commands_exist():
    """Every make target that the README names is one."""
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README.read_text(), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
