"""What lmms-eval is told of this package, by an entry point: ``lmms-eval --model vtw_hf``."""

from typing import Any


def manifest() -> Any:
    """Called while lmms-eval looks for models, before it has all of itself; so the model is imported later."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vtw_hf", chat_class_path="vtw_kernels.lmms_eval.model.VtwHf")
