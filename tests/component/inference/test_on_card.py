"""The engine on a CUDA card: graphs, flash attention and half precision against the plain path."""

import pytest
import torch

from component.inference.engine import Engine
from component.inference.sampling import Sampling
from component.kernel.decoder import Decoder, Part, PlainCache
from tests.component.kernel.conftest import CONFIGS, make_model

from .conftest import STOPS, answer_by_generate, make_prompts

pytestmark = pytest.mark.gpu
HALF = {"device": "cuda", "dtype": torch.bfloat16, "rank": 16}


@pytest.mark.parametrize("family", CONFIGS)
def test_in_float32_answers_are_those_of_generate(family):
    model = make_model(family, device="cuda", rank=16).eval()
    prompts = make_prompts((9, 1, 23, 14), beginning=range(10, 50))
    generations = Engine(model, STOPS, max_batch=3, max_tokens=128).run(prompts, Sampling(max_new_tokens=12))
    answers = [(generation.tokens, generation.stop_id) for generation in generations]
    assert answers == [answer_by_generate(model, prompt) for prompt in prompts]


def write(decoder, tokens, adapted):
    """Logits of two prompts, one read in two parts, and of four tokens after each, one place of a graph unused."""
    first, second, third = ([*map(int, part)] for part in tokens)
    logits = [decoder([Part(2, 0, first[:300]), Part(0, 0, second), Part(1, 0, third[:40])], adapted)]
    logits += [decoder([Part(2, 300, first[300:-4])], adapted)]
    for at in range(4):
        parts = [Part(2, len(first) - 4 + at, first[at - 4 :][:1]), Part(0, len(second) + at, [7 + at])]
        logits.append(decoder([*parts, Part(1, 40 + at, third[40 + at :][:1])], adapted).clone())
    return [part.float() for part in logits]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("adapted", [True, False])
def test_a_graph_computes_what_a_forward_does_and_flash_what_the_plain_attention_does(family, adapted):
    model = make_model(family, **HALF).eval().get_base_model()
    tokens = [torch.randint(1, 97, (size,), generator=torch.Generator().manual_seed(size)) for size in (500, 70, 44)]
    decoder = Decoder(model, 4, 512)
    assert decoder.is_flash
    by_graph = write(decoder, tokens, adapted)
    assert [*decoder.graphs] == [(4, adapted)]
    decoder.is_flash = False
    by_forward = write(decoder, tokens, adapted)
    for layers in decoder.layers.values():
        for layer in layers:
            layer.attention.__class__ = PlainCache
    plain = write(decoder, tokens, adapted)
    for graph, forward, other in zip(by_graph, by_forward, plain, strict=True):
        assert (graph - forward).norm() < 1e-2 * forward.norm()
        assert (graph - other).norm() < 3e-2 * other.norm()


def test_what_lies_behind_a_conversation_in_the_cache_does_not_count():
    model = make_model("chatglm", **HALF).eval().get_base_model()
    decoder = Decoder(model, 2, 256)
    ids = list(range(10, 60))
    results = []
    for rest in (0.0, torch.nan):
        decoder.cache.fill_(rest)
        results.append(decoder([Part(1, 0, ids)]))
        results.append(decoder([Part(1, 50, [9])]).clone())
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert results[3].isfinite().all()


def test_weights_that_are_dequantised_in_a_graph_give_the_logits_of_those_that_are_kept(monkeypatch, log):
    model = make_model("llama", **HALF).eval().get_base_model()
    tokens = [torch.randint(1, 97, (size,), generator=torch.Generator().manual_seed(size)) for size in (500, 70, 44)]
    kept = write(Decoder(model, 4, 512), tokens, adapted=True)
    monkeypatch.setattr("component.kernel.decoder.frozen_bytes", lambda layers: 1 << 60)
    again = write(Decoder(model, 4, 512), tokens, adapted=True)
    assert [f"dequantised {when}" in line for line, when in zip(log, ("once", "at every step"), strict=True)] == [
        True
    ] * 2
    for one, other in zip(kept, again, strict=True):
        assert (one - other).norm() < 1e-2 * other.norm()


def test_a_seed_draws_the_same_answer_twice():
    model = make_model("qwen2", **HALF).eval()
    (prompt,) = make_prompts((9,))
    engine = Engine(model, STOPS, max_batch=4, max_tokens=64)
    one, other = (engine.run([prompt], Sampling(16, 1.0, 0.9, 50, seed=4, logprobs=3))[0] for _ in range(2))
    assert one.tokens == other.tokens
    assert len(one.logprobs) == len(one.tokens)
