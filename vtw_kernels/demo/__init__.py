"""A small vision-language model of the package's own, with images and questions to try withdrawal on.

Its weights, and what was trained for the second model, are in a checkout and in the source distribution. Wheels leave
them to one of their own, ``vtw_kernels_demo``, as they weigh ten times what the rest does.
"""

from pathlib import Path

from vtw_kernels.extras import require

require("vtw_kernels.demo", "search")
if not (Path(__file__).parent / "assets").is_dir():
    raise ImportError(
        "vtw_kernels.demo needs the weights of its models, which are not installed: this package has none of them; run "
        "in a checkout: pip install ./demo"
    )
