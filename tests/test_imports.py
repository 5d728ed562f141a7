"""The rules of D1 and D3 that hold over the whole tree: who imports whom, what is never used, which options exist."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from some_config import NAMES

from torchft.config import KtoOptions, PreferenceOptions, RewardOptions, SourceConfig
from torchft.names import RECIPES, recipe_names
from torchft.options import list_options

REPO = Path(__file__).resolve().parent.parent
TOPS = ("recipes", "models", "modules", "kernels", "torchft")
DIRECTION = {  # folder -> the parts of this project that it may import
    "recipes": ("torchft",),
    "torchft": ("torchft.models", "torchft.modules", "torchft.kernels", "torchft"),
    "models": ("torchft.models", "torchft.modules"),
    "modules": ("torchft.modules",),
    "kernels": ("torchft.kernels",),
}
LEAF_LIBRARIES = {"models": {"torch"}, "modules": {"torch"}, "kernels": {"torch", "triton"}}
NEVER = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "transformers", "peft", "trl", "accelerate"}


def sources() -> list[Path]:
    """Every Python file that is installed, by its real path."""
    return sorted(path for top in TOPS for path in (REPO / top).rglob("*.py") if not is_linked(path))


def is_linked(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent != REPO and REPO in parent.parents)


def module_name(path: Path) -> str:
    """torchft/config.py -> torchft.config, models/llama.py -> torchft.models.llama: the one name to import it by."""
    parts = path.relative_to(REPO).with_suffix("").parts
    parts = parts if parts[0] == "torchft" else ("torchft", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, at_run_time: bool = False) -> Iterator[str]:
    """The modules that a file imports, `from a import b` as a.b where that is a module of ours, else as a.

    `at_run_time` leaves out what stands below `if TYPE_CHECKING:`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    for_types = [node for node in tests if "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in for_types for inner in ast.walk(node)} if at_run_time else set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the long name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


MODULES = {module_name(path): path for path in sources()}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(REPO)))
def test_imports_go_down(path):
    top = path.relative_to(REPO).parts[0]
    for name in imported(path):
        root = name.split(".")[0]
        assert root not in TOPS or root == "torchft", f"{path.name} imports {name}; write torchft.{name}"
        assert not name.startswith("torchft.recipes"), f"{path.name} imports a recipe"
        assert root not in NEVER, f"{path.name} imports {name}"
        if root == "torchft":
            assert name.startswith(DIRECTION[top]), f"{path.name} in {top}/ imports {name}"
        elif top in LEAF_LIBRARIES and root not in sys.stdlib_module_names:
            allowed = LEAF_LIBRARIES[top] | ({"torchao"} if path.name == "nf4.py" else set())
            assert root in allowed, f"{path.name} in {top}/ imports {name}"


def test_torchao_is_imported_where_it_is_expected():
    # optim.py takes the 8-bit AdamW from it, optimizer_state.py its states; NF4 is known to one file only (D10).
    users = {path.name for path in sources() if any(name.split(".")[0] == "torchao" for name in imported(path))}
    assert users <= {"nf4.py", "optim.py", "optimizer_state.py"} and "nf4.py" in users
    nf4 = {path.name for path in sources() if re.search(r"torchao\.quantization|torchao\.dtypes", path.read_text())}
    assert nf4 <= {"nf4.py"}


