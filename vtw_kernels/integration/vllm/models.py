"""The classes that vLLM loads: those that it has, whose decoder is then changed, and which refuse some requests."""

from dataclasses import replace
from typing import Any

from vllm import ModelRegistry
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample import logits_processor as gpu

from vtw_kernels.integration.vllm.config import PREFIX
from vtw_kernels.integration.vllm.decoder import install


def __getattr__(name: str) -> type:
    """The class for an architecture, made when vLLM asks for it."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = withdrawing(name.removeprefix(PREFIX))
    return made


def withdrawing(architecture: str) -> type:
    stock = ModelRegistry.models[architecture].load_model_cls()

    class Withdrawing(stock):
        # Without it, ranges that are longer than a sliding window in the config, used or not, would be left out, and
        # their images be taken for text: python_tests/vllm_plugin asks a model with such a config.
        mm_prefix_clamp_sliding_window = True
        # Where vLLM's decorator of a class puts what makes its processor. Without it, the class cannot be made.
        _processor_factory = refusing(stock._processor_factory)

        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            install(self, vllm_config)

        @staticmethod
        def get_model_state_cls() -> type:  # asked by the runner of a GPU alone
            from vtw_kernels.integration.vllm.model_state import TextModelState

            return TextModelState

    Withdrawing.__name__ = Withdrawing.__qualname__ = PREFIX + architecture
    return Withdrawing


def refusing(factories: Any) -> Any:
    """Processors that refuse a prompt that ends in an image: nothing would be left to predict from."""

    def processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
        stock = factories.processor(info, dummy_inputs, **kwargs)
        stock.__class__ = _refusing_class(type(stock))
        return stock

    return replace(factories, processor=processor)


def _refusing_class(stock: type) -> type:
    class Refusing(stock):
        dummy = None  # what vLLM measures memory with, which may be nothing but images

        # If vLLM measured with other inputs, the engine would be refused at its start; if it called something else than
        # apply, prompts would go through that end in an image, which the tests see.
        def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
            self.dummy = super().get_dummy_inputs(*args, **kwargs)
            return self.dummy

        def apply(self, inputs: Any, timing_ctx: Any) -> Any:
            result = super().apply(inputs, timing_ctx)
            if inputs is not self.dummy:
                ends = [stop for some in result["mm_placeholders"].values() for x in some for stop in _ends(x)]
                if len(result["prompt_token_ids"]) in ends:
                    raise VLLMValidationError(
                        "vtw: prompt: expected text behind the last image, got a prompt that ends in one"
                    )
            return result

    Refusing.__name__ = Refusing.__qualname__ = stock.__name__
    return Refusing


def _ends(placeholder: Any) -> list[int]:
    return [last + 1 for _, last in placeholder.extract_embeds_range()]


class RequestCheck(LogitsProcessor, gpu.LogitsProcessor):
    """Refuses what a request may ask for and withdrawal has not: it is asked about parameters, and does nothing to
    logits. This is vLLM's own interface; each of its two runners wants a class of another kind, and this is both."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        if sampling_params.prompt_logprobs is not None:
            raise VLLMValidationError(
                "vtw: prompt_logprobs: expected none, as withdrawn rows have none, got a request for some"
            )

    def __init__(self, vllm_config: Any, *runner: Any):
        pass

    def apply(self, logits: Any, *step: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False  # no logits are changed
