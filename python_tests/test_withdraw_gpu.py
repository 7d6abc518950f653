"""Withdrawal on a GPU, or on pretend ones (``make test-cuda``): as on the CPU, with every kind of cache, with the
decoder spread over two devices, and with a step of decoding as a CUDA graph."""

import os

import pytest
import torch
import vlm
from torch import Tensor
from transformers import DynamicCache, StaticCache

import vtw_kernels as vtw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:No layer of", "ignore:.*past_key_values.*deprecated"),
]
DEVICE = os.environ.get("PRETEND_DEVICE", "cuda")
STEPS, LAYER = 3, 2


def place(inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in inputs.items()}


def make_cache(model, kind: str, length: int):
    return (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=length)
    )


class Conversation:
    """A batch with images, and the tokens that follow one by one."""

    def __init__(self, family: str):
        batch = vlm.make_batch(family, vlm.RAGGED)
        self.prompt = batch.ids.shape[1]
        self.whole = vlm.append(batch, vlm.make_batch(family, [[STEPS]] * len(batch.ids), seed=1))
        self.length = self.whole.ids.shape[1]
        self.text = (batch.mask != 0) & ~batch.visual

    def inputs(self, model, begin: int, end: int, device: str) -> dict[str, Tensor]:
        positions = self.whole.positions(model)[..., begin:end]
        return place(self.whole.inputs(begin, end) | {"position_ids": positions}, device)

    @torch.inference_mode()
    def logits(self, model, kind: str, device: str) -> list[Tensor]:
        """Of the prompt's text and of each step, on the CPU."""
        cache = make_cache(model, kind, self.length + 2)
        ends = [0, *range(self.prompt, self.length + 1)]
        outputs = [
            model(**self.inputs(model, begin, end, device), past_key_values=cache).logits.cpu()
            for begin, end in zip(ends, ends[1:])
        ]
        return [outputs[0][self.text], *outputs[1:]]


def assert_alike(actual: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(actual) == len(wanted) > 1
    for x, want in zip(actual, wanted):
        torch.testing.assert_close(x, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_prefill_and_decoding(family, kind):
    model, conversation = vlm.make_model(family), Conversation(family)
    with vtw.withdraw(model, LAYER):
        wanted = conversation.logits(model, kind, "cpu")
    model.to(DEVICE)
    with vtw.withdraw(model, LAYER):
        actual = conversation.logits(model, kind, DEVICE)
    assert_alike(actual, wanted)
    assert (conversation.logits(model, kind, DEVICE)[1] - wanted[1]).abs().max() > 0.01  # the images matter


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_generate(family):
    model, inputs = vlm.make_model(family), vlm.make_batch(family, vlm.RAGGED).inputs()
    answers = []
    for device in ("cpu", DEVICE):
        model.to(device)
        with vtw.withdraw(model, LAYER):
            answers.append(model.generate(**place(inputs, device), max_new_tokens=5, do_sample=False).cpu())
    assert torch.equal(*answers)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_device_map(family, layer):
    """The decoder's last two layers on another device: the plan is made on one, and applied on both."""
    accelerate = pytest.importorskip("accelerate")
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device only")
    model, conversation = vlm.make_model(family), Conversation(family)
    with vtw.withdraw(model, layer):
        wanted = conversation.logits(model, "dynamic", "cpu")
    decoder = next(name for name, _ in model.named_modules() if name.endswith("language_model"))
    apart = {"", "model", decoder, f"{decoder}.layers"}  # whose parts have places of their own
    last = {f"{decoder}.layers.2", f"{decoder}.layers.3", f"{decoder}.norm", "lm_head"}
    names = [name for name, _ in model.named_modules() if name not in apart and name.rpartition(".")[0] in apart]
    device_map = {name: int(name in last) for name in names}
    model = accelerate.dispatch_model(model, device_map, main_device=0)
    with vtw.withdraw(model, layer):
        assert_alike(conversation.logits(model, "dynamic", "cuda:0"), wanted)


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_find_layer(family):
    model = vlm.make_model(family)
    batches = [vlm.make_batch(family, [[2, 4, 3, 8, 4], [1, 4, 2]], seed=seed).inputs() for seed in (0, 1)]
    wanted = vtw.find_layer(model, batches, progress=False)
    found = vtw.find_layer(model.to(DEVICE), [place(x, DEVICE) for x in batches], progress=False)
    assert found.layer == wanted.layer
    torch.testing.assert_close(found.per_sample.cpu(), wanted.per_sample.cpu(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("withdrawn", [False, True], ids=["plain", "withdrawn"])
@pytest.mark.parametrize("family", vlm.FAMILIES)
@torch.inference_mode()
def test_a_step_as_a_cuda_graph(family, withdrawn):
    """Captured once, replayed for every token, with a static cache whose lengths only the device knows."""
    model, conversation = vlm.make_model(family).to(DEVICE), Conversation(family)
    policy = LAYER if withdrawn else vlm.LAYERS
    with vtw.withdraw(model, policy), torch.cuda.device(DEVICE):
        wanted = conversation.logits(model, "static", DEVICE)
        cache = make_cache(model, "static", conversation.length + 2)
        model(**conversation.inputs(model, 0, conversation.prompt, DEVICE), past_key_values=cache)
        steps = range(conversation.prompt, conversation.length)
        inputs = [conversation.inputs(model, at, at + 1, DEVICE) for at in steps]
        for x in inputs:  # of one size at every step
            mask = x["attention_mask"]
            x["attention_mask"] = torch.nn.functional.pad(mask, (0, conversation.length + 2 - mask.shape[1]))
        static = {name: x.clone() for name, x in inputs[0].items()}
        actual = [model(**static, past_key_values=cache).logits.clone()]  # warmed up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            logits = model(**static, past_key_values=cache).logits
        for x in inputs[1:]:
            for name in static:
                static[name].copy_(x[name])
            graph.replay()
            torch.cuda.synchronize()
            actual.append(logits.clone())
    for x, want in zip(actual, wanted[1:]):
        torch.testing.assert_close(x.cpu(), want, rtol=1e-3, atol=1e-3)
