"""With this folder on PYTHONPATH, and PRETEND_ORDER set, each Python process is on the pretend GPU from its start
on."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
import pretend_gpu

pretend_gpu.load()
