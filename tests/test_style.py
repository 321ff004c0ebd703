"""House style: short lines, short cells, small stored output, documented names. `ruff` keeps the rest."""

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest
from conftest import ROOT

WIDTH, CELL, OUTPUT = 120, 40, 300_000
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "moe_routing").rglob("*.py") if p.name != "_modidx.py")
SHAPE = re.compile(r"\((?=[^()]*(?:\b[A-Z]\b|\.\.\.))[^()]*,[^()]*\)")  # (T, E), (L+1,), (..., K), (draws, N)
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
modules = pytest.mark.parametrize("path", MODULES, ids=lambda p: ".".join(p.relative_to(ROOT).with_suffix("").parts))


def cells(path: Path) -> list[tuple[str, str, str]]:
    "(id, kind, source) of each cell; the kind is markdown, lesson, export or exporti."
    found = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        directive = re.search(r"^#\|\s*(exporti?)s?\b", source, re.M)
        kind = directive[1] if directive else "lesson"
        found.append((cell["id"], kind if cell["cell_type"] == "code" else cell["cell_type"], source))
    return found


def definitions(source: str) -> list[ast.stmt]:
    "The statements of a cell that define a name; imports define nothing."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    return [node for node in ast.parse(source).body if isinstance(node, kinds)]


def is_public(node: ast.stmt) -> bool:
    "Does the statement define a public function or class?"
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")


@notebooks
def test_lines_are_short(path):
    long = [
        f"cell {name}, line {i} ({len(line)}): {line[:60]}"
        for name, _, source in cells(path)
        for i, line in enumerate(source.splitlines(), 1)
        if len(line) > WIDTH
    ]
    assert not long, "\n".join(long)


@notebooks
def test_exported_cells_are_short(path):
    long = {name: n for name, kind, s in cells(path) if "export" in kind and (n := len(s.splitlines())) > CELL}
    assert not long, f"{path.name}: exported cells of more than {CELL} lines: {long}"


@notebooks
def test_stored_output_is_small(path):
    stored = sum(len(json.dumps(c.get("outputs", []))) for c in json.loads(path.read_text())["cells"])
    assert stored <= OUTPUT, f"{path.name} stores {stored} bytes of output"


@notebooks
def test_chapter_starts_with_what_it_is_about(path):
    "The first exported cell that defines a function or a class defines a public one: no helper comes first."
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [(name, kind, definitions(s)) for name, kind, s in cells(path) if "export" in kind]
    defining = [(name, kind, nodes) for name, kind, nodes in found if any(isinstance(n, kinds) for n in nodes)]
    if defining:
        name, kind, nodes = defining[0]
        assert kind == "export" and any(map(is_public, nodes)), f"{path.name}, cell {name} defines only helpers"


@notebooks
def test_one_statement_at_a_time(path):
    "No `f(), g()` in place of two statements; a tuple that ends a lesson is what the lesson shows."
    found = []
    for name, kind, source in cells(path):
        if kind in ("markdown", "raw"):
            continue
        tree = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M))
        shown = tree.body[-1:] if kind == "lesson" else []
        tuples = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Tuple)]
        found += [f"{name}: {ast.unparse(n)[:80]}" for n in tuples if n not in shown]
    assert not found, "\n".join([path.name, *found])


@modules
def test_classes_are_whole_where_they_are_defined(path):
    "No top-level `X.y = ...` or `setattr(X, ...)`, and no decorator that puts a function into a class."
    tree = ast.parse(path.read_text())
    attached = [
        ast.unparse(node)[:80]
        for node in tree.body
        if (isinstance(node, ast.Assign) and any(isinstance(t, ast.Attribute) for t in node.targets))
        or (isinstance(node, ast.Expr) and ast.unparse(node).startswith("setattr("))
    ]
    inside = {  # a function that the class statement itself names is a part of it
        name.id
        for c in tree.body
        if isinstance(c, ast.ClassDef)
        for a in c.body
        if isinstance(a, ast.Assign)
        for name in ast.walk(a.value)
        if isinstance(name, ast.Name)
    }
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)} - inside
    if any(isinstance(node, ast.ClassDef) for node in tree.body):
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for cls in [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]:
            methods = [f for f in vars(cls).values() if isinstance(f, FunctionType)]
            attached += [f"{cls.__name__}.{f.__name__}" for f in methods if f.__qualname__ in functions]
    assert not attached, f"{path.name}: {attached}"


@modules
def test_public_names_are_documented(path):
    missing = [n.name for n in ast.parse(path.read_text()).body if is_public(n) and not ast.get_docstring(n)]
    assert not missing, f"{path.name}: no docstring: {missing}"


def signature(node: ast.FunctionDef, lines: list[str]) -> str:
    "A function from its first line to the end of its docstring, comments included."
    first = node.body[0]
    return "\n".join(lines[node.lineno - 1 : first.end_lineno if ast.get_docstring(node) else first.lineno - 1])


@modules
def test_functions_of_tensors_state_shapes(path):
    text = path.read_text()
    missing = []
    for node in filter(is_public, ast.parse(text).body):
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs if hasattr(node, "args") else []
        types = " ".join(ast.unparse(a.annotation) for a in arguments if a.annotation)
        if re.search(r"\b(Tensor|ndarray)\b", types) and not SHAPE.search(signature(node, text.splitlines())):
            missing.append(node.name)
    assert not missing, f"{path.name}: takes arrays of unstated shape: {missing}"


# To be renamed; no further name may join them.
TWICE = {"pack", "score", "mean_count", "expert_vectors", "Recipe", "main", "Tally", "tally", "Row", "LOSSES", "SCORES"}
TWICE |= {"Table", "ablation_table", "BASELINES"}


def test_no_further_name_is_public_in_two_modules():
    homes = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value):
                    homes.setdefault(name, []).append(str(path.relative_to(ROOT)))
    twice = {name: found for name, found in sorted(homes.items()) if len(found) > 1}
    assert homes and set(twice) <= TWICE, set(twice) - TWICE


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    "Notebooks, tests and what is written by hand; nbdev lays out the modules that it makes from notebooks itself."
    by_hand = [p for p in MODULES if "AUTOGENERATED" not in p.read_text()[:2000]]
    if command != "check":  # the lists of names in an __init__.py stay several to a line
        by_hand = [p for p in by_hand if p.name != "__init__.py"]
    run = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "nbs", "tests", *map(str, by_hand)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
