"""PEFT's own tests of decoder models (the sdist's tests/test_decoder_models.py), run for a small ChatGLM3."""

import re

import pytest

FILES = ["test_decoder_models.py", "testing_common.py", "testing_utils.py"]
# They import these for other models' tests.
STAND_INS = {"datasets.py": "load_dataset = None\n", "diffusers.py": "class StableDiffusionPipeline: pass\n"}
# PEFT (0.21.2) looks for a decoder's layers under `.layers`, and not under `.encoder.layers`. It must be told by a
# pattern, and then takes no layer numbers beside it.
FAIL = {("test_training_decoders_layer_indexing", "ShadowConfig")}


@pytest.mark.slow
def test_chatglm_passes_pefts_own_tests_of_decoder_models(run_tests_of, model_folder):
    name = model_folder().name  # in the names of the tests that do not ask for a model of the hub
    passed, failed = run_tests_of("peft", FILES, STAND_INS, "peft_own.py", which=name)
    assert {re.search(r"(test_\w+)\[.*?(\w+Config)-", test).groups() for test in failed} == FAIL
    assert passed >= 1100
