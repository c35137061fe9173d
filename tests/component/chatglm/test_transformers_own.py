"""transformers' own tests of models (the sdist's tests/test_modeling_common.py), run for ChatGLM's classes."""

import pytest

# The sdist has test_modeling_common.py alone; what it imports beside is made empty.
EMPTY = {
    "own/exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "own/generation/test_utils.py": "class GenerationTesterMixin: pass\n",
}


@pytest.mark.slow
def test_chatglm_passes_transformers_own_model_tests(run_tests_of):
    pytest.importorskip("parameterized", reason="transformers' tests need parameterized; make test-slow installs it")
    passed, failed = run_tests_of("transformers", ["test_modeling_common.py"], EMPTY, "transformers_own.py")
    assert failed == set()
    assert passed >= 80
