"""What the parser of configs refuses, and with which words (D3, PITFALLS S1, S6, U1, U3)."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from some_config import NAMES, NEEDED, Config, read, refused

from torchft.checks import CHOICES, RANGES
from torchft.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from torchft.errors import ConfigError
from torchft.names import FOREIGN_NAMES, OLD_KEYS
from torchft.options import list_options
from torchft.parse import flatten, read_config


@dataclass
class WithoutAdapter:
    """The options of a recipe that trains models whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


def mistakes() -> list[tuple[list[str], str]]:
    """(lines of YAML and overrides, the message) of every block in config_mistakes.txt."""
    blocks = (Path(__file__).parent / "config_mistakes.txt").read_text(encoding="utf-8").strip().split("\n\n")[1:]
    return [(block.split("\n")[:-1], block.split("\n")[-1]) for block in blocks]


@pytest.mark.parametrize("lines, message", mistakes())
def test_a_mistake_is_refused_in_these_words(lines, message, tmp_path):
    yaml = "\n".join(line[2:] for line in lines if line.startswith("> "))
    overrides = [line[2:] for line in lines if line.startswith("$ ")]
    needed = NEEDED[:1] if "data: {train" in yaml or "data:\n  train" in yaml else NEEDED
    assert refused(yaml, tmp_path, *needed, *overrides) == message


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("a:\n\t- b", "c.yaml:2: not valid here: found character '\\t' that cannot start any token"),
        ("a: \x01", "c.yaml:1: character 1 is not allowed in YAML"),
        ("a: " + 13 * "[", "c.yaml:1: not valid here: nested deeper than 12 levels"),
        (13 * "- ", "c.yaml:1: not valid here: nested deeper than 12 levels"),
    ],
)
def test_text_that_is_not_a_config(yaml, message, tmp_path):
    assert refused(yaml, tmp_path, *NEEDED) == message


def test_validation_makes_what_needs_it_possible(tmp_path):
    wanted = ["run.keep_best=true", "run.exact_match_rows=5", "run.eval_every=5"]
    assert read("", tmp_path, *NEEDED, *wanted, "data.valid=v.jsonl").run.keep_best
    assert read("", tmp_path, *NEEDED, *wanted, "data.valid_fraction=0.1").run.keep_best


def test_no_data_and_no_model_are_named_without_a_place(tmp_path):
    message = refused("", tmp_path)
    assert "\n  model.path is empty; name a Hugging Face model directory" in message
    assert "\n  data.train is empty; name a file: data.train=rows.jsonl" in message


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_accepted_and_nothing_else(key, tmp_path):
    for choice in CHOICES[key]:
        given = [*NEEDED, f"{key}={choice}", *(["lora.rank=0"] if key == "dpo.reference" else [])]
        found = read_config(WithoutAdapter, None, given, paths=False) if choice == "adamw_bf16" else read("", tmp_path, *given)
        assert flatten(found)[key] == choice
    assert refused("", tmp_path, *NEEDED, f"{key}=other").startswith(f"command line: {key} is 'other'; the choices are")


@pytest.mark.parametrize("key", RANGES)
def test_the_ends_of_a_range_are_accepted_and_nothing_beyond(key, tmp_path):
    extra = ["data.valid=v.jsonl"] if key in ("run.exact_match_rows", "run.eval_every") else []
    extra += {"dpo.gamma": ["dpo.loss=simpo"], "lora.rank": ["dpo.beta=0.2"]}.get(key, [])
    for value in RANGES[key]:
        assert flatten(read("", tmp_path, *NEEDED, *extra, f"{key}={value}"))[key] == value
    low, high = RANGES[key]
    beyond = [low - 1] if isinstance(low, int) else [low - max(1e-9, abs(low) / 2), high * 1.01]
    for value in beyond:
        assert f"{key} is {value}; accepted are" in refused("", tmp_path, *NEEDED, *extra, f"{key}={value}")


def test_every_number_has_a_range_or_is_checked_otherwise():
    numbers = {option.name for option in list_options(Config) if option.hint in (int, float)}
    assert numbers - set(RANGES) == {"beta"}  # a recipe's own field


def test_all_problems_at_once(tmp_path):
    message = refused("lora: {rnak: 8}\nmodel: {dtype: half}", tmp_path, *NEEDED, "optim.lr=x", "foo=1")
    assert message.splitlines()[0] == "4 problems in the options:"
    for key in ("lora.rnak", "model.dtype", "optim.lr", "foo"):
        assert key in message


def test_a_torchtune_config_is_translated_key_by_key(tmp_path):
    flat = {key: "x" for key in OLD_KEYS if "." not in key and not any(k.startswith(f"{key}.") for k in OLD_KEYS)}
    yaml = "".join(f"{key}: {value}\n" for key, value in flat.items())
    message = refused(yaml, tmp_path, *NEEDED)
    assert message.startswith(f"{len(flat)} problems")
    for key in flat:
        assert re.search(rf": {key} is torchtune's; (use|remove it)", message), key


