"""Make a ChatGLM3-shaped model of a few million random parameters, and its tokenizer, from the sample data.

python script/make_tiny_model.py [--output models/chatglm3-tiny] [--data data/dummy_data_chatglm3.jsonl ...]

It takes seconds and needs no download. The model has every part of the real one; the demo and the tests train it.
"""

import argparse
import sys
from pathlib import Path

import sentencepiece
import torch
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from component.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from component.data.formats import read_conversations
from component.data.reader import find_files
from component.data.render import chatglm3_messages
from component.run.errors import Fault


def texts_of(path: Path) -> list[str]:
    """Every line of a data file's messages, so that the vocabulary fits what will be trained."""
    texts = []
    for _, conversation in read_conversations(path):
        for message, _ in chatglm3_messages(conversation):
            texts += [message.metadata, message.content]
    return [line for text in texts for line in text.splitlines() if line]


def train_tokenizer(data: list[Path], output: Path, vocab_size: int) -> ChatGLMTokenizer:
    """A SentencePiece model with ChatGLM's settings: BPE, bytes for rare characters and newlines, text kept as it is,
    `</s>` as id 2."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for path in data for text in texts_of(path)]),
        model_prefix=str(output / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # the indentation of tools
        max_sentence_length=1_000_000,
        minloglevel=2,
    )
    (output / "tokenizer.vocab").unlink()
    return ChatGLMTokenizer(str(output / "tokenizer.model"))


def make_model(vocab_size: int, seed: int) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(seed)
    config = ChatGLMConfig(
        padded_vocab_size=(vocab_size + 63) // 64 * 64,
        hidden_size=256,
        ffn_hidden_size=704,
        num_layers=4,
        num_attention_heads=8,
        kv_channels=32,
        multi_query_group_num=2,
        seq_length=2048,
        initializer_range=0.06,  # a frozen random base must mix its inputs; at 0.02 it passes them on
    )
    return ChatGLMForConditionalGeneration(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("models/chatglm3-tiny"))
    parser.add_argument("--data", type=Path, nargs="+", default=sorted((ROOT / "data").glob("dummy_data*.jsonl")))
    parser.add_argument("--vocab_size", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    cli = parser.parse_args()

    logging.disable_progress_bar()
    try:
        cli.data = find_files([str(path) for path in cli.data])
        cli.output.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(cli.data, cli.output, cli.vocab_size)
    except (Fault, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
    tokenizer.save_pretrained(cli.output)
    model = make_model(tokenizer.vocab_size, cli.seed)
    model.save_pretrained(cli.output)
    print(f"{cli.output}: {model.num_parameters():,} parameters, {tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    main()
