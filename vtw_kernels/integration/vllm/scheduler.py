"""vLLM's scheduler, which tells the managers of ``cache.py`` where images are: they see ids and numbers alone.

vLLM takes another scheduler by its name in the config and says that its interface is not public. If it took its own
after all, the managers would have no requests, and fail at the first one."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vtw_kernels.integration.vllm.cache import TextOnlyManager


class TextScheduler(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # If layers were merged into one group, or were asked for their specs otherwise, blocks would be allocated for
        # visual tokens, and slots in them not be those that attention.py says.
        managers = self.kv_cache_manager.coordinator.single_type_managers
        text_only = [manager for manager in managers if isinstance(manager, TextOnlyManager)]
        if not text_only:
            raise RuntimeError("vtw: expected layers that keep text alone in a KV cache group of their own, got none")
        for manager in text_only:
            manager.requests = self.requests  # vLLM adds to and takes from this dict, and never makes another


class AsyncTextScheduler(TextScheduler, AsyncScheduler):
    pass


def text_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> TextScheduler:
    """Whether scheduling is asynchronous, vLLM decides after it was told which scheduler to take."""
    cls = AsyncTextScheduler if vllm_config.scheduler_config.async_scheduling else TextScheduler
    return cls(vllm_config, *args, **kwargs)
