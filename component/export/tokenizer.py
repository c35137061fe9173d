"""ChatGLM's tokenizer and prompts in the files of transformers' own classes: tokenizer.json and a chat template."""

import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from ..chat_templates import FOLDER
from ..chatglm import ChatGLMTokenizer
from ..run.errors import ArgumentError

PREFIX = ("[gMASK]", "<sop>")
# Names of control tokens in exported files: as words, they would be found within "people" and "philosophy".
NAMES = {"sop": "<sop>", "eop": "<eop>"}
SPACE = "▁"
# Texts on which SentencePiece's settings show.
PROBES = (
    "",
    " ",
    "  a  b ",
    "a\n b\r\n\tc",
    "①ﬁ\u3000Ａe\u0301",
    "😀👩\u200d👧\x00",
    "\n```python\ntool_call(x='1')\n```",
)
REMEDY = "take a SentencePiece model of ChatGLM's kind: BPE, and text kept as it is"


def write_tokenizer(tokenizer: ChatGLMTokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja for programs without this project.

    Texts get the ids that ChatGLMTokenizer gives them, padding is on the left, and a sequence opens with
    `[gMASK] <sop>`. What such a file cannot do as ChatGLMTokenizer does:

    - A control token that is written in a text, such as `<|user|>` or `</s>`, becomes that control token, unless the
      program asks for `split_special_tokens`. A template's text is encoded as a whole, and no template can protect the
      words of a message in it. Training here does (`data_format: chat_template`); a program that takes questions of
      strangers should remove these words from them.
    - `sop` and `eop` are called `<sop>` and `<eop>`, and `decode` shows `</s>` and `<unk>`, as transformers does.
    - `skip_special_tokens` removes the role tokens too, so that messages run together.
    - `decode` keeps the space that opens the text behind an added token, and shows bytes that are no UTF-8 as one
      replacement character each.

    Raises:
        ArgumentError: a text would get other ids, as its SentencePiece model has settings that ChatGLM's has not.
    """
    write_tokenizer_json(tokenizer, folder)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        "pad_token": tokenizer.pad_token,
        "additional_special_tokens": [NAMES.get(token, token) for token in tokenizer.tokenizer.special_tokens],
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def write_tokenizer_json(tokenizer: ChatGLMTokenizer, folder: Path) -> None:
    """Write tokenizer.json and chat_template.jinja alone, beside files that belong to ChatGLMTokenizer.

    Raises:
        ArgumentError: as `write_tokenizer`.
    """
    built = build_tokenizer(tokenizer)
    prove(built, tokenizer)
    built.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(export_template(tokenizer.chatglm_version), encoding="utf-8")


def export_template(version: int) -> str:
    """The chat template of ChatGLM2 or 3 for an exported tokenizer. It writes the text that training renders: that of
    component/data/render.py, with `{% generation %}` around what is learned, and refuses what training refuses.

    It differs in this, for ChatGLM3:

    - A conversation that ends on a call ends with `<|observation|>`, which is learned, and one that ends on a result
      ends there. Training adds an empty result to the call, and `</s>`, which is not learned, to both.
    - NaN and infinite arguments are written as `nan` and `inf`; as JSON text, NaN and Infinity are refused.
    - Arguments as JSON text: a key that stands twice is written twice in an inner object, and refused in the outer one.
      Strings keep line breaks and tabs that are not escaped, which JSON forbids.
    - Engines other than Python's, such as llama.cpp's: characters that cannot be seen are not escaped. A name of an
      argument may hold any character beyond ASCII. llama.cpp makes floats of integers of more than 64 bits, and of a
      float it writes six digits if it has more than 15, is smaller than 0.0001 or larger than 4.5e15. In the
      descriptions of tools it writes six digits of every float, and 1.0 as 1.
    - llama.cpp finds by itself how thoughts are written, and puts an empty one before an answer that it is to complete
      (a last message of the assistant); with --skip-chat-parsing it leaves that message out. No template can change it.
    """
    text = (FOLDER / f"chatglm{version}.jinja").read_text(encoding="utf-8")
    return text.replace("[gMASK]sop", "".join(PREFIX))


def stop_ids(tokenizer: ChatGLMTokenizer) -> list[int]:
    """Ids at which an answer ends: EOS, and for ChatGLM3 also `<|user|>` and `<|observation|>`."""
    roles = ("<|user|>", "<|observation|>") if tokenizer.chatglm_version == 3 else ()
    return [tokenizer.eos_token_id, *map(tokenizer.get_command, roles)]


def build_tokenizer(tokenizer: ChatGLMTokenizer) -> Tokenizer:
    """A tokenizer of the `tokenizers` library with the pieces, control tokens and added tokens of ChatGLM's."""
    pieces = tokenizer.tokenizer.sp_model
    unknown = pieces.id_to_piece(pieces.unk_id())
    built = Tokenizer(build_model(pieces))
    built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    built.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    own = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size()) if pieces.is_control(i)]
    control = [NAMES.get(token, token) for token in tokenizer.tokenizer.special_tokens]
    built.add_special_tokens([AddedToken(token, normalized=False) for token in (unknown, *own, *control)])
    added = tokenizer.added_tokens_decoder
    for i, token in sorted((i, added[i]) for i in tokenizer.tokenizer.added_tokens.values()):
        built.add_tokens([AddedToken(token.content, normalized=False, special=token.special)])
        if built.token_to_id(token.content) != i:
            raise ArgumentError(f"the added token {token.content!r} has id {i}, which tokenizer.json cannot give it")
    prefix, end = list(PREFIX), tokenizer.eos_token
    built.post_processor = processors.TemplateProcessing(
        single=[*prefix, "$A"],
        pair=[*prefix, "$A", "$B", end],
        special_tokens=[(token, built.token_to_id(token)) for token in (*prefix, end)],
    )
    return built


