"""Imports go to lower chapters only, drawn from the files: lazy imports inside functions and `import_module` count."""

import ast
import json
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = "moe_routing"
FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted((ROOT / PACKAGE).rglob("*.py"))
    if p.name != "_modidx.py"
}


@cache
def code_cells(path: Path) -> list[str]:
    found = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    return [re.sub(r"^[%!].*$", "", "".join(c["source"]), flags=re.M) for c in found]


def chapters() -> dict[str, tuple[int, Path]]:
    "Module -> (number, notebook), for every notebook that exports a module."
    found = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        target = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code_cells(path)), re.M)
        if target:
            found[f"{PACKAGE}.{target[1]}"] = (int(path.name.partition("_")[0]), path)
    return found


CHAPTERS = chapters()


@cache
def re_exported(package: str) -> dict[str, str]:
    "Public name -> module, as the hand-written `__init__.py` of a package hands it on."
    tree = ast.parse(FILES[package].read_text())
    attached = [n for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "submod_attrs"]
    lists = ast.literal_eval(attached[0].value) if attached else {}
    return {name: f"{package}.{module}" for module, names in lists.items() for name in names}


def target(module: str, name: str | None = None) -> str | None:
    "The file that `from module import name` (or `import module`) executes; None outside the package."
    if name and f"{module}.{name}" in FILES:
        return f"{module}.{name}"
    if module in FILES and FILES[module].name == "__init__.py":
        return re_exported(module).get(name, module)
    return module if module in FILES else None


def imported(source: str, package: list[str]) -> set[str]:
    "Modules of this project that the source imports anywhere; `package` is where its relative imports start."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {target(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            found |= {target(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found |= {target(name) for name in names}
    return found - {None}


def graph() -> dict[str, set[str]]:
    "Module -> modules that it imports."
    found = {}
    for module, path in FILES.items():
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        found[module] = imported(path.read_text(), package) - {module}
    return found


def test_every_chapter_has_a_file():
    assert len(CHAPTERS) > 40 and CHAPTERS.keys() <= FILES.keys()


def test_no_circles():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(f"imports form a circle: {' <- '.join(error.args[1])}")


def test_imports_go_to_lower_chapters():
    up = [
        f"{a} {CHAPTERS[a][0]} -> {b} {CHAPTERS[b][0]}"
        for a, targets in graph().items()
        for b in targets
        if a in CHAPTERS and b in CHAPTERS and CHAPTERS[b][0] >= CHAPTERS[a][0]
    ]
    assert not up, "\n".join(sorted(up))


def test_chapters_import_only_chapters():
    "What has no number has no place in the order: the command line may import chapters, never the other way round."
    free = {a: sorted(b - CHAPTERS.keys()) for a, b in graph().items() if a in CHAPTERS and b - CHAPTERS.keys()}
    assert not free, free


@pytest.mark.parametrize("module", CHAPTERS)
def test_lessons_look_back_only(module):
    number, path = CHAPTERS[module]
    lessons = [s for s in code_cells(path) if not re.search(r"^#\|\s*export", s, re.M)]
    up = {m for s in lessons for m in imported(s, [PACKAGE]) if m in CHAPTERS and CHAPTERS[m][0] > number}
    assert not up, f"{path.name} imports from later chapters: {sorted(up)}"


def test_the_graph_sees_hidden_imports():
    source = "def f():\n    from .core import Routing\n    import_module('moe_routing.stats')\n"
    assert imported(source, [PACKAGE]) == {"moe_routing.core", "moe_routing.stats"}
    assert imported("from moe_routing.patching import route", []) == {"moe_routing.patching.patch"}
    assert imported("from ..capacity import limit", [PACKAGE, "routers"]) == {"moe_routing.capacity"}
