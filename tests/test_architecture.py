"""The layout is a test: who writes which table, what `shared` may hold, and what files are called."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from services.local.roles import EACH_ITS_ROWS, OWNED

ROOT = Path(__file__).parent.parent
COMMANDS = ("cli", "demo", "interchange", "local", "terminal")
SERVICES = ("recorder", "outcome_tracker", "scorer", "trainer", "deployer", "gateway", "inference", "admin")
WRITE = re.compile(r"\b(?:insert\s+into|update|delete\s+from|truncate|copy)\s+(?:only\s+)?([a-z_]+)", re.IGNORECASE)
TABLES = {table for tables in (*OWNED.values(), EACH_ITS_ROWS) for table in tables}


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def strings_of(path: Path) -> list[str]:
    """Every string literal that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


def test_every_table_has_an_owner() -> None:
    files = sorted((ROOT / "shared/migrations/versions").glob("*.sql"))
    sql = "\n".join(path.read_text(encoding="utf-8") for path in files)
    created = set(re.findall(r"create table (?:if not exists )?(\w+)\s*\(", sql))
    assert created == TABLES


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_writes_its_own_tables_only(service: str) -> None:
    written = {
        match.lower()
        for path in python_files(ROOT / "services" / service)
        for text in strings_of(path)
        for match in WRITE.findall(text)
    }
    assert written & TABLES <= {*OWNED.get(service, ()), *EACH_ITS_ROWS}


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_the_same_rooms(service: str) -> None:
    rooms = {path.name for path in (ROOT / "services" / service).glob("*.py")}
    assert {"__init__.py", "__main__.py", "app.py", "settings.py", "domain.py"} <= rooms


@pytest.mark.parametrize("room", COMMANDS)
def test_the_command_line_writes_no_table(room: str) -> None:
    for path in python_files(ROOT / "services" / room):
        for text in strings_of(path):
            assert not set(WRITE.findall(text)) & TABLES, f"{path.name} writes: {text[:80]}"


def test_benchmarks_need_no_command_line() -> None:
    using = [path.name for path in python_files(ROOT / "bench") if re.search(r"services\.cli\b", path.read_text())]
    assert using == []


def test_shared_holds_what_two_services_use() -> None:
    """A module of ``shared`` is imported by two services at the least, directly or through another of ``shared``."""
    modules = {path.stem: path for path in (ROOT / "shared").glob("*.py") if path.stem != "__init__"}
    within = {module: shared_modules(path) for module, path in modules.items()}
    users: dict[str, set[str]] = {module: set() for module in modules}
    commands = [path for room in COMMANDS for path in python_files(ROOT / "services" / room)]
    for service, files in {
        **{name: python_files(ROOT / "services" / name) for name in SERVICES},
        "cli": commands,
    }.items():
        wanted = {module for path in files for module in shared_modules(path)}
        while more := {inner for module in wanted for inner in within.get(module, ())} - wanted:
            wanted |= more
        for module in wanted & users.keys():
            users[module].add(service)
    assert {module: who for module, who in users.items() if len(who) < 2} == {}


def shared_modules(path: Path) -> set[str]:
    """The modules of ``shared`` that a file imports."""
    names = re.findall(r"(?:from|import) shared\.(\w+)|from shared import (.+)", path.read_text())
    return {module for one, several in names for module in (one or several).replace(" ", "").split(",")}


def test_no_file_is_named_after_nothing() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in tracked if Path(name).stem in {"utils", "common", "helpers", "misc"}] == []
