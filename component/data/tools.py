"""Descriptions of functions, bare as ChatGLM3 shows them or wrapped as OpenAI does. Standard library only."""

from typing import Any


def bare(tool: Any) -> Any:
    """A function's description itself, where it is wrapped as `{"type": "function", "function": …}`."""
    return tool.get("function", tool) if isinstance(tool, dict) else tool


def has_name(tool: Any) -> bool:
    """Whether this is a bare description in the usual way."""
    return isinstance(tool, dict) and isinstance(tool.get("name"), str)


def names_of(tools: Any) -> set[str]:
    """Names of the functions that `tools` describes in the usual way, bare or wrapped."""
    described = map(bare, tools if isinstance(tools, list) else ())
    return {tool["name"] for tool in described if has_name(tool)}


def wrap_tools(tools: Any) -> list[dict] | None:
    """Each description as `{"type": "function", "function": …}`; None where they are none with names."""
    if not isinstance(tools, list) or not all(has_name(bare(tool)) for tool in tools):
        return None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def unwrap_tools(tools: list) -> list:
    """Each description bare, where its wrapping says no more than that it is a function."""
    return [bare(tool) if isinstance(tool, dict) and tool.keys() == {"type", "function"} else tool for tool in tools]