def test_no_module_imports_itself_in_a_circle():
    below = {name: set(imported(path, at_run_time=True)) & MODULES.keys() - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(below[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in below:
        visit(name, ())
    assert len(done) > 20


def test_the_root_package_imports_nothing():
    assert not list(imported(REPO / "torchft" / "__init__.py"))


FORBIDDEN_CALLS = {  # what is never called in code that is installed -> why (PITFALLS S1 to S7, STYLE)
    "eval": "code from data",
    "exec": "code from data",
    "compile": "code from data",
    "__import__": "code from data",
    "os.system": "a shell would read paths",
    "os.popen": "a shell would read paths",
    "torch.load": "pickle",
    "torch.save": "pickle",
    "hasattr": "a probe instead of a type",
}
FORBIDDEN_ARGUMENTS = {"shell": "a shell would read paths", "trust_remote_code": "code of a model directory would run"}


def forbidden(path: Path) -> Iterator[str]:
    """Calls, arguments and handlers that must not be in a file; a reason behind `# noqa: BLE001` excuses a handler."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            if why := FORBIDDEN_CALLS.get(ast.unparse(node.func)):
                yield f"{path.relative_to(REPO)}:{node.lineno}: {ast.unparse(node.func)}(): {why}"
            for word in node.keywords:
                if word.arg in FORBIDDEN_ARGUMENTS:
                    yield f"{path.relative_to(REPO)}:{node.lineno}: {word.arg}=: {FORBIDDEN_ARGUMENTS[word.arg]}"
        elif isinstance(node, ast.ExceptHandler):
            caught = "everything" if node.type is None else ast.unparse(node.type)
            excused = re.search(r"# noqa: BLE001 +\w.{20}", lines[node.lineno - 1])
            if caught in ("everything", "Exception", "BaseException") and not excused:
                yield f"{path.relative_to(REPO)}:{node.lineno}: except {caught} hides what went wrong"


@pytest.mark.parametrize("path", [*sources(), *(REPO / "scripts").glob("*.py")], ids=lambda path: path.name)
def test_what_never_stands_in_the_code(path):
    assert not list(forbidden(path))


def test_what_never_stands_in_the_code_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "REPO", tmp_path)
    bad = tmp_path / "bad.py"
    bad.write_text("eval('1')\nrun(x, shell=True)\ntry:\n    pass\nexcept Exception:\n    torch.load(f)\n")
    assert [line.split(": ")[1] for line in forbidden(bad)] == [
        "eval()",
        "shell=",
        "except Exception hides what went wrong",
        "torch.load()",
    ]


# -------------------------------------------------------------------------------------------------------------- options

OPTIONS = """
model: path weights dtype quantize activation_checkpointing offload compile shard kernels
lora: rank alpha dropout rslora dora target_modules modules_to_save adapter
data: train valid valid_fraction chat_template new_tokens train_on max_seq_len packing truncation max_bad_rows
optim: name in_backward lr schedule warmup_steps min_lr_ratio weight_decay betas eps max_grad_norm
run: out seed epochs max_steps global_batch_size micro_batch_size log_every eval_every save_every keep_last keep_best
run: resume sample_rows exact_match_rows max_new_tokens deterministic trackers profile_steps
source: path weight split format columns
"""
OWN = {  # of one recipe each: they do not count to the sixty
    "dpo_distributed": "dpo: loss beta label_smoothing gamma sft_weight reference",
    "kto_distributed": "kto: beta desirable_weight undesirable_weight",
    "reward_distributed": "reward: center_weight",
}
GROUPS = {"dpo": PreferenceOptions, "kto": KtoOptions, "reward": RewardOptions}


def test_the_options_are_these_and_no_others():
    """A new option needs a recipe that uses it, a line here, and a place among the sixty."""
    listed = {
        f"{line.split(': ')[0]}.{name}" for line in OPTIONS.split("\n") if line for name in line.split(": ")[1].split()
    }
    have = {name for name in NAMES if "." in name} | {f"source.{option.name}" for option in list_options(SourceConfig)}
    assert have == listed
    assert len(listed) <= 60


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipes_own_options_are_few_and_in_a_group_of_their_own(recipe):
    shared = {"model", "lora", "data", "optim", "run"}
    own = {name: kind for name, kind in own_fields(recipe).items() if name not in shared}
    group, _, names = OWN.get(recipe, ": ").partition(": ")
    assert own == ({group: GROUPS[group].__name__} if group else {})
    assert [option.name for option in list_options(GROUPS[group])] == names.split() if group else not names
    assert len(names.split()) <= 8


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_uses_at_most_thirty_options_in_its_own_text(recipe):
    tree = ast.parse((RECIPES / f"{recipe}.py").read_text(encoding="utf-8"))
    groups = {f"cfg.{group}": group for group in own_fields(recipe)}
    for node in ast.walk(tree):  # run = cfg.run, also as part of a tuple
        if isinstance(node, ast.Assign):
            targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            pairs = zip(map(ast.unparse, targets), map(ast.unparse, values), strict=False)
            groups |= {target: groups[value] for target, value in pairs if value in groups}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {
        f"{groups[ast.unparse(node.value)]}.{node.attr}" for node in attributes if ast.unparse(node.value) in groups
    }
    assert 0 < len(used) <= 30, sorted(used)


def own_fields(recipe: str) -> dict[str, str]:
    """The fields of a recipe's Config with their types, from its text: importing it would import torch and more."""
    tree = ast.parse((RECIPES / f"{recipe}.py").read_text(encoding="utf-8"))
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    return {node.target.id: ast.unparse(node.annotation) for node in config.body if isinstance(node, ast.AnnAssign)}


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_shares_the_groups_and_its_twin_has_the_same_options(recipe):
    groups = {
        "model": "ModelConfig",
        "lora": "LoraOptions",
        "data": "DataConfig",
        "optim": "OptimConfig",
        "run": "RunConfig",
    }
    fields = own_fields(recipe)
    assert {name: kind for name, kind in fields.items() if name in groups}.items() <= groups.items()
    assert {"model", "data", "optim", "run"} <= fields.keys()
    twin = recipe.replace("single_device", "distributed")
    if twin in recipe_names():
        assert own_fields(twin) == fields
