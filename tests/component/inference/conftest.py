"""What `generate` of transformers answers, for comparison."""

import random
from contextlib import nullcontext

import pytest
import torch

from tests.component.kernel.conftest import VOCAB

STOPS = (5, 6, 7)


def make_prompts(lengths, seed=0, beginning=()):
    draw = random.Random(seed)
    return [[*beginning, *(draw.randrange(8, VOCAB) for _ in range(length))] for length in lengths]


def answer_by_generate(model, prompt, tokens=12, adapted=True):
    """(tokens, the stop token or None)"""
    with nullcontext() if adapted else model.disable_adapter():
        ids = torch.tensor([prompt], device=model.device)
        settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": list(STOPS), "pad_token_id": 0}
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    answer = answer[0, len(prompt) :].tolist()
    return (answer[:-1], answer[-1]) if answer[-1] in STOPS else (answer, None)


@pytest.fixture
def computed(monkeypatch):
    """Tokens that a decoder computes: one list of part lengths for each forward."""
    from component.kernel.decoder import Decoder

    calls, call = [], Decoder.__call__

    def count(self, parts, adapted=True):
        calls.append([len(part.ids) for part in parts])
        return call(self, parts, adapted)

    monkeypatch.setattr(Decoder, "__call__", count)
    return calls
