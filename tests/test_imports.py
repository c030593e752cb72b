"""Who imports whom: the compiler needs no torch, and a plan runs, and reads, where no solver is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER, RUNTIME = ROOT / "klotski_compiler", ROOT / "runtime" / "klotski_runtime"
SOLVERS = ("ortools", "networkx", "pulp", "highspy")
NEEDS_SOLVERS = tuple(
    f"klotski_compiler.{name}"
    for name in (
        "milp",
        "bounds",
        "fill",
        "estimates",
        "climb",
        "shortlist",
        "search",
        "explain",
        "record",
        "polish",
        "reorder",
        "planner",
        "sweep",
        "cli.compile",
    )
)

HIDE = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *where):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, *where)

sys.meta_path[:] = map(Hiding, sys.meta_path)
sys.path[:0] = {path!r}
"""


def modules(package: Path) -> list[str]:
    """Every module of a package, by its full name."""
    files = sorted(package.rglob("*.py"))
    return [".".join(f.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__") for f in files]


def run(code: str, hidden: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter in which the ``hidden`` packages are not to be found."""
    path = [str(COMPILER.parent), str(RUNTIME.parent)]
    script = HIDE.format(hidden=hidden, path=path) + code
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def importing(names: list[str]) -> str:
    """Code that imports modules one by one, so that an error names the one at fault."""
    return f"import importlib\nfor name in {names!r}:\n    print(name); importlib.import_module(name)\n"


def test_the_compiler_needs_neither_torch_nor_transformers() -> None:
    pytest.importorskip("ortools")
    done = run(importing(modules(COMPILER)), ("torch", "transformers", "klotski_runtime"))
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_the_runtime_needs_no_solver() -> None:
    pytest.importorskip("torch")
    done = run(importing(modules(RUNTIME)), SOLVERS)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_what_reads_plans_needs_neither_torch_nor_a_solver() -> None:
    names = [name for name in modules(COMPILER) if not name.startswith(NEEDS_SOLVERS)]
    done = run(importing(names), ("torch", "transformers", *SOLVERS))
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("klotski_compiler.cli.inspect", "klotski-inspect"),
        ("klotski_runtime.cli.run", "klotski-run"),
        ("klotski_runtime.cli.profile", "klotski-profile"),
    ],
)
def test_commands_start_where_no_solver_is_installed(module: str, command: str) -> None:
    done = run(f"from {module} import main\nmain(['--help'])", SOLVERS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {command}")


def test_help_needs_no_torch() -> None:
    """``--help`` must not take the seconds that torch takes."""
    for name in modules(COMPILER) + modules(RUNTIME):
        if ".cli." in name:
            done = run(f"from {name} import main\nmain(['--help'])", ("torch", "transformers"))
            assert done.returncode == 0, f"{name}: {done.stderr}"


def test_the_plan_is_standard_library_and_pydantic() -> None:
    files = ("plan", "ops", "decision", "output", "errors")
    for file in files:
        imported = imports(COMPILER / f"{file}.py")
        ours = {name for name in imported if name.startswith("klotski")}
        assert ours <= {f"klotski_compiler.{name}" for name in files}
        assert {name.partition(".")[0] for name in imported - ours} <= {*sys.stdlib_module_names, "pydantic"}


def test_runtime_is_not_imported_by_the_compiler() -> None:
    for file in COMPILER.rglob("*.py"):
        # Of transformers, tokenizers count the tokens of a file of prompts.
        names = ("klotski_runtime", "torch") + (() if file == COMPILER / "prompts.py" else ("transformers",))
        assert not [name for name in imports(file, nested=True) if name.startswith(names)], file


def imports(file: Path, nested: bool = False) -> set[str]:
    """Modules that a file imports when it is imported; ``nested``: also those inside functions and conditions."""
    tree = ast.parse(file.read_text())
    found: set[str] = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found