def build_model(pieces: SentencePieceProcessor) -> models.BPE:
    """The BPE that cuts a text as SentencePiece's does: of all pairs that make a piece, those of better pieces first.

    Raises:
        ArgumentError: SentencePiece's is no BPE, whose scores are the places in an order.
    """
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    scores = {names[i]: pieces.get_score(i) for i in ordinary(pieces)}
    if not all(score.is_integer() for score in scores.values()):
        raise ArgumentError(f"the tokenizer's SentencePiece model is no BPE; {REMEDY}")
    merges = [
        (-score, cut, (name[:cut], name[cut:]))
        for name, score in scores.items()
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    return models.BPE(
        {name: i for i, name in enumerate(names)},
        [pair for *_, pair in sorted(merges)],
        unk_token=names[pieces.unk_id()],
        fuse_unk=True,
        byte_fallback=any(map(pieces.is_byte, range(len(names)))),
    )


def ordinary(pieces: SentencePieceProcessor) -> list[int]:
    """Ids of the pieces that texts are made of."""
    others = (pieces.is_unknown, pieces.is_control, pieces.is_byte)
    return [i for i in range(pieces.get_piece_size()) if not any(kind(i) for kind in others)]


def require_same_ids(tokenizer: ChatGLMTokenizer) -> None:
    """Raise ArgumentError for a tokenizer that other programs would read otherwise, as `write_tokenizer` does."""
    prove(build_tokenizer(tokenizer), tokenizer)


def prove(built: Tokenizer, tokenizer: ChatGLMTokenizer) -> None:
    """Raise ArgumentError unless control tokens, odd texts and texts made of all pieces have the same ids."""
    ours = tokenizer.tokenizer
    for token, i in ours.special_tokens.items():
        if built.token_to_id(NAMES.get(token, token)) != i:
            raise ArgumentError(f"{tokenizer.vocab_file}: {NAMES.get(token, token)!r} is one of its pieces; {REMEDY}")
    pieces = ours.sp_model
    ids = ordinary(pieces)
    # A piece that a user defined has the score of the first piece; all others of a BPE have different scores.
    if any(map(pieces.is_unused, ids)) or len(set(map(pieces.get_score, ids))) < len(ids):
        raise ArgumentError(f"{tokenizer.vocab_file}: it has unused pieces, or some that a user defined; {REMEDY}")
    names = [pieces.id_to_piece(i) for i in ids]
    texts = [*PROBES, *("".join(names[i : i + 8]) for i in range(0, len(names), 8))]
    for text, encoded in zip(texts, built.encode_batch(texts, add_special_tokens=False), strict=True):
        if encoded.ids != ours.encode(text):
            raise ArgumentError(
                f"{tokenizer.vocab_file}: in tokenizer.json, {text!r} would have the ids {encoded.ids}, and not "
                f"{ours.encode(text)}; {REMEDY}"
            )
