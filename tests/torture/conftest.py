"""The table of the torture suite: every test file is one row, its target is met if all its tests pass and it counted enough.

With TORTURE=all and nothing failed, docs/TORTURE.md is written anew; see scale.py for the seed.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scale import ALL, SEED
from torture_table import Part, render

TESTS = Path(__file__).resolve().parent.parent
for folder in ("recipes", "data", "models", "kernels"):
    sys.path.append(str(TESTS / folder))  # their helpers


def _fixtures_of(folder: str) -> object:
    spec = importlib.util.spec_from_file_location(f"{folder}_fixtures", TESTS / folder / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_recipes = _fixtures_of("recipes")
small_model, chat_data, pair_data, verdict_data = _recipes.small_model, _recipes.chat_data, _recipes.pair_data, _recipes.verdict_data
byte_model, build = (getattr(_fixtures_of("data"), name) for name in ("byte_model", "build"))


@pytest.fixture(scope="session")
def rows_of(chat_data: Path, pair_data: Path, verdict_data: Path) -> Callable[[str], Path]:
    """rows_of(recipe): a file of what that recipe learns from."""
    return lambda recipe: {"dpo": pair_data, "reward": pair_data, "kto": verdict_data}.get(recipe.split("_")[0], chat_data)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """tally(number, what, note="", **worst) adds to what the test's file has measured; of each of `worst` the largest counts."""

    def add(number: int, what: str, note: str = "", **worst: float) -> None:
        request.node.user_properties.append(("torture", (number, what, note, worst)))

    yield add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    parts: list[Part] = []
    for verdict in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(verdict, []):
            file = Path(report.nodeid.partition("::")[0])
            if file.parent.name == "torture" and (report.when == "call" or verdict != "passed"):
                found = [tuple(value) for name, value in report.user_properties if name == "torture"]
                parts.append(Part(file.stem, verdict in ("passed", "skipped"), found, report.duration))
    if not parts:
        return
    text, met = render(parts, SEED, whole=ALL)
    terminalreporter.write_line("")
    terminalreporter.write_line(text)
    if ALL and met:
        (TESTS.parent / "docs/TORTURE.md").write_text(text, encoding="utf-8")
