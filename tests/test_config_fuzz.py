"""Hundreds of broken and hostile configs: one clear error each, nothing imported (PITFALLS S1, 2c)."""

import json
import random
import sys
import time
from pathlib import Path

from some_config import NAMES, NEEDED, Config, read, refused
from yaml.nodes import MappingNode

from torchft.errors import ConfigError
from torchft.parse import flatten, read_config
from torchft.strict_yaml import compose_file

LIMIT_S = 0.2  # of one CPU for one config (PITFALLS 2c); 0.004 is usual, 0.03 the most that was seen
HOSTILE = ["os.system", "torch.hub.load", "builtins.eval", "__import__", "..config", "subprocess.Popen", "posix.fork"]
VALUES = [  # each is written behind `key: `
    *("null", "true", "-1", "0", "1e309", ".inf", "-.nan", "9" * 400, "0x10", "1_000", "''", '"\\u0000"', "[]", "{}"),
    *("${oc.env:HOME}", "${run.seed}", "${", "???", "*x", "&x 1", "!!python/name:os.system", "!!binary aGk=", "[[[]]]"),
    *("x" * 3000, "| \n  a", "{path: 1, weight: x}", "[a, 1, null]", "2024-01-01", "~", "<<", "1:30", "é\u202e\ud7ff"),
    *("'", '"', "%", "@", "`"),
]


def fuzzed(rng: random.Random) -> str:
    """A config with a few things wrong: keys misspelt, renamed, moved, doubled or hostile; values of another kind."""
    lines: list[str] = []
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(NAMES)
        group, _, leaf = name.rpartition(".")
        value = rng.choice(VALUES) if rng.random() < 0.6 else json.dumps(flatten(Config())[name])
        kind = rng.randrange(8)
        if kind == 0:
            leaf = leaf[:-1] if len(leaf) > 1 else leaf + "x"
        elif kind == 1:
            leaf = leaf + rng.choice(["s", "_", " ", "é", "\u200b", ".x", "[0]", "-"])
        elif kind == 2:
            group = rng.choice(["optimizer", "tokenizer", "dataset", "_target_", "lora_", "LORA", "x" * 200])
        elif kind == 3:
            leaf = rng.choice(["_component_", "_target_", "_args_", "__class__", "__init__", "items", "keys", "pop"])
            value = rng.choice(HOSTILE)
        elif kind == 4:
            group = ""
        elif kind == 5:
            lines.append(f"{group}: {value}" if group else str(value))
        lines.append(
            f"{group}: {{{leaf}: {value}}}" if group and rng.random() < 0.5 else f"{group}:\n  {leaf}: {value}"
        )
    if rng.random() < 0.3:
        rng.shuffle(lines)
    text = "\n".join(lines)
    cut = rng.randrange(len(text))
    return text[:cut] if rng.random() < 0.1 else text


def overrides(rng: random.Random) -> list[str]:
    """Sometimes a few overrides, each with something wrong in it."""
    forms = [
        "{name}={value}",
        "{leaf}={value}",
        "{name}x={value}",
        "data.train[0].{leaf}={value}",
        "=",
        "{name}==",
        "{value}=",
    ]
    names = [rng.choice(NAMES) for _ in range(rng.choice([0, 0, 1, 3]))]
    values = {"value": rng.choice([*VALUES, "\udcff\x00"])}
    return [rng.choice(forms).format(name=name, leaf=name.split(".")[-1], **values) for name in names]


def timed_read(file: Path, lines: list[str], seed: int) -> tuple[bool, float]:
    """Whether the config was accepted, and the CPU seconds that took; refused, it is by one error that says where."""
    start = time.process_time()
    try:
        read_config(Config, str(file), lines, paths=False)
    except ConfigError as error:
        message = str(error)
        assert any(part in message for part in (str(file), "command line", *NAMES)), (seed, message)
        return False, time.process_time() - start
    return True, time.process_time() - start


def check_fuzzed(seed: int, file: Path) -> bool:
    """Reads one fuzzed config with overrides. True if it was accepted; then every key in it is an option."""
    rng = random.Random(seed)
    file.write_bytes(fuzzed(rng).encode("utf-8", "surrogatepass"))
    modules, lines = set(sys.modules), [*NEEDED, *overrides(rng)]
    accepted, seconds = timed_read(file, lines, seed)
    if seconds > LIMIT_S:  # a collection of everything the worker's other tests left behind, unless it comes again
        seconds = min(timed_read(file, lines, seed)[1] for _ in range(3))
    assert seconds <= LIMIT_S, seed
    assert not [name for name in set(sys.modules) - modules if not name.startswith("encodings.")], seed
    node = compose_file(file) if accepted else None
    for group, leaves in node.value if node is not None else []:
        keys = [f"{group.value}.{key.value}" for key, _ in leaves.value] if isinstance(leaves, MappingNode) else []
        assert set(keys or [group.value]) <= {*NAMES, "model", "lora", "data", "optim", "run"}, seed
    return accepted


def test_fuzzed_configs_give_one_clear_error_and_import_nothing(tmp_path):
    read("", tmp_path, *NEEDED)  # what the parser itself imports late
    accepted = sum(check_fuzzed(seed, tmp_path / "c.yaml") for seed in range(500))
    assert 5 < accepted < 100  # both kinds occur


def test_a_hostile_target_is_never_imported(tmp_path):
    for i in range(200):
        name = f"no_such_package_{i}.attack"
        yaml = f"model: {{_component_: {name}}}\noptim: {{_target_: {name}, lr: 1}}\nx: {{_args_: [{name}]}}"
        message = refused(yaml, tmp_path)
        assert message.count("nothing in a config is imported or executed") == 3
