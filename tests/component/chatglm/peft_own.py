"""PEFT's own tests of decoder models for a small ChatGLM3: test_peft_own.py fetches them as the package `own`."""

from pathlib import Path

from own import test_decoder_models
from own.test_decoder_models import TestDecoderModels
from peft import AdaLoraConfig, BeftConfig, IA3Config, ShadowConfig, VBLoRAConfig

import component.chatglm  # noqa: F401  registers ChatGLM with the Auto classes

LAYERS = {"target_modules": ["query_key_value"]}
# Where PEFT has no layers of its own choice for ChatGLM, and asks for them.
TARGETS = {
    AdaLoraConfig: LAYERS,
    BeftConfig: LAYERS,
    IA3Config: {"target_modules": ["query_key_value", "dense_4h_to_h"], "feedforward_modules": ["dense_4h_to_h"]},
    ShadowConfig: {"target_modules": r".*\.layers\.\d+$"},
    VBLoRAConfig: LAYERS,
}

# PEFT's decorators hold these very objects.
test_decoder_models.PEFT_DECODER_MODELS_TO_TEST[:] = [str(Path("chatglm3-nano").resolve())]
for config, settings in test_decoder_models.ALL_CONFIGS:
    settings |= TARGETS.get(config, {})


__all__ = ["TestDecoderModels"]
