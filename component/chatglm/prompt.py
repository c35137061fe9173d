"""ChatGLM's prompts: their text, and ChatGLM3's messages. Training, the tokenizer and `chat` take them from here."""

import ast
import json
from typing import Any, NamedTuple

TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"


def round_prompt(number: int, question: str) -> str:
    """ChatGLM2's text of one question, up to its answer. Rounds are counted from 1."""
    return f"[Round {number}]\n\n问：{question}\n\n答："


class Message(NamedTuple):
    """One ChatGLM3 message, `<|role|>metadata\\ncontent`, as `build_single_message` takes it."""

    role: str  # system, user, assistant or observation
    metadata: str
    content: str


def tools_message(tools: Any, prompt: str = TOOLS_PROMPT) -> Message:
    """ChatGLM3's system message that offers functions; `tools` may be any JSON value."""
    return Message("system", "", f"{prompt}\n{json.dumps(tools, indent=4, ensure_ascii=False)}")


def call_message(name: str, parameters: dict[str, Any]) -> Message:
    """ChatGLM3's message that calls a function.

    Raises:
        ValueError: a parameter's name is no identifier.
    """
    if others := [name for name in parameters if not name.isidentifier()]:
        raise ValueError(f"the parameter {others[0]!r} cannot be a keyword argument; rename it")
    keywords = [ast.keyword(name, ast.Constant(value)) for name, value in parameters.items()]
    text = ast.unparse(ast.Call(ast.Name("tool_call"), [], keywords))
    return Message("assistant", name, f"```python\n{text}\n```")


def split_reply(message: str) -> tuple[str, str]:
    """(metadata, content) of a message that ChatGLM3 wrote; one without a newline is content alone."""
    metadata, newline, content = message.partition("\n")
    return (metadata, content) if newline else ("", message)


def parse_fenced_call(content: str) -> dict | None:
    """Parse the content of a call's message, ```` ```python\\ntool_call(…)\\n``` ````, as `parse_tool_call` does."""
    return parse_tool_call("\n".join(content.split("\n")[1:-1]))


def parse_tool_call(code: str) -> dict | None:
    """Keyword arguments of a call such as `tool_call(city='北京', days=2)`, or None for any other code.

    Values must be Python literals. Nothing is executed.
    """
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            return None
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
