"""The official `chat`, `stream_chat` and `process_response`, on today's `generate`.

Tool calls that the model writes are parsed as literals and never evaluated, so hostile output runs nothing.
"""

from collections.abc import Iterator
from queue import Queue
from threading import Event, Thread

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from .messages import to_chatglm3
from .prompt import parse_fenced_call, round_prompt, split_reply
from .text import HALF, GrowingText
from .versions import CACHE


def parse_reply(messages: list[str], history: list[dict]) -> tuple[str | dict, list[dict]]:
    """Turn the messages that ChatGLM3 generated into what its `chat` returns.

    Args:
        messages: one or more, each with its metadata up to the first newline and its content after it.
        history: the messages that were answered.

    Returns:
        The last message, and the history with all of them. A message without metadata is its text. One with metadata
        is `{"name", "parameters"}` where the system message offers `tools`, and `{"name", "content"}` for other
        code, and for a call that is no plain `tool_call(name=literal, …)`.
    """
    history = list(history)
    offers_tools = bool(history) and history[0]["role"] == "system" and "tools" in history[0]
    content: str | dict = ""
    for message in messages:
        metadata, text = split_reply(message)
        if not metadata.strip():
            text = text.strip()
            history.append({"role": "assistant", "metadata": metadata, "content": text})
            content = text.replace("[[训练时间]]", "2023年")
            continue
        history.append({"role": "assistant", "metadata": metadata, "content": text})
        parameters = parse_fenced_call(text) if offers_tools else None
        content = {"name": metadata.strip()}
        content |= {"content": text} if parameters is None else {"parameters": parameters}
    return content, history


class TokenQueue(BaseStreamer):
    """Queue from a `generate` in another thread: its tokens, then its end or its exception."""

    def __init__(self):
        self.queue = Queue()
        self.closed = Event()
        self.prompt_seen = False

    def put(self, value: torch.Tensor):
        if self.prompt_seen:
            self.queue.put(value.reshape(-1).tolist())
        self.prompt_seen = True  # generate sends the prompt first

    def end(self):
        pass  # run() reports the end, also where generate fails

    def run(self, generate, **kwargs):
        try:
            generate(streamer=self, stopping_criteria=[self.is_closed], **kwargs)
            self.queue.put(None)
        except BaseException as error:
            self.queue.put(error)

    def is_closed(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.closed.is_set(), device=input_ids.device)

    def __iter__(self) -> Iterator[list[int]]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class ChatMixin:
    """`chat` and `stream_chat` of ChatGLM3, whose history is a list of messages, and of ChatGLM2, a list of pairs."""

    def process_response(self, output: str, history: list[dict] | None = None):
        """Parse generated text as `parse_reply` does (ChatGLM3), or without a history to the text alone (ChatGLM2).

        A text alone is split at every `<|assistant|>`, as officially; `chat` splits at the control token.
        """
        if history is None:
            return output.strip().replace("[[训练时间]]", "2023年")
        return parse_reply(output.split("<|assistant|>"), history)

    def chat(self, tokenizer, query: str, history: list | None = None, role: str = "user", **settings):
        """Answer one message.

        Args:
            history: messages as `messages.to_chatglm3` takes them (ChatGLM3; functions are offered by the `tools` of
                a system message), or pairs `(question, answer)` (ChatGLM2); not edited.
            role: `user`, or `observation` for the result of a function; OpenAI's `tool` says the same.
            settings: for `generate`; the official defaults are max_length 8192, sampling, top_p 0.8, temperature 0.8.

        Returns:
            (answer, new history). A ChatGLM3 answer is text, or a dict for a function call.
        """
        turn = Question(self, tokenizer, query, history, role)
        output = self.generate(**turn.inputs, **generation_settings(turn.stop_ids, **settings))
        turn.read(output[0, turn.inputs["input_ids"].shape[1] :].tolist())
        return turn.close()

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list | None = None,
        role: str = "user",
        past_key_values: DynamicCache | None = None,
        return_past_key_values: bool = False,
        **settings,
    ) -> Iterator[tuple]:
        """Answer as `chat` does, and yield (answer so far, history) after each token.

        With `return_past_key_values` the cache comes third; a call that is given it does not read earlier turns again.
        """
        turn = Question(self, tokenizer, query, history, role, past_key_values)
        cache = past_key_values if past_key_values is not None else DynamicCache(config=self.config)
        tokens = TokenQueue()
        arguments = turn.inputs | generation_settings(turn.stop_ids, **settings) | {CACHE: cache}
        worker = Thread(target=tokens.run, args=(self.generate,), kwargs=arguments, daemon=True)
        worker.start()
        rest = (cache,) if return_past_key_values else ()
        waiting = False
        try:
            for ids in tokens:
                turn.read(ids)
                waiting = turn.texts[-1].text.endswith(HALF)
                if not waiting:
                    yield turn.close() + rest
            if waiting:  # no more tokens come: end as `chat` does, even with half a character
                yield turn.close() + rest
        finally:
            tokens.closed.set()
            worker.join()


