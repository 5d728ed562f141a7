"""The parser of configs and overrides: what it accepts, `--help`, and the files that a config names (D3)."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from some_config import NAMES, NEEDED, Config, read

from torchft.config import ASSETS, SourceConfig, resolve_path
from torchft.errors import ConfigError, UserError
from torchft.names import RECIPES, configs_for, recipe_names
from torchft.options import help_text
from torchft.parse import flatten, nest, parse, split_arguments


def test_file_then_overrides_on_top_of_the_defaults(tmp_path):
    yaml = "model: {path: m}\ndata:\n  train: a.jsonl\noptim:\n  lr: 3e-4\n  warmup_steps: 5\n"
    cfg = read(yaml, tmp_path, "optim.lr=1e-3", "beta=0.3", "lora.target_modules=[q_proj, v_proj]")
    assert (cfg.optim.lr, cfg.optim.warmup_steps, cfg.optim.eps) == (1e-3, 5, 1e-8)
    assert (cfg.beta, cfg.lora.target_modules) == (0.3, ["q_proj", "v_proj"])
    assert isinstance(cfg, Config) and isinstance(cfg.data.train[0], SourceConfig)


def test_what_is_not_given_is_the_default(tmp_path):
    given = {"model.path": "m", "data.train": [SourceConfig(path="a.jsonl")]}
    assert flatten(read("", tmp_path, *NEEDED)) == flatten(Config()) | given


def test_a_bare_last_part_is_enough_where_it_is_unique(tmp_path):
    cfg = read("", tmp_path, *NEEDED, "resume=auto", "rank=8", "compile=off", "max_steps=3")
    assert (cfg.run.resume, cfg.lora.rank, cfg.model.compile, cfg.run.max_steps) == ("auto", 8, "off", 3)


@pytest.mark.parametrize(
    "value, paths",
    [
        ("rows.jsonl", ["rows.jsonl"]),
        ("[a.jsonl, b.csv]", ["a.jsonl", "b.csv"]),
        ("{path: a.jsonl, weight: 2}", ["a.jsonl"]),
        ("[{path: a.jsonl}, org/name]", ["a.jsonl", "org/name"]),
    ],
)
def test_sources_as_text_list_or_mappings_in_file_and_override(value, paths, tmp_path):
    in_file = read(f"data: {{train: {value}}}\nmodel: {{path: m}}", tmp_path)
    on_line = read("model: {path: m}", tmp_path, f"data.train={value}")
    assert [source.path for source in in_file.data.train] == paths
    assert in_file == on_line


@pytest.mark.parametrize("form", ["data.train[1].format=text", "data.train.1.format=text"])
def test_one_field_of_a_source(form, tmp_path):
    cfg = read("model: {path: m}\ndata: {train: [a.jsonl, {path: b.jsonl, weight: 2}]}", tmp_path, form)
    assert cfg.data.train == [SourceConfig("a.jsonl"), SourceConfig("b.jsonl", weight=2.0, format="text")]
    cfg = read("model: {path: m}", tmp_path, "data.train=a.jsonl", "data.train.0.columns={text: body}")
    assert cfg.data.train == [SourceConfig("a.jsonl", columns={"text": "body"})]


def test_text_options_get_the_text_as_it_was_written(tmp_path):
    cfg = read("model: {path: 007, compile: on}\ndata: {train: a.jsonl}\nrun: {out: 1e3}", tmp_path, "resume=no")
    assert (cfg.model.path, cfg.model.compile, cfg.run.out, cfg.run.resume) == ("007", "on", "1e3", "no")
    cfg = read("", tmp_path, *NEEDED, "run.out=a: [b", "data.chat_template=")
    assert (cfg.run.out, cfg.data.chat_template) == ("a: [b", "")


def test_numbers_as_yaml_1_2_has_them(tmp_path):
    cfg = read("", tmp_path, *NEEDED, "optim.lr=2e-4", "lora.alpha=8", "optim.weight_decay=.1", "optim.betas=[0, 0.95]")
    assert (cfg.optim.lr, cfg.lora.alpha, cfg.optim.weight_decay, cfg.optim.betas) == (2e-4, 8.0, 0.1, [0.0, 0.95])
    assert isinstance(cfg.lora.alpha, float)


def test_an_empty_group_is_like_none(tmp_path):
    assert read("lora:\nrun:\n  # all commented out\n", tmp_path, *NEEDED) == read("", tmp_path, *NEEDED)


def test_nest_is_the_inverse_of_flatten():
    values = flatten(Config())
    assert flatten(Config(**{k: v for k, v in nest({"beta": 0.5}).items()})) == values | {"beta": 0.5}
    assert nest(values)["optim"]["lr"] == values["optim.lr"]


def test_split_arguments():
    assert split_arguments(["--config", "a", "x=1"]) == ("a", ["x=1"])
    assert split_arguments(["x=--y", "--config=a=b"]) == ("a=b", ["x=--y"])
    assert split_arguments([]) == (None, [])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--config"], "needs a name"),
        (["--config", "a", "--config", "b"], "given twice"),
        (["my.yaml"], "write --config my.yaml"),
        (["tiny/lora"], "write --config tiny/lora"),
        (["resume"], "write key=value"),
        (["--nproc_per_node", "2"], "before the recipe"),
        (["--lora.rank=8"], "key=value"),
    ],
)
def test_other_arguments_are_refused(argv, words):
    with pytest.raises(ConfigError, match=words):
        split_arguments(argv)


def test_help_lists_every_option_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as left:
        parse(Config, ["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    for name in NAMES:
        assert f"  {name}=" in text
    assert re.search(r"  optim\.max_grad_norm=1\.0 +global norm; 0 = no clipping", text)
    assert re.search(r"  beta=0\.1 +of a loss of its own", text)
    assert re.search(r"  lora\.target_modules=\[all-linear\] +leaf names", text)
    assert "example: tune run" in text and "  weight=1.0 " in text


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_example_in_a_recipes_help_is_one_of_its_configs(recipe):
    config_class = importlib.import_module(f"torchft.recipes.{recipe}").Config
    example = re.search(rf"example: tune run {recipe} --config (\S+)", help_text(config_class, str(RECIPES / f"{recipe}.py")))
    assert example[1] in configs_for(recipe)


def test_parse_of_a_given_command_line_leaves_the_process_alone(tmp_path):
    hook = sys.excepthook
    with pytest.raises(ConfigError):
        parse(Config, ["lora.rnak=1"])
    assert sys.excepthook is hook


def test_paths_must_exist_and_each_missing_one_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("a.jsonl").write_text("{}")
    wanted = ["model.path=Qwen/Qwen3-0.6B", "data.train=[a.jsonl, b.jsonl, org/hub-name]", "data.valid=c.csv"]
    with pytest.raises(ConfigError) as caught:
        parse(Config, [*wanted, "lora.adapter=empty", "data.chat_template=t.jinja"])
    message = str(caught.value)
    assert "model.path is 'Qwen/Qwen3-0.6B', which does not exist" in message
    assert "get it with `tune download Qwen/Qwen3-0.6B`" in message
    assert "data.train[1].path is 'b.jsonl', which does not exist" in message
    assert "data.valid[0].path is 'c.csv'" in message
    assert "lora.adapter is 'empty', a directory without adapter_config.json" in message
    assert "data.chat_template is 't.jinja', which does not exist" in message
    assert message.count("which does not exist") == 4 and message.startswith("5 problems")


@pytest.mark.parametrize("value", ["yes", "true", "", "nowhere/step_000005", "a.jsonl", "x\0", "x" * 5000])
def test_what_resume_cannot_be_is_refused_with_the_other_options(value, tmp_path, monkeypatch):
    """And not after all of them were printed."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("{}")
    Path("step_000005").mkdir()
    wanted = ["model.path=builtin:tiny_llama", "data.train=a.jsonl"]
    with pytest.raises(ConfigError, match=r"^command line: run\.resume is .*, and there is no such directory .*; write never, auto \(") as caught:
        parse(Config, [*wanted, f"run.resume={value}"])
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    for value in ("never", "auto", "step_000005", str(tmp_path / "step_000005")):
        assert parse(Config, [*wanted, f"run.resume={value}"]).run.resume == value


