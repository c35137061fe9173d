"""Odd texts and tool conversations, drawn from a seed."""

import json
import random

from component.chatglm import ChatGLMTokenizer

WORDS = ["people", "philosophy", "sop", "eop", "▁", "▁▁", "ｱｲｳ", "Ａ", "\0", "é", "e\u0301", "\u200b", "\ufeff"]
WORDS += ["\ue000", "\U000f0000", "\ufffd", "\x80", "ÿ", "\r\n", "\u2028", "<0x0A>", "<|usr|>", "< s>", "```", "٣"]
WORDS += ["[Round 1]\n\n问：", "def f(x):\n    return x", "\\", '"', "'", "\\n", "\\U0010", "{'a': 1}", "true", ", "]
EMOJI = ["😀", "👩\u200d👩\u200d👧", "👍🏽", "🇨🇳", "☺️"]


def random_text(rng: random.Random, pieces: list[str], length: int = 8) -> str:
    """A text of the tokenizer's own pieces, Chinese, emoji, white space, numbers, long words and WORDS."""

    def part() -> str:
        n = rng.randint(1, 12)
        kinds = [
            lambda: "".join(rng.choices(pieces, k=n)),
            lambda: "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(n)),
            lambda: "".join(rng.choices(EMOJI, k=n)),
            lambda: rng.choice(" \n\t") * n,
            lambda: rng.choice(WORDS),
            lambda: "".join(chr(rng.choice([rng.randint(1, 0xD7FF), rng.randint(0xE000, 0xFFFFF)])) for _ in range(n)),
            lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5 * n)),
            lambda: str(rng.random() * 10 ** rng.randint(-5, 9)),
        ]
        return rng.choice(kinds)()

    return "".join(part() for _ in range(rng.randint(0, length)))


def pieces_of(tokenizer: ChatGLMTokenizer) -> list[str]:
    pieces = tokenizer.tokenizer.sp_model
    kinds = (pieces.is_byte, pieces.is_control, pieces.is_unknown)
    ids = [i for i in range(pieces.get_piece_size()) if not any(kind(i) for kind in kinds)]
    return [pieces.id_to_piece(i).replace("▁", " ") for i in ids]


def random_chat(rng: random.Random, pieces: list[str]) -> dict:
    """A row as OpenAI has it: tools wrapped or bare, text beside calls, several calls at once, results in any order,
    arguments as an object or as JSON."""

    def value(depth: int = 0):
        kinds = [lambda: random_text(rng, pieces, 2), lambda: rng.choice([None, True, False, 0, -7, 1e22, 0.1, 1.5e-9])]
        if depth < 2:
            kinds += [lambda: [value(depth + 1) for _ in range(rng.randint(0, 3))]]
            kinds += [lambda: {random_text(rng, pieces, 1): value(depth + 1) for _ in range(rng.randint(0, 3))}]
        return rng.choice(kinds)()

    def call(i: int) -> dict:
        arguments = {key: value() for key in rng.sample(["a", "city", "北京", "x_1", "b"], rng.randint(0, 4))}
        if rng.random() < 0.3:
            arguments = json.dumps(arguments, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2]))
        return {"id": f"c{i}", "type": "function", "function": {"name": rng.choice(["f", "g"]), "arguments": arguments}}

    tools = [{"name": name, "description": random_text(rng, pieces, 2), "parameters": {}} for name in "fg"]
    tools = [{"type": "function", "function": tool} if rng.random() < 0.5 else tool for tool in tools]
    messages = [{"role": "system", "content": random_text(rng, pieces)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": random_text(rng, pieces)})
        if calls := [call(i) for i in range(rng.randint(0, 3))]:
            content = rng.choice([None, "", random_text(rng, pieces)])
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            results = [{"role": "tool", "tool_call_id": f"c{i}", "content": "r" * i} for i in range(len(calls))]
            messages += rng.sample(results, len(results))
        messages.append({"role": "assistant", "content": random_text(rng, pieces) or "."})
    return {"messages": messages, "tools": tools}
