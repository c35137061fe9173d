"""Wrong ways to wire ChatGLM, put on a loaded model for a while: trained weights must fit none of them better."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from ..chatglm.modeling_chatglm import ChatGLMForConditionalGeneration


@contextmanager
def with_values(things: list, **values) -> Iterator[None]:
    """Give attributes of the things other values within the block."""
    before = [{name: getattr(thing, name) for name in values} for thing in things]
    try:
        for thing in things:
            for name, value in values.items():
                setattr(thing, name, value)
        yield
    finally:
        for thing, old in zip(things, before, strict=True):
            for name, value in old.items():
                setattr(thing, name, value)


@contextmanager
def with_outputs(layers: list[nn.Module], change: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Change the outputs of the layers within the block."""
    hooks = [layer.register_forward_hook(lambda layer, _, output: change(layer, output)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def wrong_wirings(model: ChatGLMForConditionalGeneration) -> dict[str, AbstractContextManager]:
    """Contexts in which the model is wired wrongly, by their names. What the configuration rules out is left out."""
    config, blocks = model.config, list(model.transformer.encoder.layers)
    mixed = [block.self_attention.query_key_value for block in blocks]
    heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.kv_channels

    def reordered(layers: list[nn.Module], order: torch.Tensor) -> AbstractContextManager:
        return with_outputs(layers, lambda _, output: output[..., order.to(output.device)])

    def with_heads(order: torch.Tensor) -> AbstractContextManager:
        """Each head of query, key and value taken from the place that `order` gives."""
        return reordered(mixed, (order[:, None] * head_dim + torch.arange(head_dim)).flatten())

    query, key, value = torch.arange(heads + 2 * groups).split((heads, groups, groups))
    by_group = torch.arange(heads + 2 * groups).view(groups, -1)
    halves = torch.arange(2 * config.ffn_hidden_size).roll(config.ffn_hidden_size)
    # Pair i of a head is (i, i + rotary_dim / 2), as in Llama, instead of (2 i, 2 i + 1).
    pairs = torch.cat((torch.arange(head_dim // 2).view(2, -1).T.flatten(), torch.arange(head_dim // 2, head_dim)))
    rotated = torch.arange((heads + groups) * head_dim).view(-1, head_dim)[:, pairs].flatten()
    passed = torch.arange((heads + groups) * head_dim, (heads + 2 * groups) * head_dim)

    wirings = {
        "halves of dense_h_to_4h swapped": reordered([block.mlp.dense_h_to_4h for block in blocks], halves),
        "rotary pairs as halves": reordered(mixed, torch.cat((rotated, passed))),
        f"rope_ratio {50 if config.rope_ratio == 1 else 1}": with_values(
            [config], rope_ratio=50.0 if config.rope_ratio == 1 else 1.0
        ),
        "query, key, value by group": with_heads(torch.cat((by_group[:, :-2].flatten(), *by_group[:, -2:].T))),
        "key and value swapped": with_heads(torch.cat((query, value, key))),
        "groups in another order": with_heads(torch.cat((query, key.roll(1), value.roll(1)))),
        "residual from after the norm": with_values(blocks, residual_is_normed=True),
        "no final norm": with_values([config], post_layer_norm=False),
    }
    if mixed[0].bias is not None:
        wirings["no bias of query, key, value"] = with_outputs(mixed, lambda layer, output: output - layer.bias)
    return wirings