def test_a_run_cannot_start_from_what_it_would_move_aside(tmp_path, monkeypatch):
    """Else it fails when it has been trained, and looks for the base's files to write the result."""
    monkeypatch.chdir(tmp_path)
    for folder in ("out/model", "out/adapter", "out/earlier_1/model"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
        (Path(folder) / "adapter_config.json").write_text("{}")
    Path("a.jsonl").write_text("{}")
    Path("link").symlink_to("out")
    for given in ("model.path=out/model", "lora.adapter=out/adapter", "model.path=link/../out/model", "model.path=link/model"):
        others = [] if "model.path" in given else ["model.path=builtin:tiny_llama"]
        with pytest.raises(ConfigError, match=re.escape(given.split("=")[0]) + ".* the result of an earlier run in run.out"):
            parse(Config, [given, *others, "data.train=a.jsonl"])
        parse(Config, [given, *others, "data.train=a.jsonl", "run.out=other"])
    parse(Config, ["model.path=out/earlier_1/model", "data.train=a.jsonl"])
    Path("circle").symlink_to("circle")  # which is no matter of the parser's, nor a traceback
    parse(Config, ["model.path=builtin:tiny_llama", "data.train=a.jsonl", "run.out=circle"])


def test_paths_that_no_system_takes_are_problems_too(tmp_path):
    for path in (
        "a\0b.jsonl",
        "x" * 5000 + ".jsonl",
        "~nobody-of-that-name/a.jsonl",
        "builtin:../../../etc/passwd.jsonl",
    ):
        with pytest.raises(ConfigError, match=r"data\.train\[0\]\.path is "):
            parse(Config, ["model.path=builtin:tiny_llama", f"data.train={path}"])


def test_resolve_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("~/x") == tmp_path / "x"
    assert resolve_path("a/b") == Path("a/b")
    assert resolve_path("builtin:tiny_llama") == ASSETS / "tiny_llama"
    for bad in ("builtin:", "builtin:none", "builtin:../config.py", "builtin:/etc/passwd"):
        with pytest.raises(UserError, match="builtin:tiny_llama"):
            resolve_path(bad)
