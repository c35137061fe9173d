"""Descriptions of functions, bare (ChatGLM3's) or wrapped (OpenAI's), and checks of calls. Standard library only."""

from collections.abc import Iterator
from typing import Any, NamedTuple

TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
# Keywords of JSON Schema that may allow properties beside those of `properties`.
OPEN = {"$ref", "anyOf", "oneOf", "allOf", "if", "patternProperties", "unevaluatedProperties"}
LACKS, UNKNOWN, WRONG_TYPE, WRONG_VALUE = "lacks", "unknown", "type", "value"  # kinds of misfits


class Misfit(NamedTuple):
    """A fault of a call by the schema of its function."""

    kind: str  # LACKS a required argument, has an UNKNOWN one, or one of a WRONG_TYPE or WRONG_VALUE
    text: str


def bare(tool: Any) -> Any:
    """A function's description without the wrapping `{"type": "function", "function": …}`, if it has that."""
    return tool.get("function", tool) if isinstance(tool, dict) else tool


def has_name(tool: Any) -> bool:
    """Whether a bare description is usual: an object with a name."""
    return isinstance(tool, dict) and isinstance(tool.get("name"), str)


def names_of(tools: Any) -> set[str]:
    """Names of the functions that `tools` describes, bare or wrapped; descriptions without a name are left out."""
    described = map(bare, tools if isinstance(tools, list) else ())
    return {tool["name"] for tool in described if has_name(tool)}


def wrap_tools(tools: Any) -> list[dict] | None:
    """Each description as `{"type": "function", "function": …}`; None unless all have names."""
    if not isinstance(tools, list) or not all(has_name(bare(tool)) for tool in tools):
        return None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def unwrap_tools(tools: list) -> list:
    """Each description without its wrapping, if that says only that it is a function."""
    return [bare(tool) if isinstance(tool, dict) and tool.keys() == {"type", "function"} else tool for tool in tools]


def misfits(name: str, arguments: dict, tools: Any) -> Iterator[Misfit]:
    """Faults of a call by the parameters that `tools` describes, if these are a JSON Schema of an object."""
    for tool in map(bare, tools if isinstance(tools, list) else ()):
        if has_name(tool) and tool["name"] == name:
            schema = tool.get("parameters")
            if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
                yield from object_misfits(arguments, schema, f"{name!r}")
            return


def object_misfits(value: dict, schema: dict, owner: str) -> Iterator[Misfit]:
    """Faults of an object by its JSON schema, which has `properties`; `owner` is the object's name in the text."""
    properties = schema["properties"]
    required = schema.get("required") if isinstance(schema.get("required"), list) else []
    for key in required:
        if key not in value:
            yield Misfit(LACKS, f"a call lacks the required argument {key!r} of {owner}")
    closed = not (schema.get("additionalProperties") or OPEN & schema.keys())
    for key, item in value.items():
        if key in properties:
            absent = item is None and key not in required  # null is a common way to leave an argument out
            yield from () if absent else value_misfits(item, properties[key], f"{key!r} of {owner}")
        elif closed:
            yield Misfit(UNKNOWN, f"a call has the argument {key!r}, which {owner} does not have")


def value_misfits(value: Any, schema: Any, owner: str) -> Iterator[Misfit]:
    """Faults of one argument by its schema. One that is no schema, or names an unknown type, allows anything."""
    if not isinstance(schema, dict) or (value is None and schema.get("nullable") is True):
        return
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    if all(isinstance(one, str) and one in TYPES for one in types) and not any(is_of(value, one) for one in types):
        text = f"a call has an argument of the wrong type: {owner} must be {' or '.join(types)}"
        yield Misfit(WRONG_TYPE, text)
    elif isinstance(schema.get("enum"), list) and value not in schema["enum"]:
        yield Misfit(WRONG_VALUE, f"a call has an argument outside its enum: {owner}")
    elif isinstance(value, dict) and isinstance(schema.get("properties"), dict):
        yield from object_misfits(value, schema, owner)
    elif isinstance(value, list):
        for item in value:
            yield from value_misfits(item, schema.get("items"), f"an item of {owner}")


def is_of(value: Any, name: str) -> bool:
    """Whether a value is of the type `name`, one of TYPES. true is not a number; 2.0 is an integer."""
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, TYPES[name]) or (name == "integer" and isinstance(value, float) and value.is_integer())
