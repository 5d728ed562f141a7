"""Every planted bug in tests/mutants/ applies to the tree and names a test that exists; `make mutants` plants them."""

import ast
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PATCHES = sorted((REPO / "tests" / "mutants").glob("*.patch"))
spec = importlib.util.spec_from_file_location("mutants", REPO / "scripts" / "mutants.py")
mutants = importlib.util.module_from_spec(spec)
sys.modules["mutants"] = mutants
spec.loader.exec_module(mutants)

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patches, and is not installed")


def test_there_are_planted_bugs():
    assert len(PATCHES) >= 100


@needs_git
@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_a_planted_bug_applies_and_names_a_test(path):
    mutant = mutants.read_mutant(path)
    assert mutants.apply(mutant, REPO, check_only=True) == ""
    file, _, name = mutant.test.partition("::")
    tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name.partition("[")[0] in functions
    assert Path(file).name.startswith("test_") and name.startswith("test_")


@needs_git
def test_a_bug_is_judged_by_what_its_test_says(tmp_path):
    (tmp_path / "code_under_test.py").write_text("def double(x):\n    return 2 * x\n")
    tests = "from code_under_test import double\n\n\ndef test_sees():\n    assert double(2) == 4\n\n\n"
    tests += "def test_blind():\n    assert double(0) == 0\n\n\ndef test_breaks():\n    {4: 1}[double(2)]\n"
    (tmp_path / "test_it.py").write_text(tests)
    patch = "--- a/code_under_test.py\n+++ b/code_under_test.py\n@@ -1,2 +1,2 @@\n def double(x):\n"
    patch += "-    return 2 * x\n+    return 3 * x\n"
    expected = {"test_sees": "", "test_blind": "passes with the bug", "test_breaks": "not by an assertion"}
    expected["test_that_is_not_there"] = "could not run"
    for name, words in expected.items():
        tree = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}_{name}")
        file = tree / "bug.patch"
        file.write_text(f"# caught by: test_it.py::{name}\n# what: triples\n{patch}")
        said = mutants.verdict(mutants.read_mutant(file), tree)
        assert words in said if words else said == "", name
        assert mutants.apply(mutants.read_mutant(file), tree) != ""  # it is in already
    (tmp_path / "bare.patch").write_text(patch)
    with pytest.raises(ValueError, match="needs the lines"):
        mutants.read_mutant(tmp_path / "bare.patch")


@needs_git
def test_a_tree_inside_another_repository_is_the_one_that_is_patched(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.py").write_text("x = 1\n")
    file = tmp_path / "bug.patch"
    file.write_text("# caught by: t.py::test_x\n# what: x\n--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-x = 1\n+x = 2\n")
    assert mutants.apply(mutants.read_mutant(file), tree) == ""
    assert (tree / "a.py").read_text() == "x = 2\n"
