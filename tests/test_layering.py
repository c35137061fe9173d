"""Who may import whom, read from the source (docs/architecture.md)."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {  # room: the rooms that it imports
    "score": {"card", "data", "export", "inference", "kernel", "model", "run", "train", "trust"},
    "serve": {"data", "inference", "run", "trust"},
    "chat": {"data", "inference", "run"},
    "export": {"card", "chat_templates", "chatglm", "inference", "model", "pickles", "run", "trust"},
    "verify": {"chatglm", "data", "model", "run", "settings", "train", "trust"},
    "inference": {"chat_templates", "chatglm", "data", "kernel", "model", "run", "trust"},
    "train": {"card", "data", "kernel", "run", "settings", "trust"},
    "kernel": {"chatglm", "run"},
    "data": {"chat_templates", "chatglm", "run"},
    "model": {"chat_templates", "chatglm", "run", "settings", "trust"},
    "card": {"run", "trust"},
    "trust": {"chatglm", "pickles", "run", "settings"},
    "pickles": {"run"},
    "settings": {"run"},
    "chat_templates": {"run"},
    "chatglm": {"run"},
    "run": set(),
}
# Parts of benchmark/step.py and benchmark/scaling.py, of benchmark/scorecard.py, and what others use of them.
PARTS = ("benchmark.common", "benchmark.variants", "benchmark.kernels", "benchmark.lab", "benchmark.cases")
PARTS += ("benchmark.runs", "benchmark.serving", "benchmark.faults", "benchmark.scaling")
PARTS += ("script.make_tiny_model.train_tokenizer",)
PROGRAMS = [ROOT / "train_qlora.py", *sorted(ROOT.glob("script/*.py")), *sorted(ROOT.glob("benchmark/*.py"))]


def imports(path: Path) -> set[str]:
    """Full names of imported modules; `from x import y` counts as x.y, relative ones as component's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = path.relative_to(ROOT).parent.parts
            base = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def rooms() -> dict[str, set[Path]]:
    """The files of each room: a folder of component/, or a file there."""
    found: dict[str, set[Path]] = {}
    for path in ROOT.glob("component/**/*.py"):
        if path != ROOT / "component/__init__.py":
            found.setdefault(path.relative_to(ROOT / "component").parts[0].removesuffix(".py"), set()).add(path)
    return found


def test_each_room_imports_the_rooms_below_it_and_no_other():
    found = {
        room: {name.split(".")[1] for path in paths for name in imports(path) if name.startswith("component.")} - {room}
        for room, paths in rooms().items()
    }
    assert found == ROOMS
    assert (ROOT / "component/__init__.py").read_text() == ""


def test_no_files_import_one_another_in_a_circle():
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.glob("component/**/*.py")
    }

    def imported(path: Path) -> set[str]:
        names = imports(path)
        return {file for file in files if file in names or any(name.rpartition(".")[0] == file for name in names)}

    graph = {file: imported(path) - {file} for file, path in files.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) == len(files)


def test_chatglm_and_data_have_no_name_for_two_things():
    def defined(room: str) -> set[str]:
        nodes = (node for path in rooms()[room] for node in ast.parse(path.read_text(encoding="utf-8")).body)
        return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}

    assert not defined("chatglm") & defined("data")


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_programs_import_parts_and_never_one_another(path):
    own = {"train_qlora", "script", "benchmark"}
    foreign = {name for name in imports(path) if name.split(".")[0] in own}
    assert not [name for name in foreign if not name.startswith(PARTS)]


def test_a_conversation_needs_the_standard_library_alone():
    own = {"component.run.errors.DataError", "component.data.tools.misfits", "component.data.tools.names_of"}
    for file in ("data/conversation", "data/tools", "run/errors", "chatglm/prompt", "inference/calls"):
        foreign = imports(ROOT / f"component/{file}.py") - own
        assert {name.split(".")[0] for name in foreign} <= sys.stdlib_module_names, file


@pytest.mark.parametrize("room", ["settings", "chatglm"])
def test_settings_and_chatglm_use_of_other_rooms_the_errors_alone(room):
    used = {name for path in rooms()[room] for name in imports(path) if name.startswith("component.run.")}
    assert used == {"component.run.errors.ArgumentError"}


@pytest.mark.parametrize(
    "module",
    [
        "component.inference.calls",
        "component.data.formats",
        "component.data.messages",
        "component.settings.load",
        "component.run.process",
    ],
)
def test_light_parts_import_no_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_logging_is_set_up_before_what_is_loud_at_its_import():
    loud = "{'bitsandbytes', 'peft', 'transformers.trainer'}"
    code = f"import sys, component.run.log; print(sorted({loud} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_no_function_has_more_than_60_lines():
    for path in ROOT.glob("component/**/*.py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        assert not [node.name for node in functions if node.end_lineno - node.lineno >= 60], path


def test_parts_log_and_do_not_print():
    for path in ROOT.glob("component/**/*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"], path
