"""Rendering of a Conversation to token ids and the mask of what is learned, as the official inference code has them.

`target_mask[i] == 1` means that the model learns to predict token i. The formats are described in docs/data_format.md.
"""

from dataclasses import dataclass, field

from ..chatglm.prompt import Message, call_message, round_prompt, tools_message
from ..run.errors import DataError
from .conversation import Conversation
from .messages import as_text, question_answer_pairs, with_think_text


@dataclass(slots=True)
class TokenizedSample:
    """Token ids and their mask, which grow together."""

    input_ids: list[int] = field(default_factory=list)
    target_mask: list[int] = field(default_factory=list)

    def add(self, ids: list[int], *, learned: bool) -> None:
        self.input_ids += ids
        self.target_mask += [int(learned)] * len(ids)


def chatglm3_messages(conversation: Conversation) -> list[tuple[Message, bool]]:
    """The messages that official inference would have seen, each with whether it is learned.

    Tools come first. A tool turn becomes its call and its result.
    """
    messages = []
    if conversation.tools is not None:
        messages.append((tools_message(conversation.tools), False))
    for turn in with_think_text(conversation).turns:
        if turn.role == "tool":
            try:
                messages.append((call_message(turn.name, turn.parameters), turn.learned))
            except ValueError as error:
                raise DataError(f"a call of {turn.name}: {error}") from None
            messages.append((Message("observation", "", as_text(turn.observation)), False))
        else:
            messages.append((Message(turn.role, "", turn.content), turn.learned))
    return messages


def render_chatglm3(conversation: Conversation, tokenizer) -> TokenizedSample:
    """Render `[gMASK] sop`, the messages, `</s>`.

    A learned message teaches its tokens and the token after it, which is how the model learns to stop: with
    `<|user|>`, `<|observation|>` or `</s>`. Its own role token is written by the inference code and not learned.
    """
    sample = TokenizedSample()
    sample.add(tokenizer.get_prefix_tokens(), learned=False)
    ends_learned = False
    for message, learned in chatglm3_messages(conversation):
        role, *body = tokenizer.build_single_message(*message)
        sample.add([role], learned=ends_learned)
        sample.add(body, learned=learned)
        ends_learned = learned
    sample.add([tokenizer.eos_token_id], learned=ends_learned)
    return sample


def render_chatglm2(conversation: Conversation, tokenizer) -> TokenizedSample:
    """Render `[gMASK] sop`, then of each round its prompt, answer and `</s>`; answers and their ends are learned."""
    sample = TokenizedSample()
    sample.add(tokenizer.get_prefix_tokens(), learned=False)
    for i, (question, answer) in enumerate(question_answer_pairs(conversation, "chatglm2"), 1):
        prompt = round_prompt(i, question.content)
        sample.add(tokenizer.encode(prompt, add_special_tokens=False), learned=False)
        sample.add(tokenizer.encode(answer.content, add_special_tokens=False), learned=answer.learned)
        sample.add([tokenizer.eos_token_id], learned=answer.learned)
    return sample


def render_firefly(conversation: Conversation, tokenizer) -> TokenizedSample:
    """Render `<s>`, then every utterance followed by `</s>`; answers and their ends are learned.

    `<s>` is the tokenizer's BOS, left out where it has none, and `</s>` its EOS. Control tokens written in an utterance
    are text.
    """
    sample = TokenizedSample()
    if tokenizer.bos_token_id is not None:
        sample.add([tokenizer.bos_token_id], learned=False)
    for pair in question_answer_pairs(conversation, "firefly"):
        for turn in pair:
            ids = tokenizer.encode(turn.content, add_special_tokens=False, split_special_tokens=True)
            sample.add([*ids, tokenizer.eos_token_id], learned=turn.learned)
    return sample
