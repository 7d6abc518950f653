"""Visual Tokens Withdrawal in vLLM, without a fork: ``vllm serve MODEL --hf-overrides '{"vtw": {"layer": 16}}'``.

One file per concern: ``config.py`` reads the setting and refuses what does not go together with it; ``models.py`` makes
the class that vLLM loads; ``decoder.py`` runs the decoder in two stages; ``attention.py`` tells the later stage's
attention which rows there are; ``cache.py`` and ``scheduler.py`` allocate blocks of the KV cache for text alone;
``model_state.py`` is what a GPU's runner needs in place of what that of a CPU has."""

from vtw_kernels.integration.vllm.config import TESTED_VLLM, register

__all__ = ["TESTED_VLLM", "register"]
