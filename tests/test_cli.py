"""The command `tune`: ls, cp, cat, names that torchtune had, help and speed (D2, PITFALLS U2)."""

import importlib.metadata
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from torchft import cli
from torchft.data.tokenizer import load_tokenizer
from torchft.hf_checkpoint import open_checkpoint
from torchft.models import read_config
from torchft.names import (
    CONFIGS,
    RECIPES,
    config_names,
    configs_for,
    find_config,
    find_recipe,
    nearest_option,
    recipe_names,
)
from torchft.peft_config import read_adapter

COMMANDS = ["ls", "cp", "cat", "run", "download", "validate", "data", "merge", "generate"]


def tune(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command, run in this process."""
    try:
        cli.main(list(argv))
        code = 0
    except SystemExit as left:
        code = left.code or 0
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_ls_lists_every_recipe_and_every_config_by_its_whole_name(capsys):
    code, out, _ = tune(capsys, "ls")
    words = out.split()
    assert code == 0
    assert "lora_single_device" in words and "tiny/lora" in words and "llama3_1/8B_qlora" in words
    for name in [*recipe_names(), *config_names()]:
        assert words.count(name) == 1, name
    assert max(map(len, out.splitlines())) <= 120


def test_configs_come_by_size_and_go_with_their_recipes():
    names = config_names()
    assert names.index("qwen2_5/7B_lora") < names.index("qwen2_5/14B_lora") < names.index("qwen2_5/72B_lora")
    assert {"tiny/lora", "tiny/qlora", "mistral/small_24B_qlora"} <= set(configs_for("lora_single_device"))
    assert configs_for("lora_distributed") == configs_for("lora_single_device")
    assert configs_for("dpo_distributed") == [name for name in names if name.endswith("dpo")]


def test_versions_are_told_without_torch(capsys):
    code, out, err = tune(capsys, "--version")
    versions = dict(part.split(" ", 1) for part in out.strip().split(", "))
    assert (code, err, [*versions]) == (0, "", ["torchft-recipes", "torch", "torchao", "triton"])
    assert versions["torch"] == importlib.metadata.version("torch")


def test_cat_prints_the_file(capsys):
    assert tune(capsys, "cat", "tiny/lora")[1] == (CONFIGS / "tiny/lora.yaml").read_text()
    assert tune(capsys, "cat", "lora_single_device")[1] == (RECIPES / "lora_single_device.py").read_text()


def test_cp_never_overwrites_without_force(capsys, tmp_path):
    target = tmp_path / "mine.yaml"
    assert tune(capsys, "cp", "tiny/lora", str(target)) == (0, f"tiny/lora -> {target}\n", "")
    assert target.read_text() == (CONFIGS / "tiny/lora.yaml").read_text()
    target.write_text("precious")
    code, _, err = tune(capsys, "cp", "tiny/qlora", str(target))
    assert code == 1 and "is there already" in err and "--force" in err
    assert target.read_text() == "precious"
    assert tune(capsys, "cp", "tiny/qlora", str(target), "--force")[0] == 0
    assert target.read_text() == (CONFIGS / "tiny/qlora.yaml").read_text()


def test_cp_takes_the_exact_name_or_a_directory(capsys, tmp_path):
    for name, target, made in (
        ("tiny/lora", "a.b", "a.b"),
        ("tiny/lora", ".", "lora.yaml"),
        ("lora_single_device", ".", "lora_single_device.py"),
        ("lora_finetune_single_device", "x", "x"),
    ):
        assert tune(capsys, "cp", name, str(tmp_path / target))[0] == 0
        assert (tmp_path / made).is_file()


def test_cp_refuses_the_ending_of_the_other_kind(capsys, tmp_path):
    """tune run would then say that a config is none, or run it as Python."""
    other = tmp_path.with_name("other")
    other.mkdir()
    (other / "own").touch()
    for name, given, right, kind in (
        ("lora_single_device", "x.yaml", "x.py", "a recipe"),
        ("lora_finetune_single_device", "x.yml", "x.py", "a recipe"),
        ("tiny/lora", "x.py", "x.yaml", "a config"),
        (f"{other}/own", "x.py", "x.yaml", "a config"),
    ):
        said = f"error: {name} is {kind}; name it {tmp_path / right}\n"
        assert tune(capsys, "cp", name, str(tmp_path / given), "--force") == (1, "", said)
    assert list(tmp_path.iterdir()) == []
    assert tune(capsys, "cp", "tiny/lora", str(tmp_path / "x.yml"))[0] == 0


def test_cp_says_what_is_wrong(capsys, tmp_path):
    code, _, err = tune(capsys, "cp", "tiny/lora", str(tmp_path / "no" / "where.yaml"))
    assert code == 1 and f"where.yaml cannot be written: there is no directory {tmp_path / 'no'}; make it" in err
    source = tmp_path / "own.yaml"
    source.write_text("own")
    code, _, err = tune(capsys, "cp", str(source), str(source), "--force")
    assert code == 1 and "is the file to be copied" in err and source.read_text() == "own"


def test_cp_and_cat_of_a_name_that_is_neither_recipe_nor_config(capsys, tmp_path):
    """The nearest of both kinds, as nothing tells which was meant."""
    for argv in (("cat", "8B_lora"), ("cp", "8B_lora", str(tmp_path / "x.yaml"))):
        code, out, err = tune(capsys, *argv)
        assert code == 1 and out == ""
        assert err.startswith("error: neither a recipe nor a config is called '8B_lora'; did you mean ")
        assert "/8B_lora" in err
    assert "did you mean lora_single_device?\n" in tune(capsys, "cat", "lora_single_devise")[2]
    far = "error: neither a recipe nor a config is called 'nosuch'; `tune ls` lists them\n"
    assert tune(capsys, "cp", "nosuch", str(tmp_path))[2] == far
    assert "did you mean tiny/lora?" in tune(capsys, "cat", "tiny/lore")[2]
    assert "there is no recipe file ./x.py" in tune(capsys, "cat", "./x.py")[2]


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "old, ours",
    [
        ("llama3_1/8B_lora", "llama3_1/8B_lora"),
        ("llama3_1/8B_lora_single_device", "llama3_1/8B_lora"),
        ("llama3_1/8B_qlora_single_device", "llama3_1/8B_qlora"),
        ("llama3_2/1B_qlora_single_device", "llama3_2/1B_qlora"),
        ("llama2/13B_qlora_single_device", "llama2/13B_qlora"),
        ("qwen2_5/0_5B_lora_single_device", "qwen2_5/0.5B_lora"),
        ("qwen2_5/1.5B_lora_single_device", "qwen2_5/1.5B_lora"),
        ("qwen3/0.6B_lora", "qwen3/0.6B_lora"),
        ("mistral/7B_lora_single_device", "mistral/7B_lora"),
        ("llama3_1/8B_lora_dpo_single_device", "llama3_1/8B_dpo"),
        ("llama3_1/8B_full_dpo_distributed", "llama3_1/8B_full_dpo"),
    ],
)
def test_torchtunes_config_names(old, ours):
    assert find_config(old) == CONFIGS / f"{ours}.yaml"


def test_torchtunes_recipe_names():
    assert find_recipe("lora_finetune_single_device") == RECIPES / "lora_single_device.py"
    for name, target in (
        ("lora_finetune_distributed", "lora_distributed"),
        ("full_finetune_single_device", "full_finetune_distributed"),
        ("lora_dpo_single_device", "dpo_distributed"),
        ("lora_dpo_distributed", "dpo_distributed"),
    ):
        assert find_recipe(name) == RECIPES / f"{target}.py"
    with pytest.raises(ValueError, match=r"^full_dpo_distributed is torchtune's name for dpo_distributed with lora.rank=0"):
        find_recipe("full_dpo_distributed")


def test_unknown_names_get_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").touch()
    Path("rows.jsonl").touch()
    for name, words in (
        ("llama3_1/8B_lore", "did you mean llama3_1/8B_lora?"),
        ("llama3_1/8B_lora.yaml", "did you mean the shipped config llama3_1/8B_lora?"),
        ("llama3_1/8B_lora_single_devise", "did you mean llama3_1/8B_"),
        ("nonsense", "tune ls"),
        ("mine.yaml", f"there is no config file mine.yaml (looked in {tmp_path})"),
        ("lora_single_device", "lora_single_device is a recipe, no config; give a .yaml file or a config's name"),
        ("rows.jsonl", "rows.jsonl is no YAML config; give a .yaml file or a config's name from `tune ls`"),
        ("mine.py", "mine.py is no YAML config; "),
    ):
        with pytest.raises(ValueError) as caught:
            find_config(name)
        assert words in str(caught.value), name
        assert "mine.yaml" not in name or str(caught.value) == words
    for name, words in (
        ("tiny/lora", "tiny/lora is a config: tune run lora_single_device --config tiny/lora"),
        ("mine.yaml", "mine.yaml is a config: tune run RECIPE --config mine.yaml (`tune ls` lists the recipes)"),
    ):
        with pytest.raises(ValueError) as caught:
            find_recipe(name)
        assert str(caught.value) == words
    with pytest.raises(ValueError, match=r"nor the path of a \.py file; did you mean lora_single_device\?$"):
        find_recipe("lora_single")
    assert nearest_option("lora_rank", ["lora.rank", "optim.lr"]) == "lora.rank"


def test_a_file_wins_where_no_config_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("")
    Path("tiny").mkdir()
    Path("tiny/lora").write_text("")
    assert find_config("mine") == Path("mine")
    assert find_config("tiny/lora") == CONFIGS / "tiny/lora.yaml"
    assert find_config("./tiny/lora") == Path("./tiny/lora")


# ------------------------------------------------------------------------------------------- paths on the command line


@pytest.mark.parametrize("after", [["--examples", "1", "seed=1", "lr=2"], ["seed=1", "--examples", "1", "lr=2"]])
def test_options_of_the_config_may_stand_after_those_of_the_command(after):
    args = cli.parse_arguments(["data", "tiny/lora", *after])
    assert (args.config, args.examples, args.overrides) == ("tiny/lora", 1, ["seed=1", "lr=2"])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["data", "tiny/lora", "--examples", "-1"], "--examples is -1; write 0 or more"),
        (["generate", "m", "--max-new-tokens", "0"], "--max-new-tokens is 0; write 1 or more"),
        (["generate", "m", "--prompt", ""], "--prompt is empty; leave it out to chat"),
        (["generate", "m", "--prompt", " "], "--prompt is empty; leave it out to chat"),
    ],
)
def test_values_that_ask_for_nothing_are_refused(argv, words, capsys):
    assert tune(capsys, *argv) == (1, "", f"error: {words}\n")


def test_a_chat_is_what_no_prompt_asks_for():
    assert cli.parse_arguments(["generate", "m"]).prompt is None
    assert cli.parse_arguments(["data", "tiny/lora", "--examples", "0"]).examples == 0


def test_what_no_command_knows_is_refused(capsys):
    for argv in (["data", "tiny/lora", "--exampels", "1"], ["ls", "seed=1"], ["cat", "tiny/lora", "--force"]):
        code, _, err = tune(capsys, *argv)
        assert code == 2 and f"unrecognized arguments: {argv[-1] if argv[0] != 'data' else '--exampels'}" in err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["generate", "nope", "--prompt", "x"], "MODEL is 'nope', which is no directory (looked in "),
        (["generate", "Qwen/Qwen3-0.6B"], "; get it with `tune download Qwen/Qwen3-0.6B`\n"),
        (["generate", "empty"], "MODEL is 'empty', a directory without config.json\n"),
        (
            ["generate", "builtin:tiny_llama", "--adapter", "a/b"],
            "--adapter is 'a/b', which is no directory (looked in",
        ),
        (
            ["generate", "builtin:tiny_llama", "--adapter", "empty"],
            "--adapter is 'empty', a directory without adapter_",
        ),
        (["generate", "x" * 5000], "MODEL is 'xxx"),
        (["generate", "~no_such_user/x"], "MODEL is '~no_such_user/x': "),
        (["merge", "nope", "empty", "out"], "BASE is 'nope', which is no directory"),
        (["merge", "builtin:tiny_llama", "nope", "out"], "ADAPTER is 'nope', which is no directory"),
        (["merge", "builtin:tiny_llama", "empty", "out"], "ADAPTER is 'empty', a directory without adapter_config"),
    ],
)
def test_a_missing_path_is_told_by_the_argument_that_named_it(argv, words, capsys, tmp_path, monkeypatch):
    """Not by a config's key, which the user of a command line never wrote."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    code, _, err = tune(capsys, *argv)
    assert code == 1 and words in err
    assert "model.path" not in err and "lora.adapter" not in err


def test_an_adapter_in_place_of_a_model_is_answered_with_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = Path("my adapter")
    adapter.mkdir()
    for content, base in (
        ('{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}', "Qwen/Qwen3-0.6B"),
        ('{"base_model_name_or_path": "my base"}', "'my base'"),
        ('{"base_model_name_or_path": null}', "MODEL"),
        ('{"base_model_name_or_path": ["x"]}', "MODEL"),
        ("[]", "MODEL"),
        ("{", "MODEL"),
    ):
        (adapter / "adapter_config.json").write_text(content)
        said = "which is an adapter and no model: tune"
        assert tune(capsys, "generate", str(adapter)) == (1, "", f"error: MODEL is 'my adapter', {said} generate {base} --adapter 'my adapter'\n")
        merge = tune(capsys, "merge", str(adapter), "builtin:tiny_llama", "out")
        assert merge == (1, "", f"error: BASE is 'my adapter', {said} merge {base} 'my adapter' OUT\n")


def test_options_of_generate_are_refused_by_their_names(capsys):
    for option, value, said in (
        ("--max-new-tokens", "0", "0; write 1 or more"),
        ("--temperature", "-1", "-1.0; write 0 (the likeliest token) or a positive number"),
        ("--temperature", "nan", "nan; write 0 (the likeliest token) or a positive number"),
        ("--top-p", "2", "2.0; write a number above 0 and at most 1 (no cut)"),
        ("--top-p", "0", "0.0; write a number above 0 and at most 1 (no cut)"),
        ("--seed", str(2**64), f"{2**64}; write a number of 64 bits"),
    ):
        assert tune(capsys, "generate", "builtin:tiny_llama", option, value) == (1, "", f"error: {option} is {said}\n")


def test_messages_about_directories_name_no_config_key(tmp_path):
    """They are met from a config, from the command line and from Python alike."""
    for function in (open_checkpoint, read_adapter, load_tokenizer, read_config):
        with pytest.raises(ValueError) as caught:
            function(tmp_path / "nowhere")
        assert str(tmp_path / "nowhere") in str(caught.value), function
        assert "model.path" not in str(caught.value) and "lora.adapter" not in str(caught.value), function


# ------------------------------------------------------------------------------------------------------- help and speed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(command, capsys):
    code, out, _ = tune(capsys, command, "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 120
    if command == "run":
        assert "tune run lora_single_device --config tiny/lora" in out
        return
    example = out.strip().splitlines()[-1]
    assert example.startswith(f"example: tune {command}")
    arguments = [word.strip('"') for word in example.replace('"Who are you?"', "hello").split()[2:]]
    cli._parser().parse_args(arguments)


def test_the_help_names_every_command(capsys):
    _, out, _ = tune(capsys, "--help")
    for command in COMMANDS:
        assert f"\n    {command} " in out


def test_no_command_and_a_wrong_one(capsys):
    code, out, err = tune(capsys)
    assert (code, out) == (2, "") and "run a recipe on one or many processes" in err  # all commands, as --help lists them
    code, _, err = tune(capsys, "frobnicate")
    assert code == 2 and "choose from" in err


PROBE = """
import sys
from torchft.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "omegaconf", "huggingface_hub", "tokenizers"} & set(sys.modules)
print("heavy:", sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize("argv", [["--help"], ["ls"], ["cat", "tiny/lora"], ["run", "--help"]])
def test_quick_commands_import_nothing_heavy(argv):
    run = subprocess.run([sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, check=True)
    assert run.stderr == "heavy: []\n"


def test_a_typo_in_a_config_is_found_without_torch(tmp_path):
    (tmp_path / "c.yaml").write_text("lora: {rnak: 8}")
    run = subprocess.run([sys.executable, "-c", PROBE, "validate", tmp_path / "c.yaml"], capture_output=True, text=True)
    assert "did you mean lora.rank?" in run.stderr
    assert "'torch'" not in run.stderr


@pytest.mark.parametrize("command", ["--help", "ls"])
def test_help_and_ls_take_less_than_half_a_second(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "torchft", command], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time, not the clock's: other tests run beside this one
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_a_closed_pipe_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "torchft", "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        run.stdout.close()
        assert run.stderr.read() == b""


def test_another_owner_of_the_name_is_told(capsys, tmp_path, monkeypatch):
    info = tmp_path / "torchtune-0.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchtune\nVersion: 0.6\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    _, out, err = tune(capsys, "ls")
    assert err.count("\n") == 1 and "torchtune is installed here and owns the command `tune` too" in err
    assert "note" not in out
