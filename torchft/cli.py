"""The command `tune`: its subcommands and their options. What they do stands in the modules that they import.

`tune ls`, `cp`, `cat` and every `--help` answer without importing torch, which takes seconds.
"""

import argparse
import ast
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torchft.checks import show
from torchft.errors import ConfigError, UserError
from torchft.names import METHODS, config_names, configs_for, find_recipe, find_recipe_or_config, recipe_names

Commands = Any  # argparse's action for subcommands has no public name

RUN_HELP = """\
usage: tune run [torchrun's options] RECIPE [--config NAME|FILE] [key=value ...]

Run a recipe: a shipped one by name, or a .py file, such as a copy made with `tune cp`.

  --config NAME|FILE   a shipped config (tune ls) or a .yaml file
  key=value            an option that overrides the file, dotted: optim.lr=1e-4
  --help after RECIPE  lists all of the recipe's options

torchrun's options stand before the recipe and start several processes: --nproc_per_node N, --nnodes N, ...
Without any the recipe runs as one process. If a rank fails, the first one's traceback is printed last.

examples:
  tune run lora_single_device --config tiny/lora
  tune run ./my_recipe.py --config ./my_config.yaml optim.lr=1e-4 resume=auto
  tune run --nproc_per_node 2 ./my_recipe.py --config ./my_config.yaml
"""


