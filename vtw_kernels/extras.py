"""Packages that the ops do without, by the extra that brings them. Whoever needs them names those that are missing."""

from importlib.util import find_spec

PACKAGES = {"transformers": ["transformers"]}
PACKAGES["search"] = [*PACKAGES["transformers"], "numpy", "scipy", "tqdm", "rich", "matplotlib", "jinja2", "pillow"]
PACKAGES["bench"] = [*PACKAGES["search"], "pytest", "pytest-benchmark"]


def require(what: str, extra: str) -> None:
    """Raises ImportError where packages of an extra are not installed, and says which, and who needs them."""
    modules = {name: {"pillow": "PIL"}.get(name, name.replace("-", "_")) for name in PACKAGES[extra]}
    if missing := [name for name, module in modules.items() if find_spec(module) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(
            f"{what} needs {', '.join(missing)}, which {verb} not installed; run: pip install 'vtw_kernels[{extra}]'"
        )