def test_old_keys_point_at_options_that_exist():
    for key, advice in OLD_KEYS.items():
        named = re.findall(r"\b(?:model|lora|data|optim|run)\.[a-z_]+", advice)
        assert named or advice.startswith("remove it"), key
        assert set(named) <= set(NAMES), key
        assert key not in NAMES, key


FOREIGN = {name: ours for ours, names in FOREIGN_NAMES.items() for name in names.split()}
SAME_NAMES = ("weight_decay", "seed", "warmup_steps", "max_grad_norm", "max_steps", "micro_batch_size", "epochs")


def test_other_trainers_names_are_each_of_one_option_of_ours():
    assert {ours.partition("=")[0] for ours in FOREIGN_NAMES} <= set(NAMES)
    assert sum(len(names.split()) for names in FOREIGN_NAMES.values()) == len(FOREIGN)
    assert not {name.rpartition(".")[2] for name in NAMES} & set(FOREIGN)
    for ours in FOREIGN_NAMES:
        name, _, value = ours.partition("=")
        assert not value or value in (*CHOICES.get(name, ()), "full"), ours


@pytest.mark.parametrize("name", [*FOREIGN, *SAME_NAMES])
def test_other_trainers_names_lead_to_ours(name, tmp_path):
    """Bare, in a YAML and on the command line, and in a group of ours; what torchtune calls so too has its advice."""
    ours = FOREIGN.get(name) or next(option for option in NAMES if option.endswith(f".{name}"))
    group = "optim" if not ours.startswith("optim.") else "run"
    for yaml, overrides in ((f"{name}: 1", []), (f"{group}: {{{name}: 1}}", []), ("", [f"{group}.{name}=1"])):
        message = refused(yaml, tmp_path, *NEEDED, *overrides)
        key = message.split(": ")[1].split(" ")[0]
        advice = OLD_KEYS.get(key)
        assert f"{key} is torchtune's; use {advice}" in message if advice else message.endswith(f"{key} is not an option; did you mean {ours}?")
        assert ours.partition("=")[0] in message


def test_overrides_given_twice(tmp_path):
    message = refused("", tmp_path, *NEEDED, "run.seed=1", "seed=2")
    assert message == "command line: run.seed is given twice; keep one"


def test_a_long_or_odd_key_and_value_are_shown_safely(tmp_path):
    message = refused("", tmp_path, *NEEDED, "\x1b[31mred=1", f"run.out={'${' * 500}", f"{'k' * 500}=1")
    assert "\x1b" not in message and max(map(len, message.splitlines())) < 250


@pytest.mark.parametrize("content", [b"\xff\xfe", b"run: {out: \xc3(}", b"a: b\x00c"])
def test_files_that_are_not_text(content, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml:1: (not UTF-8|character 0)"):
        read_config(Config, str(file), [])


def test_a_byte_order_mark_is_skipped(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfmodel: {path: m}\n")
    assert read_config(Config, str(file), ["data.train=a.jsonl"], paths=False).model.path == "m"


def test_a_file_that_is_too_large_missing_or_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("big.yaml").write_text("# " + "x" * 40_000)
    Path("dir.yaml").mkdir()
    for name, words in (
        ("big.yaml", "larger than"),
        ("dir.yaml", "is a directory"),
        ("none.yaml", "there is no config"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_config(Config, name, [])
    with pytest.raises(ConfigError, match="there is no config"):
        read_config(Config, "x" * 5000, [])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16", "adamw_8bit"])
@pytest.mark.parametrize("max_norm", [0, 1])
@pytest.mark.parametrize("micro, rows", [(4, 4), (2, 4), (8, 4)])
@pytest.mark.parametrize("config", [Config, WithoutAdapter])
def test_what_an_update_in_backward_cannot_go_with(config, micro, rows, max_norm, optimizer):
    """PITFALLS L8: every pair, alone and together; each message names both options."""
    options = [f"optim.name={optimizer}", f"optim.max_grad_norm={max_norm}"]
    options += [f"run.micro_batch_size={micro}", f"run.global_batch_size={rows}"]
    clashes = {
        "optim.max_grad_norm": max_norm > 0,
        "run.micro_batch_size": micro < rows,
        "optim.name": optimizer == "adamw_8bit",
        "lora.rank": config is Config,
    }
    wanted = {f"optim.in_backward and {key} cannot go together" for key, broken in clashes.items() if broken}
    said = ""
    try:
        read_config(config, None, [*NEEDED, "optim.in_backward=true", *options], paths=False)
    except ConfigError as error:
        said = str(error)
    assert {match.group() for match in re.finditer(r"optim\.in_backward and \S+ cannot go together", said)} == wanted
    if config is WithoutAdapter or optimizer != "adamw_bf16":
        read_config(config, None, [*NEEDED, *options], paths=False)  # each is fine without it
