"""The real tokenizer, exported once."""

import copy

import pytest
from transformers import AutoTokenizer

from component.export.tokenizer import export_template, write_tokenizer


@pytest.fixture(scope="session")
def exported_chatglm3(real_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write_tokenizer(real_tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def export(exported_chatglm3):
    """The exported tokenizer of a version. Both have the same SentencePiece model."""
    chatglm2 = copy.deepcopy(exported_chatglm3)
    chatglm2.chat_template = export_template(2)
    return {2: chatglm2, 3: exported_chatglm3}.get
