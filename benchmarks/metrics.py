"""How easily the code can be followed: `make metrics` prints what `docs/design.md` promises to keep small.

- changes of file, and entries of the busiest file, between `step` and the first policy loss of a run: of the calls,
  and of a reader who follows them and opens each function once;
- private names that a class of the trainer reads and does not define;
- attributes that several classes of the trainer write;
- functions whose body, without docstring, does not fit on a screen of 60 lines;
- import circles; lines and files; errors in the types, as `make check` finds them (`mypy --strict`).
"""

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl_apa"
SCREEN = 60  # lines


def calls_from_step_to_loss() -> list[tuple[str, CodeType]]:
    """The package's file and the function of each call, in their order, from `step` to the first policy loss."""
    from tests.tiny import tiny_rollouts, tiny_trainer

    entered: list[tuple[str, CodeType]] = []

    class LossReached(Exception):
        pass

    def loss(tokens: Any, args: Any) -> Any:
        raise LossReached

    from trl_apa.algorithms import ALGORITHMS, Algorithm

    def trace(frame: Any, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(PACKAGE)):
            entered.append((str(Path(file).relative_to(PACKAGE)), frame.f_code))

    with tempfile.TemporaryDirectory() as folder:
        trainer = tiny_trainer(Path(folder), loss_type="apa")
        apa, ALGORITHMS["apa"] = ALGORITHMS["apa"], Algorithm(loss, kl_coef=0.1)
        sys.setprofile(trace)
        try:
            trainer.step(*tiny_rollouts())
        except LossReached:
            pass
        finally:
            sys.setprofile(None)
            ALGORITHMS["apa"] = apa
    return entered


def changes(names: list[str]) -> list[str]:
    """The names without those that repeat the one before."""
    return [name for before, name in zip([None, *names], names, strict=False) if name != before]


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """Every class of the package with its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                yield str(path.relative_to(PACKAGE)), node


def functions_over_a_screen(limit: int = SCREEN) -> dict[str, int]:
    """File and name of each function with more than `limit` lines of body, docstring not counted, and the lines."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, lines in long_functions(path.read_text(encoding="utf-8"), limit):
            found[f"{path.relative_to(PACKAGE)}: {name}"] = lines
    return found


def long_functions(source: str, limit: int = SCREEN) -> list[tuple[str, int]]:
    """Name and lines of the body, without docstring, of each function of a module with more than `limit` of them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            found.append((node.name, lines))
    return [(name, lines) for name, lines in found if lines > limit]


def attributes(node: ast.ClassDef, context: type) -> set[str]:
    """Names `x` of `self.x` in a class, where it is read (`ast.Load`) or written (`ast.Store`)."""
    found = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, context))
    return {n.attr for n in found if isinstance(n.value, ast.Name) and n.value.id == "self"}


def defined(node: ast.ClassDef) -> set[str]:
    """Names that a class defines: methods, class attributes with a value, attributes of `self` that it writes."""
    names = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    names |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    names |= {t.id for n in node.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    return names | attributes(node, ast.Store)


def parts_of_trainer() -> dict[str, ast.ClassDef]:
    """The classes of this package that `APATrainer` is made of, by name."""
    from trl_apa import APATrainer

    names = {c.__name__ for c in APATrainer.__mro__ if c.__module__.startswith("trl_apa.")}
    return {node.name: node for _, node in classes() if node.name in names}


def inherited_privates(parts: dict[str, ast.ClassDef]) -> dict[str, list[str]]:
    """Private names that a part reads of `self` and does not define, though another part does."""
    of_all = set().union(*(defined(node) for node in parts.values()))
    found = {}
    for name, node in parts.items():
        private = {n for n in attributes(node, ast.Load) - defined(node) if n.startswith("_") and n in of_all}
        found[name] = sorted(private)
    return {name: privates for name, privates in found.items() if privates}


def several_writers(parts: dict[str, ast.ClassDef]) -> dict[str, list[str]]:
    """Attributes of `self` that more than one part writes, with these parts."""
    writers = defaultdict(list)
    for name, node in parts.items():
        for attribute in attributes(node, ast.Store):
            writers[attribute].append(name)
    return {attribute: names for attribute, names in sorted(writers.items()) if len(names) > 1}


def imports() -> dict[str, set[str]]:
    """Modules of the package that each imports when it is imported itself."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    target = f"{source}.{alias.name}"
                    graph[module] |= {
                        name for name in ((target,) if target in modules else (source,)) if name in modules
                    }
            elif isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names if alias.name in modules}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import each other (strongly connected components of more than one, by Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def strict_errors() -> int | None:
    """Errors that `make check` finds in the types of the package; None if mypy is not there."""
    told = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    match = re.search(r"Found (\d+) errors?", told.stdout)
    return int(match[1]) if match else 0 if "Success" in told.stdout else None


def measured(with_mypy: bool = True) -> dict[str, Any]:
    """All the numbers."""
    calls = calls_from_step_to_loss()
    path = changes([file for file, _ in calls])
    read = changes([file for file, _ in dict.fromkeys(calls)])
    parts = parts_of_trainer()
    sources = list(PACKAGE.rglob("*.py"))
    return {
        "changes_of_file_from_step_to_loss": len(path),
        "changes_of_file_if_each_function_is_read_once": len(read),
        "files_from_step_to_loss": len(set(read)),
        "most_entered_files": dict(Counter(read).most_common(5)),
        "classes_of_the_trainer": sorted(parts),
        "private_names_read_of_another_class": inherited_privates(parts),
        "attributes_with_several_writers": several_writers(parts),
        "functions_over_a_screen": functions_over_a_screen(),
        "import_circles": circles(imports()),
        "files": len(sources),
        "files_at_the_top": len(list(PACKAGE.glob("*.py"))),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources),
        "errors_of_mypy_strict": strict_errors() if with_mypy else None,
    }


if __name__ == "__main__":
    print(json.dumps(measured(), indent=1))
