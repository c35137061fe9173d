"""Writes what reads ChatGLM3's answers elsewhere, within vLLM or without: one file that needs nothing of ours."""

import inspect
import re
from pathlib import Path

from ..inference import calls

NAME = "chatglm3_tool_parser.py"
HEAD = f"""\
# Reads ChatGLM3's calls of functions (Python 3.10 or later). For vLLM 0.8.5 to 0.33, without streaming and with it:
#
#     vllm serve FOLDER --enable-auto-tool-choice --tool-parser-plugin FOLDER/{NAME} --tool-call-parser chatglm3
#
# Without vLLM, `read_answer` reads what another program answered: its text, and its calls.
#
# Written by Luciole (Apache License 2.0): its component/inference/calls.py, and behind it what is for others.

"""
OURS = re.compile(r"^from \.\.inference\.calls import (\([^)]*\)|.*)\n", re.MULTILINE)


def write_tool_parser(folder: str | Path) -> None:
    """Write `chatglm3_tool_parser.py`: `inference/calls.py` word for word, then `vllm_parser.py` without its import."""
    part = Path(__file__).with_name("vllm_parser.py").read_text(encoding="utf-8").partition('"""\n\n')[2]
    (Path(folder) / NAME).write_text(HEAD + inspect.getsource(calls) + "\n\n" + OURS.sub("", part), encoding="utf-8")