class Question:
    """One question on its way through the model: the prompt, the tokens that end the answer, and the answer's texts."""

    def __init__(self, model: ChatMixin, tokenizer, query: str, history: list | None, role: str, cache=None):
        self.model, self.tokenizer, self.query, self.role = model, tokenizer, query, role
        self.history = list(history or [])
        speaks_pairs = not isinstance(self.history[0], dict) if self.history else model.config.chatglm_version == 2
        self.close = self._close_pairs if speaks_pairs else self._close_messages
        roles = () if speaks_pairs else ("<|user|>", "<|observation|>")
        self.stop_ids = [tokenizer.eos_token_id, *map(tokenizer.get_command, roles)]
        self.new_message = None if speaks_pairs else tokenizer.get_command("<|assistant|>")
        self.texts, self.newest = [GrowingText(tokenizer)], []
        if cache is not None:
            self.inputs = self._continue(cache.get_seq_length(), speaks_pairs)
        elif speaks_pairs:
            self.inputs = tokenizer([tokenizer.build_prompt(query, history=self.history)], return_tensors="pt")
        else:
            self.inputs = tokenizer.build_chat_input(query, history=self.history, role=role)
        self.inputs = self.inputs.to(model.device)

    def _continue(self, seen: int, speaks_pairs: bool):
        """Inputs for the new message alone; padding ids take the places of the `seen` cached tokens."""
        if speaks_pairs:
            prompt = "\n\n" + round_prompt(len(self.history) + 1, self.query)
            ids = self.tokenizer.encode(prompt, add_special_tokens=False)[1:]  # without the dummy space
        else:
            newest = to_chatglm3([*self.history, {"role": self.role, "content": self.query}])[-1]
            ids = self.tokenizer.build_single_message(*newest)
            ids.append(self.tokenizer.get_command("<|assistant|>"))
        return self.tokenizer.prepare_for_model(
            [self.tokenizer.pad_token_id] * seen + ids,
            add_special_tokens=False,
            return_tensors="pt",
            prepend_batch_axis=True,
        )

    def read(self, ids: list[int]) -> None:
        """Take the next tokens of the answer. The newest waits for another: the last one ends the answer."""
        *ids, last = [*self.newest, *ids]
        self.newest = [last]
        for token in ids:
            if token == self.new_message:
                self.texts.append(GrowingText(self.tokenizer, [token]))
            else:
                self.texts[-1].add(token)

    def _close_messages(self) -> tuple[str | dict, list[dict]]:
        asked = [*self.history, {"role": self.role, "content": self.query}]
        return parse_reply([message.text for message in self.texts], asked)

    def _close_pairs(self) -> tuple[str, list[tuple[str, str]]]:
        answer = self.model.process_response(self.texts[0].text)
        return answer, [*self.history, (self.query, answer)]


def generation_settings(
    stop_ids: list[int],
    max_length: int = 8192,
    do_sample: bool = True,
    top_p: float = 0.8,
    temperature: float = 0.8,
    **rest,
) -> dict:
    """Arguments of `generate` with the official defaults; sampling values only with `do_sample`."""
    settings = {"do_sample": do_sample, "eos_token_id": stop_ids, **rest}
    if do_sample:
        settings |= {"top_p": top_p, "temperature": temperature}
    if "max_new_tokens" not in rest:
        settings["max_length"] = max_length
    return settings
