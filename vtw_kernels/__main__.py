"""``python -m vtw_kernels`` is ``vtw-kernels``."""

import sys

from vtw_kernels.cli import main

sys.exit(main())
