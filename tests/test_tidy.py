"""The rules of the house, run as a test: a rule that nothing checks erodes.

Which code may touch the world, which package may know which, how long things may get. Each test
names the offender and the rule; change a rule here only together with the reason in the code.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "coeld"

STAGES = ("perception", "deployment", "compression", "update")
VOCABULARY = (
    "ids",
    "errors",
    "routes",
    "view",
    "events",
    "effects",
    "messages",
    "lot_sets",
    "json_values",
    "asked",
    "measured",
    "releases",
)
CORE = (*VOCABULARY, "node", "node_config", "node_market", "node_status")
PURE = (*CORE, *STAGES, "sim")
IMPURE_MODULES = {
    "asyncio", "concurrent", "ctypes", "datetime", "glob", "http", "io", "logging",
    "multiprocessing", "os", "pathlib", "platform", "psutil", "secrets", "select", "selectors",
    "shutil", "signal", "socket", "ssl", "subprocess", "sys", "tempfile", "threading", "time",
    "urllib", "uuid", "aiomqtt", "amqtt", "uvicorn", "starlette", "zeroconf", "onnxruntime",
    "onnx", "gguf",
}  # fmt: skip
IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}
HEAVY = ("numpy", "onnxruntime", "onnx", "gguf", "tokenizers", "huggingface_hub")
AGENT_SIDE = ("coeld.agent", "coeld.__main__", "coeld.node", "coeld.config", "coeld.net.mqtt")

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
DOCSTRING_CHARS_MIN = 30


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The package or module directly below coeld that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module, whatever it is called afterwards, also inside functions."""
    for item in ast.walk(tree(path)):
        if isinstance(item, ast.Import):
            yield from ((alias.name, item.lineno) for alias in item.names)
        elif isinstance(item, ast.ImportFrom):
            assert item.level == 0, f"{path}:{item.lineno}: imports are absolute here"
            yield item.module or "", item.lineno
            yield from ((f"{item.module}.{alias.name}", item.lineno) for alias in item.names)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted name of what is called, as written."""
    for item in ast.walk(tree(path)):
        if isinstance(item, ast.Call):
            yield ast.unparse(item.func), item


def complaints(found: list[str]) -> None:
    assert not found, "\n".join(["", *found])


def test_the_rules_look_at_files_that_exist() -> None:
    parts = {part(path) for path in sources()}
    assert set(PURE) <= parts


def test_decisions_are_pure_no_io_no_clock_no_global_randomness() -> None:
    found = []
    for path in sources():
        if part(path) not in PURE:
            continue
        for module, line in imports(path):
            if module.split(".")[0] in IMPURE_MODULES:
                found.append(f"{path}:{line}: pure code imports {module}")
            if module.startswith("random") and module not in ("random", "random.Random"):
                found.append(f"{path}:{line}: {module}; a seeded Random is handed in")
        found += [
            f"{path}:{item.lineno}: import random; a seeded Random is handed in"
            for item in ast.walk(tree(path))
            if isinstance(item, ast.Import) and any(a.name == "random" for a in item.names)
        ]
        for name, call in calls(path):
            if name in IMPURE_CALLS:
                found.append(f"{path}:{call.lineno}: pure code calls {name}()")
            if name == "Random" and not call.args:
                found.append(f"{path}:{call.lineno}: Random() without a seed")
    complaints(found)


def test_pure_code_imports_only_pure_code_of_this_project() -> None:
    found = []
    for path in sources():
        if part(path) not in PURE:
            continue
        for module, line in imports(path):
            names = module.split(".")
            if names[0] == "coeld" and len(names) > 1 and names[1] not in PURE:
                found.append(f"{path}:{line}: {part(path)} imports {module}")
    complaints(found)


def test_stages_do_not_know_each_other_nor_the_node() -> None:
    found = []
    for path in sources():
        if part(path) not in STAGES:
            continue
        others = {"node", "node_status", "sim", *STAGES} - {part(path)}
        for module, line in imports(path):
            names = module.split(".")
            if names[0] == "coeld" and len(names) > 1 and names[1] in others:
                found.append(f"{path}:{line}: {part(path)} imports {module}; node.py hands values")
    complaints(found)


def test_the_vocabulary_imports_nothing_but_itself() -> None:
    found = []
    for path in sources():
        if part(path) not in VOCABULARY:
            continue
        for module, line in imports(path):
            names = module.split(".")
            if names[0] == "coeld" and len(names) > 1 and names[1] not in VOCABULARY:
                found.append(f"{path}:{line}: {part(path)} imports {module}")
    complaints(found)


def test_the_data_path_knows_no_stage_but_compression() -> None:
    found = []
    banned = {"node", "node_status", "sim", "messages", *STAGES} - {"compression"}
    for path in sources():
        if part(path) != "datapath":
            continue
        for module, line in imports(path):
            names = module.split(".")
            if names[0] == "coeld" and len(names) > 1 and names[1] in banned:
                found.append(f"{path}:{line}: datapath imports {module}")
    complaints(found)


@pytest.mark.parametrize("module", AGENT_SIDE)
def test_the_agent_stays_small(module: str) -> None:
    """It imports no numerics, transitively: those live in the engine's process."""
    code = f"import {module}, sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "", f"import {module} pulls in {done.stdout.strip()}"


def test_files_and_functions_stay_short() -> None:
    found = []
    for path in [*sources(), *sorted((ROOT / "tests").rglob("*.py"))]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES_MAX:
            found.append(f"{path}: {lines} lines, allowed are {FILE_LINES_MAX}")
        for item in ast.walk(tree(path)):
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (item.end_lineno or item.lineno) - item.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    found.append(f"{path}:{item.lineno}: {item.name} has {length} lines")
    complaints(found)


def test_every_file_says_what_it_decides() -> None:
    found = []
    for path in sources():
        said = ast.get_docstring(tree(path)) or ""
        if len(said) < DOCSTRING_CHARS_MIN:
            found.append(f"{path}: no opening paragraph")
    complaints(found)


def test_every_task_and_thread_has_a_name_and_nobody_gathers() -> None:
    found = []
    for path in sources():
        for name, call in calls(path):
            last = name.split(".")[-1]
            named = any(keyword.arg == "name" for keyword in call.keywords)
            if last in ("create_task", "Thread") and not named:
                found.append(f"{path}:{call.lineno}: {name}() without a name")
            if last in ("ensure_future", "gather"):
                found.append(f"{path}:{call.lineno}: {name}; use a TaskGroup")
    complaints(found)


def test_only_the_user_interface_prints() -> None:
    found = [
        f"{path}:{call.lineno}: print()"
        for path in sources()
        if part(path) != "ui"
        for name, call in calls(path)
        if name == "print"
    ]
    complaints(found)


def test_broad_excepts_raise_again_or_end_the_process() -> None:
    found = []
    for path in sources():
        for item in ast.walk(tree(path)):
            if not isinstance(item, ast.ExceptHandler):
                continue
            caught = ast.unparse(item.type) if item.type else "everything"
            broad = caught in ("everything", "Exception", "BaseException")
            ends = any(
                isinstance(inner, ast.Raise) or ast.unparse(inner).startswith("os._exit(")
                for inner in ast.walk(item)
            )
            if broad and not ends:
                found.append(f"{path}:{item.lineno}: swallows {caught}")
    complaints(found)


def test_nothing_is_left_to_do() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
    found = [
        f"{path}:{number}: {word}"
        for path in [*sources(), *sorted((ROOT / "tests").rglob("*.py"))]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word in words
        if word in line
    ]
    complaints(found)
