"""The setting ``vtw`` of a model's config: what it may say, and what it goes together with.

vLLM loads plug-ins in each of its processes before it looks at a model, and asks ``MODELS_CONFIG_MAP``, by
architecture, for a class that adjusts its config. Every architecture gets one here that asks whoever was there before,
and then does nothing unless the config has ``vtw``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

# Other releases are refused: most of what is used here is nobody's promise.
TESTED_VLLM = "0.32"
PREFIX = "WithdrawVisualTokens"  # of the architectures that vLLM loads instead
SCHEDULER = "vtw_kernels.integration.vllm.scheduler.text_scheduler"
REQUEST_CHECK = "vtw_kernels.integration.vllm.models:RequestCheck"


def register() -> None:
    """The entry point ``vllm.general_plugins``."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import config

    # If this table goes, withdrawal would silently not be: then the import, or the subscript below, fails. If it stayed
    # and nobody asked it, the first refusals that the tests want would be missed.
    table = config.MODELS_CONFIG_MAP
    for architecture in list(ModelRegistry.get_supported_archs()):
        before = table.get(architecture, config.VerifyAndUpdateConfig)
        if architecture.startswith(PREFIX) or issubclass(before, _Adjusted):
            continue
        table[architecture] = type(
            f"Adjusted{architecture}", (_Adjusted, config.VerifyAndUpdateConfig), {"before": before}
        )
        ModelRegistry.register_model(
            PREFIX + architecture, f"vtw_kernels.integration.vllm.models:{PREFIX}{architecture}"
        )


class _Adjusted:
    """In the place of ``before``, which is asked first."""

    before: Any

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        cls.before.verify_and_update_model_config(model_config)
        if getattr(model_config.hf_config, "vtw", None) is not None:
            adjust_model(model_config)

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        cls.before.verify_and_update_config(vllm_config)
        if getattr(vllm_config.model_config.hf_config, "vtw", None) is not None:
            adjust_engine(vllm_config)


def adjust_model(model_config: Any) -> None:
    """Has vLLM load the class of ``models.py`` instead of that of the architecture.

    Raises:
        ValueError: a setting that is wrong, or wrong for this model or release.
    """
    import vllm
    from vllm.platforms import current_platform

    if vllm.__version__.split(".")[:2] != TESTED_VLLM.split("."):
        raise ValueError(f"vtw: expected vLLM {TESTED_VLLM}, got {vllm.__version__}")
    hf_config, architecture = model_config.hf_config, model_config.architecture
    if architecture.startswith(PREFIX):
        return
    if not takes_images(model_config) or model_config.is_encoder_decoder:
        raise ValueError(f"vtw: expected a model whose decoder is given images among its tokens, got {architecture}")
    if model_config.architecture not in model_config.architectures:
        raise ValueError(f"vtw: expected vLLM's own implementation of {model_config.architectures}, got {architecture}")
    if model_config.runner_type != "generate":
        raise ValueError(f"vtw: expected a model that generates, got the runner {model_config.runner_type}")
    layers = model_config.hf_text_config.num_hidden_layers
    # The config is part of the key by which vLLM finds what it has compiled, so that this is per layer. If it were not,
    # layers compiled for one would be found for another: python_tests/vllm_plugin compares keys.
    hf_config.vtw = {"layer": read_layer(hf_config.vtw, layers)}
    # The loader, and whoever processes images, take the class of the config's architectures; all else that is asked of
    # an architecture, vLLM goes on asking the one it knows. If the loader did too, the engine would fail at its start:
    # scheduler.py would find no layers that keep text alone.
    hf_config.architectures = [PREFIX + architecture]
    model_config.logits_processors = [*(model_config.logits_processors or []), REQUEST_CHECK]
    if current_platform.is_cpu():
        # Has vLLM's first model runner hand the ranges of visual tokens to attention; if it does not, attention.py
        # raises. No backend of a CPU does anything else with it: one that did would let images be seen in both
        # directions in the layers before, and answers differ. Those of a GPU do, where model_state.py hands them on.
        hf_config.is_mm_prefix_lm = True
        model_config.model_arch_config = replace(model_config.model_arch_config, is_mm_prefix_lm=True)


def takes_images(model_config: Any) -> bool:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    if not model_config.is_multimodal_model:
        return False
    # By kind; of what vLLM asks too, when it looks whether an engine takes any.
    limits = MULTIMODAL_REGISTRY.get_processing_info(model_config).supported_mm_limits
    return not {"image", "video"}.isdisjoint(limits)


def read_layer(setting: Any, layers: int) -> int:
    """The layer that ``vtw`` names, of a decoder with so many.

    Raises:
        ValueError: something else.
    """
    from vtw_kernels.integration.policies import chosen_layer

    if not isinstance(setting, dict) or set(setting) != {"layer"}:
        raise ValueError(f'vtw: expected {{"layer": NUMBER or FILE}}, got {setting!r}')
    layer = setting["layer"]
    if isinstance(layer, str):
        if Path(layer).suffix == ".safetensors":
            raise ValueError(f"vtw: layer: expected the same one for all requests, got routers, {layer}")
        try:
            layer = chosen_layer(layer, None, layers)
        except OSError as error:
            raise ValueError(
                f"vtw: layer: expected a number, or a file that LayerSearch.save wrote, got {error}"
            ) from None
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < layers:
        raise ValueError(
            f"vtw: layer: expected a number from 1 to {layers - 1}, below the decoder's {layers}, got {layer!r}"
        )
    return layer


def adjust_engine(vllm_config: Any) -> None:
    """Puts the scheduler of ``scheduler.py`` in place.

    Raises:
        ValueError: something is asked for that withdrawal does not go together with.
    """
    from vllm.platforms import current_platform

    parallel, cache, scheduler = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.scheduler_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "dual batch overlap": parallel.enable_dbo,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "KV cache events": vllm_config.kv_events_config is not None
        and vllm_config.kv_events_config.enable_kv_cache_events,
        "LoRA": vllm_config.lora_config is not None,
        "prompt embeddings": vllm_config.model_config.enable_prompt_embeds,
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "--disable-hybrid-kv-cache-manager": scheduler.disable_hybrid_kv_cache_manager is True,
        "a scheduler class": scheduler.scheduler_cls not in (None, SCHEDULER),
        "pruned video": vllm_config.model_config.multimodal_config.is_multimodal_pruning_enabled(),
        "the first model runner on a GPU (set VLLM_USE_V2_MODEL_RUNNER=1)": not current_platform.is_cpu()
        and not vllm_config.use_v2_model_runner,
    }
    for what, given in refused.items():
        if given:
            raise ValueError(f"vtw: expected an engine without what withdrawal does not support, got one with {what}")
    scheduler.scheduler_cls = SCHEDULER
    if not current_platform.is_cpu():
        from vllm.config import CUDAGraphMode

        # The stage without visual rows has fewer rows than the step, by whose number graphs are found. In steps of
        # decoding alone it has as many.
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
