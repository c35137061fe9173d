"""transformers' own model tests for ChatGLM, which test_transformers_own.py fetches as the package `own`, and runs."""

import unittest

import torch
from own.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMModel

# By these names the tests know which class has labels.
MODEL_MAPPING_NAMES["chatglm"] = ChatGLMModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["chatglm"] = ChatGLMForConditionalGeneration.__name__
BATCH, LENGTH = 3, 7
SHAPE = {
    "padded_vocab_size": 99,
    "hidden_size": 32,
    "ffn_hidden_size": 37,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 64,
}


class ChatGLMTester:
    """What ModelTesterMixin asks of a model's tester."""

    batch_size, seq_length, is_training = BATCH, LENGTH, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def get_config(self) -> ChatGLMConfig:
        return ChatGLMConfig(**SHAPE)

    def prepare_config_and_inputs_for_common(self) -> tuple[ChatGLMConfig, dict[str, torch.Tensor]]:
        ids = ids_tensor([BATCH, LENGTH], SHAPE["padded_vocab_size"])
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class ChatGLMTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ChatGLMModel, ChatGLMForConditionalGeneration)
    test_generation_tester_mixin_inheritance = None  # it asks for generation tests, which the archive does not have

    def setUp(self):
        self.model_tester = ChatGLMTester()

    def test_tied_weights_keys(self):
        with self.assertRaisesRegex(ValueError, "tie_word_embeddings"):
            super().test_tied_weights_keys()
