"""The options of a recipe as a list, and the `--help` text made from it: names, defaults, fields' comments."""

import ast
import dataclasses
import inspect
import io
import sys
import textwrap
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from torchft.config import SourceConfig


@dataclass(frozen=True)
class Option:
    """One option: its dotted name, type hint and default value, and the dataclass that declares it."""

    name: str
    hint: Any
    default: Any
    owner: type


def list_options(config_class: type) -> list[Option]:
    """Every option of a recipe's Config, groups opened, in the order of the fields."""
    options: list[Option] = []
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            inner = list_options(hint)
            options += [dataclasses.replace(option, name=f"{field.name}.{option.name}") for option in inner]
        else:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            options.append(Option(field.name, hint, default, config_class))
    return options


def group_names(config_class: type) -> dict[str, type]:
    """The groups of a recipe's Config: model, data, ..., with their dataclasses."""
    return {name: hint for name, hint in get_type_hints(config_class).items() if dataclasses.is_dataclass(hint)}


def field_comments(config_class: type) -> dict[str, str]:
    """Field name -> the comment at the end of its line in the source."""
    try:
        source = textwrap.dedent(inspect.getsource(config_class))
    except (OSError, TypeError):  # a class typed into an interactive session has no source
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: by_line.get(node.end_lineno, "") for node in fields}


def help_text(config_class: type, script: str) -> str:
    """What `--help` prints: the recipe's own first line, usage, an example, and every option. `script`: sys.argv[0]."""
    path = Path(script)
    name = path.stem if path.resolve().parent == Path(__file__).resolve().parent.parent / "recipes" else script
    about = (sys.modules[config_class.__module__].__doc__ or "").strip().partition("\n")[0]
    lines = [about, ""] if about else []
    lines += [f"usage:   tune run {name} [--config NAME|FILE] [key=value ...]"]
    groups = group_names(config_class)
    method = next((group for group in ("dpo", "kto", "reward") if group in groups), "lora" if "lora" in groups else "full")
    lines += [f"example: tune run {name} --config tiny/{method} optim.lr=1e-3 resume=auto", ""]
    lines += ["Options and their defaults. In a YAML file the groups are nested; as key=value they are dotted, and the"]
    lines += ["last part alone is enough where only one option ends in it. The file comes first, then key=value."]
    options = list_options(config_class)
    for group, kind in groups.items():
        mine = [option for option in options if option.name.startswith(f"{group}.")]
        lines += _section(f"{group}: {inspect.getdoc(kind)}", mine)
    lines += _section("Each entry of data.train and data.valid: a path, or a mapping with", list_options(SourceConfig))
    lines += _section("This recipe's own:", [option for option in options if "." not in option.name])
    return "\n".join(lines)


def _section(title: str, options: list[Option]) -> list[str]:
    if not options:
        return []
    comments = field_comments(options[0].owner)
    lines = [_option_lines(option, comments.get(option.name.rpartition(".")[2], "")) for option in options]
    return ["", title, *(line for group in lines for line in group)]


def _option_lines(option: Option, comment: str) -> list[str]:
    """`  optim.lr=0.0002   comment`, the comment on a line of its own where the two do not fit in 120 columns."""
    default = str(option.default).lower() if isinstance(option.default, bool) else str(option.default).replace("'", "")
    left = f"  {option.name}={default}"
    if not comment:
        return [left]
    if len(left) < 40 and len(comment) < 80:
        return [f"{left:<40}{comment}"]
    return [left, *textwrap.wrap(comment, 112, initial_indent=" " * 8, subsequent_indent=" " * 8)]
