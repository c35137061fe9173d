"""Writes a tool parser for vLLM: one file that needs nothing of this project."""

import inspect
from pathlib import Path

from ..inference import calls

NAME = "chatglm3_tool_parser.py"
HEAD = f"""\
# Reads ChatGLM3's calls of functions for vLLM 0.8.5 to 0.33, without streaming and with it (Python 3.10 or later):
#
#     vllm serve FOLDER --enable-auto-tool-choice --tool-parser-plugin FOLDER/{NAME} --tool-call-parser chatglm3
#
# Written by Luciole (Apache License 2.0): its component/inference/calls.py, and behind it vLLM's part.

"""
OURS = "from ..inference.calls import"


def write_tool_parser(folder: str | Path) -> None:
    """Write `chatglm3_tool_parser.py`: `inference/calls.py` word for word, then `vllm_parser.py` without its import."""
    part = Path(__file__).with_name("vllm_parser.py").read_text(encoding="utf-8").partition('"""\n\n')[2]
    lines = [line for line in part.splitlines(keepends=True) if not line.startswith(OURS)]
    text = HEAD + inspect.getsource(calls) + "\n\n" + "".join(lines)
    (Path(folder) / NAME).write_text(text, encoding="utf-8")
