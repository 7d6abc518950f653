"""On PYTHONPATH wherever vLLM runs in the environment of ``make test-vllm``.

The CPU build of vLLM asks PyPI for torchvision, which has that for CUDA alone. Beside a CPU build of torch its library
does not load, and then its import fails, because it registers fakes for two ops that nobody has defined. Here they are
defined first, without kernels: vLLM calls neither, it only imports transformers' image processors.
"""

import sys
from importlib.abc import MetaPathFinder


class DefineOps(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            keep.append(self)
        return None


keep = []  # a library takes its definitions with it
sys.meta_path.insert(0, DefineOps())
