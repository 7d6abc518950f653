"""How Sphinx makes these pages; ``make docs`` calls it."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

import vtw_kernels
from vtw_kernels.integration.families import FAMILIES

HERE = Path(__file__).parent
project = "vtw_kernels"
author = copyright = "the authors of vtw_kernels"
release = version = vtw_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["families.md", "methods.md"]  # parts of other pages
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # what is included begins where its page is

html_theme = "furo"
html_title = f"vtw_kernels {release}"
html_static_path, html_css_files = ["_static"], ["pages.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring, napoleon_numpy_docstring = True, False


def write_families(app: Sphinx) -> None:
    """The families that are proven, and those that are refused, as the tests and the package have them."""
    sys.path.insert(0, str(HERE.parent / "python_tests"))
    from families_zoo import RECIPES
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

    lines = ["| `model_type` | class in transformers | visual tokens |", "|---|---|---|"]
    for family, recipe in sorted(RECIPES.items()):
        told_by = "pass `visual_mask=`" if recipe.masked else "found in the inputs"
        lines.append(f"| `{family}` | {f'`{CLASSES[family]}`' if family in CLASSES else ''} | {told_by} |")
    lines += ["", "Refused:", ""]
    lines += [f"* `{name}`: {family.refused}." for name, family in sorted(FAMILIES.items()) if family.refused]
    (HERE / "families.md").write_text("\n".join(lines) + "\n")


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", write_families)
