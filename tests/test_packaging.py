"""Wheel and sdist hold the linked folders' modules, YAMLs and assets; nothing lands beside `torchft` (D1)."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "out*", "tests", "docs", "scripts"
)
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(kind: str, tree: Path, out: Path) -> Path:
    """The wheel or sdist of a tree, built by setuptools as pip calls it, without an environment of its own."""
    run = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(out)],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return out / run.stdout.splitlines()[-1]


def expected(tree: Path) -> set[str]:
    """Every module, YAML, template and asset, by the path under which it must be installed."""
    names = {str(path.relative_to(tree)) for path in (tree / "torchft").rglob("*") if path.is_file()}
    for link in (path for path in (tree / "torchft").iterdir() if path.is_symlink()):
        names |= {f"torchft/{link.name}/{path.relative_to(link.resolve())}" for path in link.resolve().rglob("*.*")}
    wanted = (".py", ".yaml", ".jinja", ".json", ".jsonl", ".safetensors")
    return {name for name in names if name.endswith(wanted)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what is packaged: building writes into the tree."""
    pytest.importorskip("setuptools", reason="the test extra has it")
    tree = tmp_path_factory.mktemp("package") / "tree"
    shutil.copytree(REPO, tree, symlinks=True, ignore=LEFT_OUT)
    return tree


def test_the_wheel_made_from_the_sdist_holds_everything_under_one_name(tree, tmp_path):
    want = expected(tree)
    for name in ("torchft/models/llama.py", "torchft/recipes/lora_single_device.py", "torchft/configs/tiny/lora.yaml"):
        assert name in want
    with tarfile.open(build("sdist", tree, tmp_path)) as sdist:
        sdist.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 has it from 3.11.4 on
        sdist.extractall(tmp_path)
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    for source in (tree, unpacked):
        out = tmp_path / f"from_{source.name}"
        out.mkdir()
        with zipfile.ZipFile(build("wheel", source, out)) as wheel:
            names = set(wheel.namelist())
        assert want - names == set()
        assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"torchft"}
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "tune = torchft.cli:main" in zipfile.ZipFile(next(out.iterdir())).read(entry).decode()


def test_the_links_lead_to_the_folders_at_the_top():
    for name in ("recipes", "configs", "models", "modules"):
        assert os.readlink(REPO / "torchft" / name) == f"../{name}"
