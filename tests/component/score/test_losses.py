import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from component.data.render import TokenizedSample
from component.kernel.model import PackedForward
from component.model import load_adapter
from component.score.losses import count_learned, longest_answer, summed_losses

SAMPLES = [
    TokenizedSample([5, 9, 17, 33, 65], [0, 0, 1, 1, 0]),
    TokenizedSample([7, 8, 9], [1, 0, 1]),
    TokenizedSample([7, 8], [1, 0]),  # nothing predicts the first token
]


def losses_by_hand(model) -> list[float]:
    sums = []
    for sample in SAMPLES:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1].float()
        every = cross_entropy(logits, torch.tensor(sample.input_ids[1:]), reduction="none")
        sums.append((every * torch.tensor(sample.target_mask[1:])).sum().item())
    return sums


@pytest.mark.parametrize("family", ["chatglm", "llama"])
def test_losses_with_and_without_the_adapter_are_those_of_the_models_own_layers(model_folder, adapter_folder, family):
    base = model_folder(family)
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter_folder(base)).eval()
    tuned = losses_by_hand(model)
    with model.disable_adapter():
        alone = losses_by_hand(model)
    assert np.abs(np.subtract(tuned, alone)).max() > 0.01
    told = []
    assert summed_losses(model, SAMPLES, True, told.append) == pytest.approx(tuned, abs=1e-4)
    assert summed_losses(model, SAMPLES, False) == pytest.approx(alone, abs=1e-4)
    assert sum(told) == 3
    assert losses_by_hand(model) == pytest.approx(tuned), "the model is as before"


def test_a_model_that_was_in_training_goes_on_as_it_was(model_folder, adapter_folder):
    base = model_folder()
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter_folder(base)).train()
    forward = PackedForward(model, 100)
    summed_losses(model, SAMPLES, True)
    assert model.training
    assert model.get_base_model().forward is forward


def test_a_plain_model_has_losses_too(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder()).eval()
    assert summed_losses(model, SAMPLES, False) == pytest.approx(losses_by_hand(model), abs=1e-4)


def test_learned_tokens_and_the_longest_answer_are_counted_by_the_mask():
    assert count_learned(SAMPLES).tolist() == [2, 1, 0]
    assert longest_answer(SAMPLES) == 2
    assert longest_answer([]) == 0
