"""Prints what exceeds the size budgets: long files, long or deep or branching functions, too many parameters.

    python scripts/style.py            # or: make style

A report, not a gate: an excess with a good reason is fine, an unnoticed one is not. The exit code is 0 either way.
Measured on the syntax tree: lines of a file or function from its first to its last, docstring included; nesting as
the deepest chain of def, class, if, for, while, with, try and match (an elif adds nothing); branching as McCabe's
number, one plus every if, loop, except, case, comprehension, conditional expression and further operand of and/or.
"""

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("recipes", "torchft", "models", "modules", "kernels", "scripts", "tests")
FILE_LINES = 300
FUNCTION_LINES = 60
NEST = 4
BRANCHES = 10
PARAMETERS = 8
RECIPE_LINES = {"lora_single_device.py": 230}  # of the recipes that are not named
OTHER_RECIPE_LINES = 290
RECIPE_MAIN_LINES = 130
RECIPE_MAIN_BRANCHES = 25
JIT_PARAMETERS = 14  # of a Triton kernel: pointers and strides are parameters

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (
    *FUNCTIONS,
    ast.ClassDef,
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    ast.Match,
)
BRANCHING = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.match_case)


@dataclass(frozen=True)
class Excess:
    """A measure and its budget."""

    place: str  # file:line, and the function's name
    what: str
    measured: int
    budget: int

    def __str__(self) -> str:
        return f"{self.place}: {self.measured} {self.what}, the budget is {self.budget}"


def check_file(path: Path, name: str) -> list[Excess]:
    """All excesses of one file; `name` is its path from the repository's root."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    is_recipe = name.startswith("recipes/")
    lines = RECIPE_LINES.get(path.name, OTHER_RECIPE_LINES) if is_recipe else FILE_LINES
    levels, line = deepest(tree)
    found = [Excess(f"{name}:1", "lines in the file", text.count("\n"), lines)]
    found.append(Excess(f"{name}:{line}", "levels of nesting", levels, NEST))
    for function in (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)):
        found += measure(function, f"{name}:{function.lineno} {function.name}", is_recipe and function.name == "main")
    return [excess for excess in found if excess.measured > excess.budget]


def measure(function: ast.FunctionDef | ast.AsyncFunctionDef, place: str, is_main: bool) -> list[Excess]:
    """A function's measures with their budgets, kept or not."""
    length = function.end_lineno - function.lineno + 1
    is_jit = any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
    return [
        Excess(place, "lines", length, RECIPE_MAIN_LINES if is_main else FUNCTION_LINES),
        Excess(place, "branches", branches(function), RECIPE_MAIN_BRANCHES if is_main else BRANCHES),
        Excess(place, "parameters", parameters(function), JIT_PARAMETERS if is_jit else PARAMETERS),
    ]


def deepest(node: ast.AST, depth: int = 0, line: int = 1) -> tuple[int, int]:
    """(levels, line) of the most deeply nested block below a node that is itself `depth` levels deep."""
    best = (depth, line)
    for field, child in children(node):
        if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            continue
        # `elif` is an if alone in the else branch of an if
        is_elif = field == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If) and len(node.orelse) == 1
        here = child.lineno if isinstance(child, ast.stmt) else line
        below = deepest(child, depth + (isinstance(child, BLOCKS) and not is_elif), here)
        best = max(best, below, key=lambda found: found[0])
    return best


def children(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The nodes directly below one, with the name of the field that holds them."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield field, child


def branches(function: ast.AST) -> int:
    """McCabe's number of a function, the functions inside it left out: they are measured on their own."""
    total, waiting = 1, list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            continue
        total += isinstance(node, BRANCHING)
        total += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        total += 1 + len(node.ifs) if isinstance(node, ast.comprehension) else 0
        waiting += ast.iter_child_nodes(node)
    return total


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many values a caller can pass; self and cls are not counted."""
    args = function.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg) if arg]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def check_tree(root: Path) -> list[Excess]:
    """All excesses below a repository's root, each file once although torchft links to the other folders."""
    found: list[Excess] = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root)
            linked = any((root / parent).is_symlink() for parent in name.parents)
            if not linked and "mutants" not in name.parts:
                found += check_file(path, str(name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent, help="of the tree; default: this one")
    root = parser.parse_args().root
    if not root.is_dir():
        parser.error(f"{root} is not a directory")
    found = check_tree(root)
    for excess in found:
        print(excess)
    print(f"{len(found)} budgets are exceeded" if found else "every budget is kept")


if __name__ == "__main__":
    main()