def main(argv: list[str] | None = None) -> None:
    """`tune` and `python -m torchft`. A user's mistake is printed without traceback; exit code 2 for configs, or 1."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        _note_other_owner()
        if argv[:1] == ["run"]:
            _run(argv[1:])
        if not argv:
            _parser().print_help(sys.stderr)
            sys.exit(2)
        args = parse_arguments(argv)
        args.function(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `tune ls | head`: what is still buffered goes nowhere, without a second error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The parsed command line; key=value may stand before and after the options of the command that takes it."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = vars(args).get("overrides")
    unknown = rest if overrides is None else [argument for argument in rest if argument.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = [*overrides, *rest]
    return args


def _run(argv: list[str]) -> NoReturn:
    # Not argparse: torchrun's parser reads what stands before the recipe, the recipe what stands after it.
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(RUN_HELP, end="")
        sys.exit(0 if argv else 2)
    from torchft.launch import run

    run(argv)


def _versions() -> str:
    """One line for a report of a bug; without importing any of it."""
    found = []
    for name in ("torchft-recipes", "torch", "torchao", "triton"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed; Triton is not everywhere
            found.append(f"{name} not installed")
    return ", ".join(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tune",
        description="Fine-tune open-weight language models with plain PyTorch recipes that you copy, read and own.",
        epilog="example: tune run lora_single_device --config tiny/lora\n`tune COMMAND --help` shows its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_versions(), help="of this and of what it computes with")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    _command(commands, "ls", _ls, "list recipes and the configs that go with them", "tune ls")
    _file_commands(commands)
    commands.add_parser("run", help="run a recipe on one or many processes", add_help=False)  # read by _run
    _download_command(commands)
    _dry_run_commands(commands)
    _merge_command(commands)
    _generate_command(commands)
    return parser


def _file_commands(commands: Commands) -> None:
    example = "tune cp llama3_1/8B_lora ./my_config.yaml"
    cp = _command(commands, "cp", _cp, "copy a recipe or a config, to edit it", example)
    cp.add_argument("name", help="a recipe or a config (tune ls)")
    cp.add_argument("destination", help="the new file's exact name, or a directory")
    cp.add_argument("--force", action="store_true", help="overwrite a file that is there")
    cat = _command(commands, "cat", _cat, "print a recipe or a config", "tune cat llama3_1/8B_lora")
    cat.add_argument("name", help="a recipe or a config (tune ls)")


def _download_command(commands: Commands) -> None:
    summary = "fetch a model from the Hugging Face hub into <org>/<name>"
    download = _command(commands, "download", _download, summary, "tune download Qwen/Qwen3-0.6B")
    download.add_argument("repo_id", metavar="ORG/NAME")
    download.add_argument("--output-dir", default=".", help="where <org>/<name> is made (default: here)")
    download.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    download.add_argument("--ignore-patterns", nargs="*", default=[], metavar="GLOB", help="more files to leave out")
    download.add_argument("--hf-token", help=argparse.SUPPRESS)  # torchtune's; refused with the reason


def _dry_run_commands(commands: Commands) -> None:
    summary = "check config, data and model shapes without loading weights"
    validate = _command(commands, "validate", _validate, summary, "tune validate tiny/lora optim.lr=1e-3")
    summary = "report what becomes of a config's data, with coloured examples"
    data = _command(commands, "data", _data, summary, "tune data tiny/lora --examples 2")
    data.add_argument("--examples", type=int, default=3, metavar="N", help="training examples to print (default: 3)")
    summary = "see that a step of a config does not depend on how it is cut, packed, fused or divided on this machine"
    check = _command(commands, "check", _check, summary, "tune check tiny/lora --rows 4")
    check.add_argument("--rows", type=int, default=4, metavar="N", help="of the data's first step (default: 4)")
    check.add_argument("--layers", type=int, default=0, metavar="N", help="of the model, with random weights (default: all that fit)")
    for parser in (validate, data, check):
        parser.add_argument("--recipe", default="", help="that the config is for (default: what its header or name says)")
        parser.add_argument("config", help="a shipped config (tune ls) or a .yaml file")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that override the file")


def _merge_command(commands: Commands) -> None:
    example = "tune merge Qwen/Qwen3-0.6B out/adapter ./Qwen3-0.6B-mine"
    summary = "write base model and adapter as one model directory, verified"
    merge = _command(commands, "merge", _merge, summary, example)
    merge.add_argument("base", metavar="BASE", help="the model directory that the adapter was trained on")
    merge.add_argument("adapter", metavar="ADAPTER", help="a PEFT adapter directory")
    merge.add_argument("out", metavar="OUT", help="the directory to write")
    dtypes = ["bfloat16", "float16", "float32"]
    merge.add_argument("--dtype", choices=dtypes, help="of the written weights (default: the base's)")
    merge.add_argument("--nf4-base", action="store_true", help="merge into the 4-bit weights that QLoRA trained on")


def _generate_command(commands: Commands) -> None:
    example = 'tune generate Qwen/Qwen3-0.6B --adapter out/adapter --prompt "Who are you?"'
    summary = "answer a prompt, or chat, with a model and an adapter"
    generate = _command(commands, "generate", _generate, summary, example)
    add = generate.add_argument
    add("model", metavar="MODEL", help="a model directory, or builtin:tiny_llama")
    add("--adapter", default="", help="a PEFT adapter directory")
    add("--prompt", help="one user message; without it a chat starts (/reset, /exit)")
    add("--system", default="", help="a system message before it")
    add("--chat-template", default="", help="chatml, alpaca or a .jinja file (default: the tokenizer's own)")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (default: bfloat16)")
    choices = ["none", "nf4", "nf4_int8_head"]
    add("--quantize", choices=choices, default="none", help="the linears in 4 bits, lm_head in 8 (default: none)")
    add("--max-new-tokens", type=int, default=256, help="at most (default: 256)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens up to this share (default: 1)")
    add("--seed", type=int, default=0, help="of the drawing (default: 0)")


def _command(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], None], summary: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(function=function)
    return parser


def _ls(args: argparse.Namespace) -> None:
    by_configs: dict[tuple[str, ...], list[str]] = {}  # recipes that take the same ones stand together
    for recipe in sorted(recipe_names(), key=lambda name: list(METHODS).index(name.split("_")[0])):  # what most begin with
        by_configs.setdefault(tuple(configs_for(recipe)), []).append(recipe)
    for configs, recipes in by_configs.items():
        for recipe in reversed(recipes):  # the one for a single device first
            doc = ast.get_docstring(ast.parse(find_recipe(recipe).read_text(encoding="utf-8"))) or ""
            print(recipe)
            print(textwrap.fill(doc.partition("\n")[0], 118, initial_indent="  ", subsequent_indent="  "))
        _print_families(configs)
    rest = [name for name in config_names() if not any(name in configs for configs in by_configs)]
    if rest:
        print("configs for recipes that are not here")
        _print_families(rest)


def _print_families(names: Sequence[str]) -> None:
    """Whole names, one family per paragraph: each can be copied into a command as it stands."""
    for family in dict.fromkeys(name.partition("/")[0] for name in names):
        mine = [name for name in names if name.startswith(f"{family}/")]
        print(textwrap.fill("  ".join(mine), 118, initial_indent="    ", subsequent_indent="    "))


def _cp(args: argparse.Namespace) -> None:
    source, target = find_recipe_or_config(args.name), Path(args.destination)
    if target.is_dir():
        target /= source.name
    kind, ending, wrong = ("recipe", ".py", (".yaml", ".yml")) if source.suffix == ".py" else ("config", ".yaml", (".py",))
    if target.suffix in wrong:
        raise UserError(f"{args.name} is a {kind}; name it {target.with_suffix(ending)}")
    if not target.parent.is_dir():
        raise UserError(f"{target} cannot be written: there is no directory {target.parent}; make it first")
    if target.exists() and target.samefile(source):
        raise UserError(f"{target} is the file to be copied; name another one")
    try:
        # "x" refuses a file that is there, also one that came into being since anyone looked.
        with open(source, "rb") as read, open(target, "wb" if args.force else "xb") as write:
            shutil.copyfileobj(read, write)
    except FileExistsError:
        raise UserError(f"{target} is there already; choose another name, or overwrite it with --force") from None
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    print(f"{args.name} -> {target}")


def _cat(args: argparse.Namespace) -> None:
    print(find_recipe_or_config(args.name).read_text(encoding="utf-8"), end="")


def _download(args: argparse.Namespace) -> None:
    if args.hf_token is not None:
        raise UserError("--hf-token is refused, other users can read command lines; set HF_TOKEN in the environment")
    from torchft.download import download

    target = download(args.repo_id, args.output_dir, args.revision, tuple(args.ignore_patterns))
    print(f"{args.repo_id} -> {target}\nuse it with model.path={target}")


def _validate(args: argparse.Namespace) -> None:
    from torchft.dry_run import validate

    validate(args.config, args.overrides, args.recipe)


def _data(args: argparse.Namespace) -> None:
    if args.examples < 0:
        raise UserError(f"--examples is {args.examples}; write 0 or more")
    from torchft.dry_run import show_data

    show_data(args.config, args.overrides, args.examples, args.recipe)


def _check(args: argparse.Namespace) -> None:
    if args.rows < 1 or args.layers < 0:
        raise UserError(f"--rows is {args.rows} and --layers {args.layers}; write 1 or more rows, and 0 (all that fit) or more layers")
    from torchft.tune_check import check

    if not check(args.config, args.overrides, args.rows, args.layers, args.recipe):
        sys.exit(1)


def _merge(args: argparse.Namespace) -> None:
    base = _given_directory("BASE", args.base, "config.json")
    adapter = _given_directory("ADAPTER", args.adapter, "adapter_config.json")
    import torch

    from torchft.merge import merge
    from torchft.peft_config import other_base

    if warning := other_base(adapter, base):
        print(warning, file=sys.stderr, flush=True)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    print(merge(base, adapter, Path(args.out).expanduser(), dtype, nf4_base=args.nf4_base))


def _generate(args: argparse.Namespace) -> None:
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty; leave it out to chat")
    for option, value, accepted, right in (
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "1 or more"),
        ("--temperature", args.temperature, 0.0 <= args.temperature < float("inf"), "0 (the likeliest token) or a positive number"),
        ("--top-p", args.top_p, 0.0 < args.top_p <= 1.0, "a number above 0 and at most 1 (no cut)"),
        ("--seed", args.seed, -(2**63) <= args.seed < 2**64, "a number of 64 bits"),
    ):
        if not accepted:
            raise UserError(f"{option} is {value}; write {right}")
    _given_directory("MODEL", args.model, "config.json")
    if args.adapter:
        _given_directory("--adapter", args.adapter, "adapter_config.json")
    from torchft.chat import main_generate

    main_generate(args)


def _given_directory(argument: str, text: str, inside: str) -> Path:
    """The directory that an argument names. Raises UserError naming the argument if it holds no file `inside`."""
    from torchft.config import resolve_path

    try:
        path = resolve_path(text)
        if (path / inside).is_file():
            return path
        is_directory = path.is_dir()
    except (RuntimeError, OSError) as error:  # no home directory, a name that is too long
        raise UserError(f"{argument} is {show(text)}: {error}") from None
    if is_directory and (path / "adapter_config.json").is_file():
        command = f"tune generate {_base_of(path)} --adapter {shlex.quote(text)}"
        if argument == "BASE":
            command = f"tune merge {_base_of(path)} {shlex.quote(text)} OUT"
        raise UserError(f"{argument} is {show(text)}, which is an adapter and no model: {command}")
    if is_directory:
        raise UserError(f"{argument} is {show(text)}, a directory without {inside}")
    is_hub_name = inside == "config.json" and re.fullmatch(r"\w[\w.-]*/[\w.-]+", text)
    fix = f"; get it with `tune download {text}`" if is_hub_name else ""
    raise UserError(f"{argument} is {show(text)}, which is no directory (looked in {Path.cwd()}){fix}")


def _base_of(adapter: Path) -> str:
    """The base model that an adapter names, as it can be typed; MODEL where it names none."""
    try:
        base = json.loads((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return "MODEL"
    return shlex.quote(base) if isinstance(base, str) and base and base.isprintable() else "MODEL"


def _note_other_owner() -> None:
    """One line where another project's package has, or shares, the name of the command or of the import."""
    for other, name in (("torchtune", "the command `tune`"), ("torchft", "the import name `torchft`")):
        try:
            importlib.metadata.distribution(other)
        except importlib.metadata.PackageNotFoundError:
            continue
        print(f"note: {other} is installed here and owns {name} too; use an environment without it", file=sys.stderr)
