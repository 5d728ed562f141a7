"""scripts/style.py finds what exceeds the budgets, each kind of it, and says where."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "style.py"
spec = importlib.util.spec_from_file_location("style", SCRIPT)
style = importlib.util.module_from_spec(spec)
sys.modules["style"] = style  # dataclasses look their module up
spec.loader.exec_module(style)

DEEP = """
def f(x):
    for a in x:
        if a:
            while a:
                with a:
                    pass
"""
ELIF = """
def f(x):
    if x == 1:
        pass
    elif x == 2:
        pass
    elif x == 3:
        for a in x:
            pass
"""
PLANTED = {  # text -> what is found, as (what, measured, line)
    "x = 1\n" * 301: ("lines in the file", 301, 1),
    "\n\ndef f():\n" + "    x = 1\n" * 60: ("lines", 61, 3),
    "def f(a, b, c, d, e, *f, g, h, **i):\n    pass\n": ("parameters", 9, 1),
    "def f(x):\n    return " + " and ".join("x" * 11) + "\n": ("branches", 11, 1),
    "def f(x):\n" + "    x = 1 if x else 2\n" * 10: ("branches", 11, 1),
    "def f(x):\n" + "    x = [a for a in x if a]\n" * 5: ("branches", 11, 1),
    DEEP: ("levels of nesting", 5, 6),
}
KEPT = [
    "x = 1\n" * 300,
    "def f():\n" + "    x = 1\n" * 59,
    "class A:\n    def f(self, a, b, c, d, e, f, g, h):\n        pass\n",
    "def f(x):\n" + "    x = 1 if x else 2\n" * 9,
    "def f(x):\n    def g(x):\n        return " + " or ".join("x" * 9) + "\n    return " + " or ".join("x" * 9) + "\n",
    "import triton\n\n\n@triton.jit\ndef kernel(a, b, c, d, e, f, g, h, i, j, k, l, m, n):\n    pass\n",
    ELIF,
]


def found(text: str, tmp_path: Path, name: str = "torchft/a.py") -> list[tuple[str, int, int]]:
    file = tmp_path / Path(name).name
    file.write_text(text)
    return [(x.what, x.measured, int(x.place.split(":")[1].split()[0])) for x in style.check_file(file, name)]


@pytest.mark.parametrize("text", PLANTED, ids=lambda text: PLANTED[text][0])
def test_a_planted_excess_is_found(text, tmp_path):
    assert found(text, tmp_path) == [PLANTED[text]]


@pytest.mark.parametrize("text", KEPT)
def test_a_budget_that_is_just_kept_is_no_excess(text, tmp_path):
    assert found(text, tmp_path) == []


def test_an_elif_adds_no_level():
    assert style.deepest(style.ast.parse(ELIF)) == (3, 8)


def test_recipes_have_budgets_of_their_own(tmp_path):
    main = "def main(cfg):\n" + "    x = 1\n" * 129
    assert found(main, tmp_path, "recipes/a.py") == []
    assert found(main + "    x = 1\n", tmp_path, "recipes/a.py") == [("lines", 131, 1)]
    assert found("x = 1\n" * 231, tmp_path, "recipes/lora_single_device.py") == [("lines in the file", 231, 1)]
    assert found("x = 1\n" * 290, tmp_path, "recipes/lora_distributed.py") == []


def test_the_script_walks_a_tree_once_and_leaves_with_0(tmp_path):
    (tmp_path / "torchft").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "torchft" / "models").symlink_to("../models")
    (tmp_path / "models" / "long.py").write_text("x = 1\n" * 400)
    run = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, check=True)
    assert run.stdout == "models/long.py:1: 400 lines in the file, the budget is 300\n1 budgets are exceeded\n"


def test_every_file_of_this_tree_is_measured():
    style.check_tree(SCRIPT.parent.parent)  # any syntax that it does not know would raise
