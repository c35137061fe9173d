"""ChatGLM's prompts as text. Training, the tokenizer and `chat` all take them from here."""

import ast
import json
from typing import Any

TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"


def round_prompt(number: int, question: str) -> str:
    """ChatGLM2's text of one question, up to its answer. Rounds are counted from 1."""
    return f"[Round {number}]\n\n问：{question}\n\n答："


def tools_message(tools: Any, prompt: str = TOOLS_PROMPT) -> str:
    """ChatGLM3's system message that offers functions; `tools` may be any JSON value."""
    return f"{prompt}\n{json.dumps(tools, indent=4, ensure_ascii=False)}"


def tool_call(parameters: dict[str, Any]) -> str:
    """ChatGLM3's text of a call, whose function's name goes into the metadata.

    Raises:
        ValueError: a parameter's name is no identifier.
    """
    if others := [name for name in parameters if not name.isidentifier()]:
        raise ValueError(f"the parameter {others[0]!r} cannot be a keyword argument; rename it")
    keywords = [ast.keyword(name, ast.Constant(value)) for name, value in parameters.items()]
    text = ast.unparse(ast.Call(ast.Name("tool_call"), [], keywords))
    return f"```python\n{text}\n```"


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
