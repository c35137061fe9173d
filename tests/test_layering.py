"""Who may import whom, read from the source (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "trainer": {"checkpoint", "collator", "distributed", "interruption", "loss", "progress", "report"},
    "identity": {"cache", "model", "reader"},
    "kernel": {"chatglm"},
    "model": {"argument", "chatglm", "kernel", "trust"},
    "trust": {"argument"},
    "inspection": {"dataset", "preprocessing", "reader", "conversation"},
    "dataset": {"preprocessing", "cache", "formats", "reader", "template", "conversation"},
    "preprocessing": {"formats", "reader", "template", "conversation"},
    "formats": {"reader", "template", "conversation"},
    "reader": {"conversation"},
    "template": {"conversation"},
    "cache": set(),
    "argument": set(),
    "chatglm": set(),
    "checkpoint": {"cache"},
    "collator": {"loss"},
    "conversation": set(),
    "distributed": set(),
    "interruption": set(),
    "loss": set(),
    "progress": set(),
    "report": {"cache"},
}
# Of benchmark/step.py, of benchmark/scorecard.py, and of benchmark/overhead.py.
BENCHMARK_PARTS = ("benchmark.common", "benchmark.variants", "benchmark.faults", "benchmark.cases", "benchmark.scaling")
BENCHMARK_PARTS += ("script.make_tiny_model.train_tokenizer",)
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


@pytest.mark.parametrize("path", sorted(ROOT.glob("component/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_parts_import_downward_only(path):
    if path == ROOT / "component/__init__.py":
        assert path.read_text() == ""
        return
    room = path.relative_to(ROOT / "component").parts[0].removesuffix(".py")
    siblings = {name.split(".")[1] for name in imports(path) if name.startswith("component.")} - {room}
    assert siblings <= ALLOWED[room]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_programs_import_parts_and_never_one_another(path):
    own = {"train_qlora", "script", "benchmark"}
    foreign = {name for name in imports(path) if name.split(".")[0] in own}
    assert not [name for name in foreign if not name.startswith(BENCHMARK_PARTS)]


def test_a_conversation_needs_the_standard_library_alone():
    assert {name.split(".")[0] for name in imports(ROOT / "component/conversation.py")} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "module", ["component.formats", "component.reader", "component.template", "component.argument"]
)
def test_light_parts_import_no_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_logging_is_set_up_before_what_is_loud_at_its_import():
    code = (
        "import sys, component.report; print(sorted({'bitsandbytes', 'peft', 'transformers.trainer'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_parts_log_and_do_not_print():
    for path in ROOT.glob("component/**/*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"], path
