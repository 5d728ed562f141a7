"""Plants every bug of tests/mutants/ in a copy of the tree and sees that the named test fails by an assertion.

    python scripts/mutants.py                   # all of them, some seconds each; or: make mutants
    python scripts/mutants.py rope nf4          # those with one of these words in the name

A patch starts with `# caught by: tests/....py::test_name` and `# what: ...`, then comes a unified diff. A check that
cannot fail is worth nothing: a test must pass on the tree as it is, and fail with AssertionError (or pytest.fail) on
the planted bug. Exit code 1 if a bug goes unseen.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
DATA = REPO.parent / "shared"  # real data and tokenizers, without which some tests skip
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out", "out-*")


class Mutant(NamedTuple):
    """One planted bug."""

    path: Path
    test: str  # pytest's id of the test that catches it
    what: str


def read_mutant(path: Path) -> Mutant:
    """The head of a patch. Raises ValueError if a line is missing."""
    text = path.read_text(encoding="utf-8")
    head = dict(re.findall(r"^# (caught by|what): (.+)$", text, re.MULTILINE))
    if head.keys() != {"caught by", "what"}:
        raise ValueError(f"{path.name} needs the lines `# caught by: tests/...::test_...` and `# what: ...`")
    return Mutant(path, head["caught by"].strip(), head["what"].strip())


def apply(mutant: Mutant, tree: Path, check_only: bool = False) -> str:
    """Applies a patch to a tree. Returns what git says against it, "" if it applied."""
    # A tree that is no repository itself may lie inside another one, for which git would take the paths to be.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    command = ["git", "apply", *(["--check"] if check_only else []), str(mutant.path.resolve())]
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return run.stderr if run.returncode else ""


def run_test(test: str, tree: Path) -> tuple[int, str]:
    """(exit code, output) of one test in a copy of the tree, whose torchft it imports."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short", test]
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)
    return run.returncode, run.stdout + run.stderr


def verdict(mutant: Mutant, tree: Path) -> str:
    """ "" if the bug is caught as it should be, else what is wrong."""
    if complaint := apply(mutant, tree):
        return f"does not apply: {complaint.strip()}"
    code, output = run_test(mutant.test, tree)
    if code == 0 and " skipped" in output.strip().splitlines()[-1]:
        return f"{mutant.test} was skipped, at least in part, and the rest passes: the data that it needs is not at {DATA}"
    if code == 0:
        return f"{mutant.test} passes with the bug in place"
    if code != 1:
        return f"{mutant.test} could not run: {output.strip().splitlines()[-1]}"
    if not re.search(r"^E +(AssertionError|assert |Failed: )", output, re.MULTILINE):
        return f"{mutant.test} fails, but not by an assertion: {output.strip().splitlines()[-1]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of names in tests/mutants; none: all of them")
    words = parser.parse_args().words
    mutants = [read_mutant(path) for path in sorted((REPO / "tests" / "mutants").glob("*.patch"))]
    mutants = [mutant for mutant in mutants if not words or any(word in mutant.path.stem for word in words)]
    if not mutants:
        parser.error(f"no patch in tests/mutants has {' or '.join(words)} in its name")
    missed = 0
    for mutant in mutants:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
            tree = Path(folder) / "tree"
            shutil.copytree(REPO, tree, symlinks=True, ignore=NOT_COPIED)
            if DATA.is_dir():
                (Path(folder) / DATA.name).symlink_to(DATA)
            problem = verdict(mutant, tree)
        missed += bool(problem)
        result = f"MISSED: {problem}" if problem else "caught"
        print(f"{mutant.path.stem}: {result} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"{len(mutants) - missed} of {len(mutants)} planted bugs are caught")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
