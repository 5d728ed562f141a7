"""From a command line to a recipe's Config: `--config NAME|FILE` and `key=value`, strict, all problems at once.

    cfg = parse(Config)                                              # in a recipe: reads sys.argv
    cfg = parse(Config, ["--config", "tiny/lora", "optim.lr=1e-3"])   # in a test or a notebook

The YAML and the overrides are read by the type hints of the dataclasses (torchft/typed.py), then OmegaConf merges
defaults, file and overrides, in that order. Interpolation is refused: a config is data, and `${oc.env:...}` would
print secrets.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from yaml.error import Mark
from yaml.nodes import MappingNode, Node, ScalarNode

from torchft.checks import Problems, check_options, check_pairs, check_paths, counted, nearest, show, show_key
from torchft.config import SourceConfig
from torchft.crash import install_excepthook
from torchft.errors import ConfigError
from torchft.names import find_config, forgotten_config, group_advice, nearest_group, nearest_option, old_key_advice
from torchft.options import group_names, help_text, list_options
from torchft.strict_yaml import COMMAND_LINE, NULL, STR, compose_file, compose_text, where
from torchft.typed import Problem, read_pairs, read_value

C = TypeVar("C")
MAX_PROBLEMS = 40  # shown; a torchtune YAML has about that many keys to translate


def parse(config_class: type[C], argv: list[str] | None = None) -> C:
    """The Config that a command line asks for, completely checked; the files that it names exist.

    With `argv` None, the process's own command line is read, and from then on an error that nobody catches is printed
    as torchft/crash.py says. `--help` prints every option and exits. Raises ConfigError listing every problem.
    """
    if argv is None:
        argv = sys.argv[1:]
        install_excepthook()
    if "--help" in argv or "-h" in argv:
        print(help_text(config_class, sys.argv[0]))
        raise SystemExit(0)
    return read_config(config_class, *split_arguments(argv))


def read_config(
    config_class: type[C],
    config: str | None,
    overrides: list[str],
    paths: bool = True,
    training: bool = True,
    pairs: bool = True,
) -> C:
    """`parse` from a config's name or file (None: only defaults) and overrides.

    `paths=False` leaves out whether the files exist that the options name, `training=False` whether the options of `run`
    go with the others, `pairs=False` whether any do. Raises ConfigError listing every problem.
    """
    reader = _Reader(config_class)
    if config is not None:
        reader.read_file(find_config(config))
    for override in overrides:
        reader.read_override(override)
    reader.check(check_options, reader.values)
    reader.raise_problems()
    given = OmegaConf.create(nest(reader.values))
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), given))
    _expand_home(cfg)
    values = flatten(cfg)
    reader.check(check_options, {key: value for key, value in values.items() if key not in reader.values})
    if not training:
        values = {key: value for key, value in values.items() if not key.startswith("run.")}
    if pairs:
        reader.check(check_pairs, values)
    if paths:
        reader.check(check_paths, values)
    reader.raise_problems()
    return cfg


def _expand_home(cfg: Any) -> None:
    """`~` in the options that are paths, here once, so that whoever uses them need not."""
    for group, name in (("model", "path"), ("lora", "adapter"), ("data", "chat_template"), ("run", "out"), ("run", "resume")):
        if group in vars(cfg) and name in vars(vars(cfg)[group]):
            options = vars(vars(cfg)[group])
            options[name] = os.path.expanduser(options[name])


def split_arguments(argv: list[str]) -> tuple[str | None, list[str]]:
    """`--config X` and the overrides of a recipe's command line. Raises ConfigError for anything else."""
    config, overrides, rest = None, [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.split("=")[0] == "--config":
            if config is not None:
                raise ConfigError("--config is given twice; one file describes a run, key=value changes it")
            if argument == "--config" and not rest:
                raise ConfigError("--config needs a name (tune ls) or a .yaml file after it")
            config = argument.partition("=")[2] if "=" in argument else rest.pop(0)
        elif "=" in argument and not argument.startswith("-"):
            overrides.append(argument)
        else:
            raise ConfigError(f"{show(argument)} is not understood; {_argument_advice(argument)}")
    return config, overrides


def _argument_advice(argument: str) -> str:
    if advice := forgotten_config(argument):
        return advice
    if argument.startswith("--"):
        return "options are written key=value; torchrun's stand before the recipe: tune run --nproc_per_node 2 NAME ..."
    return "write key=value, such as optim.lr=1e-4"


def flatten(cfg: Any) -> dict[str, Any]:
    """Dotted option names to values, groups opened: {"model.path": ..., "run.seed": ...}."""
    values: dict[str, Any] = {}
    for name, value in vars(cfg).items():
        if dataclasses.is_dataclass(value):
            values |= {f"{name}.{inner}": item for inner, item in vars(value).items()}
        else:
            values[name] = value
    return values


def nest(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`, with plain dictionaries for the groups."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        group, _, leaf = key.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[leaf] = value
    return tree


def override_node(raw: str, hint: Any) -> Node:
    """What stands behind `key=`, as a YAML node. For a text option it is the text as it is."""
    mark = Mark(COMMAND_LINE, 0, 0, 0, None, None)
    if hint is str or (hint == list[SourceConfig] and not raw.startswith(("[", "{"))):
        return ScalarNode(STR, raw, mark)
    return compose_text(raw, COMMAND_LINE) or ScalarNode(NULL, "", mark)


class _Reader:
    """What one parse has read: values, the places they came from, and the problems found on the way."""

    def __init__(self, config_class: type):
        self.groups = group_names(config_class)
        self.hints = {option.name: option.hint for option in list_options(config_class)}
        self.values: dict[str, Any] = {}  # what was read without a problem; an override replaces the file's
        self.places: dict[str, str] = {}  # option -> where it was set last
        self.problems: list[Problem] = []

    def read_file(self, path: Path) -> None:
        """Reads a YAML file: groups with options below them."""
        node = compose_file(path)
        if node is None or node.tag == NULL:
            return
        if not isinstance(node, MappingNode):
            raise ConfigError(f"{where(node)}: a config is a mapping of groups: model:, data:, ...")
        for name, value in read_pairs(node, "", self.problems):
            is_group = name in self.groups and (isinstance(value, MappingNode) or value.tag == NULL)
            for leaf, item in read_pairs(value, name, self.problems) if is_group else [("", value)]:
                self.read_option(item, f"{name}.{leaf}" if is_group else name)

    def read_override(self, text: str) -> None:
        """Reads one `key=value`. A bare last part stands for the one option that ends in it."""
        key, _, raw = text.partition("=")
        if field := re.fullmatch(r"(data\.(?:train|valid))(?:\.(\d+)|\[(\d+)\])\.(\w+)", key):
            self.read_source_field(field[1], int(field[2] or field[3]), field[4], raw)
            return
        if column := re.fullmatch(r"(data\.(?:train|valid))(?:\.(\d+)|\[(\d+)\])\.columns\.(\w+)", key):
            option, number = column[1], column[2] or column[3]
            whole = show_key(f"{option}.{number}.columns={{{column[4]}: {raw}}}")
            problem = f'is not an option; write "{whole}"'
            self.problems.append(Problem(COMMAND_LINE, f"{option}[{number}].columns.{column[4]}", problem))
            return
        matches = [name for name in self.hints if name.rpartition(".")[2] == key]
        name = matches[0] if len(matches) == 1 else key
        self.read_option(override_node(raw, self.hints.get(name, str)), name)

    def read_source_field(self, option: str, index: int, field: str, raw: str) -> None:
        """Reads `data.train[0].format=...`, also written data.train.0.format: one field of a source given before."""
        key, sources = f"{option}[{index}].{field}", list(self.values.get(option, []))
        hints = get_type_hints(SourceConfig)
        if index >= len(sources):
            problem = f"sets a field of entry {index}, but {option} has {counted(len(sources), 'entry')}, counted from 0"
        elif field not in hints:
            near = nearest(field, list(hints))
            problem = "is not an option; " + (f"did you mean {near}?" if near else f"a data source has {', '.join(hints)}")
        else:
            before = len(self.problems)
            value = read_value(override_node(raw, hints[field]), hints[field], key, self.problems)
            if len(self.problems) == before:
                sources[index] = dataclasses.replace(sources[index], **{field: value})
                self.values[option] = sources
            return
        self.problems.append(Problem(COMMAND_LINE, key, problem))

    def read_option(self, node: Node, name: str) -> None:
        """Reads the value of option `name`, or puts a problem on the list."""
        place = where(node)
        if name not in self.hints:
            self.unknown(node, name)
            return
        if name in self.places and (place == COMMAND_LINE) == (self.places[name] == COMMAND_LINE):
            self.problems.append(Problem(place, name, "is given twice; keep one"))
        before = len(self.problems)
        value = read_value(node, self.hints[name], name, self.problems)
        self.places[name] = place
        if len(self.problems) == before:
            self.values[name] = value

    def unknown(self, node: Node, key: str) -> None:
        """Reports a key that is no option; a mapping that is none is reported leaf by leaf."""
        if isinstance(node, MappingNode) and node.value and key not in self.groups:
            for leaf, item in read_pairs(node, key, self.problems):
                self.unknown(item, f"{key}.{leaf}")
        else:
            self.problems.append(Problem(where(node), key, self.explain_unknown(key)))

    def explain_unknown(self, key: str) -> str:
        """torchtune's keys are translated, any other gets the nearest option."""
        if key in self.groups:
            example = next(name for name in self.hints if name.startswith(f"{key}."))
            return f"is a group of options; set those, such as {example}"
        for name in self.hints:
            if key.startswith((f"{name}.", f"{name}[")):
                return f"is not an option; {name} is given whole"
        if advice := old_key_advice(key) or group_advice(key, self.groups):
            return advice
        if len(self.problems) >= MAX_PROBLEMS:  # a file of nonsense: the search for the nearest name is slow
            return "is not an option"
        if group := nearest_group(key, list(self.groups), list(self.hints)):
            return f"is not an option; did you mean the group {group}?"
        if near := nearest_option(key, list(self.hints)):
            return f"is not an option; did you mean {near}?"
        group = key.partition(".")[0]
        if group in self.groups:
            return f"is not an option; {group} has {', '.join(name for name in get_type_hints(self.groups[group]))}"
        return f"is not an option; the groups are {', '.join(self.groups)}, and `tune run RECIPE --help` lists what they hold"

    def check(self, function: Callable[[dict[str, Any]], Problems], values: dict[str, Any]) -> None:
        """Adds what a function of torchft/checks.py finds, with the place where the option was set."""
        for key, message in function(values):
            self.problems.append(Problem(self.places.get(key.partition("[")[0], ""), key, message))

    def raise_problems(self) -> None:
        if not self.problems:
            return
        lines = [f"{place}: {show_key(key)} {message}".removeprefix(": ") for place, key, message in self.problems]
        more = len(lines) - MAX_PROBLEMS
        lines = lines[:MAX_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
        head = f"{len(self.problems)} problems in the options:\n  " if len(lines) > 1 else ""
        raise ConfigError(head + "\n  ".join(lines))
