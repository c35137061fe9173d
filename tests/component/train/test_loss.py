import pytest
import torch

from component.train.loss import TargetLMLoss


def batch(rows: int = 4, length: int = 9, vocab: int = 11):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, length, vocab, generator=generator, requires_grad=True)
    ids = torch.randint(vocab, (rows, length), generator=generator)
    mask = (torch.rand(rows, length, generator=generator) < torch.tensor([[0.1], [0.9], [0.5], [0.3]])).long()
    return logits, ids, mask


def test_the_loss_is_that_of_the_token_after_each_position():
    logits = torch.zeros(1, 3, 2)
    logits[0, 1, 1] = 2.0  # position 1 predicts token 2
    loss = TargetLMLoss()(logits, torch.tensor([[0, 0, 1]]), torch.tensor([[0, 0, 1]]))
    assert loss.item() == pytest.approx(0.126928, abs=1e-6)  # -log(e^2 / (e^2 + 1))


def test_it_is_torchs_cross_entropy_over_shifted_labels():
    logits, ids, mask = batch()
    labels = torch.where(mask == 1, ids, -100)[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
    loss = TargetLMLoss()
    mean = loss(logits, ids, mask) / loss.count_learned(mask).sum()
    assert mean.item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_first_token_is_never_learned():
    logits, ids, mask = batch()
    first = mask.clone()
    first[:, 0] = 1 - first[:, 0]
    assert TargetLMLoss()(logits, ids, first) == TargetLMLoss()(logits, ids, mask)


def test_four_batches_of_one_have_the_loss_count_and_gradient_of_one_batch_of_four():
    loss = TargetLMLoss()
    logits, ids, mask = batch()
    assert loss.count_learned(mask).tolist() == mask[:, 1:].sum(1).tolist()
    total = loss.count_learned(mask).sum()
    whole = loss(logits, ids, mask) / total
    (gradient,) = torch.autograd.grad(whole, logits)
    parts = sum(loss(logits[i : i + 1], ids[i : i + 1], mask[i : i + 1]) for i in range(4)) / total
    (summed,) = torch.autograd.grad(parts, logits)
    assert parts.item() == pytest.approx(whole.item(), abs=1e-6)
    assert (gradient - summed).abs().max() <= 1e-6
