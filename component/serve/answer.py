"""An answer as OpenAI's chat API tells it: deltas, which are streamed or folded to one message."""

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from ..inference.calls import overlap
from ..inference.sampling import Generation
from ..inference.stream import AnswerStream, Piece
from ..inference.token_bytes import TokenBytes

Choice = dict[str, Any]  # what one chunk of a stream tells of one answer


class Writer:
    """Writes one answer: each step's tokens become choices of chunks, the last of which has a finish_reason.

    Args:
        index: of the answer, among those of its request.
        stream: turns tokens into pieces.
        stops: texts at which the answer ends, and which it does not hold. They count in its text alone.
        one_call: the answer ends after its first call.
        top: how many alternatives each token's logprob has; None for no logprobs.
    """

    def __init__(
        self,
        index: int,
        stream: AnswerStream,
        vocabulary: "Vocabulary",
        stops: Sequence[str] = (),
        one_call: bool = False,
        top: int | None = None,
    ):
        self.index, self.stream, self.vocabulary = index, stream, vocabulary
        self.stops, self.one_call, self.top = stops, one_call, top
        self.read = self.told = 0  # tokens that were read, and whose logprobs were told
        self.held, self.calls, self.finish_reason = "", 0, None

    def begin(self) -> Choice:
        return self.choice({"role": "assistant", "content": ""})

    def advance(self, generation: Generation) -> list[Choice]:
        """What the answer has grown by. Its `finish_reason` is set where it has ended, if before the generation."""
        deltas: list[dict] = []
        new, self.read = generation.tokens[self.read :], len(generation.tokens)
        for token in new:
            if self.finish_reason:
                break
            deltas += self.write(self.stream.add(token))
            if self.one_call and self.stream.complete:
                self.end("stop")
        if self.finish_reason is None and generation.finish_reason:
            deltas += self.write(self.stream.end())
            if self.finish_reason is None:
                self.end("length" if generation.finish_reason == "length" else "stop")
        if self.finish_reason and self.held:
            deltas.append({"content": self.held})
        choices = [self.choice(delta) for delta in deltas]
        if self.finish_reason:
            choices.append(self.choice({}, self.finish_reason))
        if not choices:
            return []
        if self.top is not None:
            entries = self.vocabulary.logprobs(generation, self.told, self.top)
            self.told = len(generation.tokens)
            choices[0]["logprobs"] = {"content": entries, "refusal": None}
        return choices

    def end(self, reason: str) -> None:
        self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason

    def write(self, pieces: Iterable[Piece]) -> list[dict]:
        deltas: list[dict] = []
        for kind, text, call in pieces:
            if self.finish_reason:
                break
            if self.one_call and self.calls and (kind, call) != ("arguments", 0):
                self.end("stop")
            elif kind == "text":
                deltas += self.speak(text)
            elif kind == "reasoning":
                deltas.append({"reasoning_content": text})
            elif kind == "name":
                self.calls = call + 1
                function = {"name": text, "arguments": ""}
                made = {"index": call, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
                deltas.append({"tool_calls": [made]})
            else:
                deltas.append({"tool_calls": [{"index": call, "function": {"arguments": text}}]})
        return deltas

    def speak(self, text: str) -> list[dict]:
        """Tell text, but for a stop and what may be the beginning of one."""
        text = self.held + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.held, text = "", text[: min(found)]
            self.end("stop")
        else:
            kept = max((overlap(text, stop) for stop in self.stops), default=0)
            self.held, text = text[len(text) - kept :], text[: len(text) - kept]
        return [{"content": text}] if text else []

    def choice(self, delta: dict, finish_reason: str | None = None) -> Choice:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def fold(choices: Iterable[Choice]) -> list[Choice]:
    """The whole answers of a stream's choices, each with its message."""
    answers: dict[int, Choice] = {}
    for choice in choices:
        blank = {"index": choice["index"], "message": {"role": "assistant", "content": "", "refusal": None}}
        answer = answers.setdefault(choice["index"], blank | {"logprobs": None, "finish_reason": None})
        message, delta = answer["message"], choice["delta"]
        for key in ("content", "reasoning_content"):
            if delta.get(key):
                message[key] = message.get(key, "") + delta[key]
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                made = {key: value for key, value in call.items() if key != "index"}
                message.setdefault("tool_calls", []).append(made | {"function": dict(call["function"])})
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        if choice["logprobs"]:
            answer["logprobs"] = answer["logprobs"] or {"content": [], "refusal": None}
            answer["logprobs"]["content"] += choice["logprobs"]["content"]
        answer["finish_reason"] = choice["finish_reason"] or answer["finish_reason"]
    for answer in answers.values():
        if answer["message"].get("tool_calls"):
            answer["message"]["content"] = answer["message"]["content"] or None
    return [answers[index] for index in sorted(answers)]


class Vocabulary(TokenBytes):
    """Tokens as OpenAI's logprobs name them."""

    def entry(self, token: int, logprob: float) -> dict:
        raw = self.bytes_of(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    def logprobs(self, generation: Generation, start: int, top: int) -> list[dict]:
        """OpenAI's entries of a generation's tokens from `start` on: all of them, calls and reasoning too."""
        made = zip(generation.tokens[start:], generation.logprobs[start:], strict=True)
        return [
            self.entry(token, told.chosen) | {"top_logprobs": [self.entry(*other) for other in told.top[:top]]}
            for token, told in made
        ]
