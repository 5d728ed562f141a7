"""`tune validate` and `tune data` on the shipped tiny model, and what they say when something is wrong (U3)."""

import importlib
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from torchft import cli, device, dry_run, optim
from torchft.adapter import add_adapter
from torchft.config import ASSETS
from torchft.data.tokenizer import load_tokenizer
from torchft.errors import UserError
from torchft.models import build_model, model_config, read_config
from torchft.names import CONFIGS, RECIPES
from torchft.parse import flatten
from torchft.weights import load_weights

FIRST_ROWS = 40  # of the shipped data: enough to see what is done with them


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A directory with a copy of the tiny model, some of its rows, and a config that names both."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ASSETS / "tiny_llama", "model")
    for part in ("train", "valid"):
        lines = (ASSETS / "tiny_sft" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        Path(f"{part}.jsonl").write_text("".join(lines[:FIRST_ROWS]), encoding="utf-8")
    Path("c.yaml").write_text("model: {path: model}\ndata: {train: train.jsonl, valid: valid.jsonl}\nlora: {rank: 4}\n")
    return tmp_path


def test_validate_checks_everything_and_loads_no_weight(workplace, capsys):
    Path("model/model.safetensors").unlink()
    cli.main(["validate", "c.yaml"])
    out = capsys.readouterr().out
    assert out.startswith("config  ok: c.yaml, for lora_single_device\n")
    assert re.search(rf"^data    ok: {FIRST_ROWS} examples, {FIRST_ROWS} held out$", out, re.MULTILINE)
    total, trained = (
        int(n.replace(",", "")) for n in re.search(r"model   ok: ([\d,]+) .* ([\d,]+) of them", out).groups()
    )
    shape = model_config(read_config("model"))
    heads = shape.head_dim * (shape.num_attention_heads + shape.num_key_value_heads)
    attention = 4 * shape.hidden_size + 2 * heads  # inputs and outputs of q, k, v and o
    feed_forward = 3 * (shape.hidden_size + shape.intermediate_size)
    assert trained == 4 * shape.num_hidden_layers * (attention + feed_forward) < total  # rank 4
    assert "disk    ok" in out and "MiB for frozen weights" in out
    assert re.search(r" for what is trained; activations come on top$", out, re.MULTILINE)


def test_validate_warns_of_rows_longer_than_the_model_has_seen(workplace, capsys):
    limit = model_config(read_config("model")).max_position_embeddings
    cli.main(["validate", "c.yaml", f"data.max_seq_len={limit}"])
    assert "WARNING" not in capsys.readouterr().out
    cli.main(["validate", "c.yaml", f"data.max_seq_len={limit + 1}"])
    warning = f"WARNING: data.max_seq_len={limit + 1} is beyond the {limit} positions that the model was trained on"
    assert f"\n        {warning}\n" in capsys.readouterr().out


def test_data_warns_of_them_too_and_shows_data_for_a_model_that_is_not_known(workplace, capsys):
    limit = model_config(read_config("model")).max_position_embeddings
    cli.main(["data", "c.yaml", f"data.max_seq_len={limit}", "--examples", "0"])
    assert "WARNING" not in capsys.readouterr().out
    cli.main(["data", "c.yaml", f"data.max_seq_len={limit + 1}", "--examples", "0"])
    warning = f"\nWARNING: data.max_seq_len={limit + 1} is beyond the {limit} positions that the model was trained on\n"
    assert warning in capsys.readouterr().out
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"architectures": ["OtherForCausalLM"]}))
    cli.main(["data", "c.yaml", "--examples", "0"])
    out = capsys.readouterr().out
    assert f"{FIRST_ROWS} used" in out and "\nnot checked: whether data.max_seq_len=" in out and "'OtherForCausalLM' is not supported" in out


def test_validate_of_a_model_trained_whole(workplace, capsys):
    """By the end of the config's name, or by --recipe; adapters are not among its options."""
    Path("my_full.yaml").write_text("model: {path: model}\ndata: {train: train.jsonl, valid: valid.jsonl}\n")
    shutil.copy("my_full.yaml", "mine.yaml")
    shape = model_config(read_config("model"))
    with torch.device("meta"):
        total = sum(param.numel() for param in build_model(read_config("model")).parameters())
    for arguments in (["my_full.yaml"], ["mine.yaml", "--recipe", "full_finetune_single_device"]):
        cli.main(["validate", *arguments])
        out = capsys.readouterr().out
        assert out.startswith(f"config  ok: {arguments[0]}, for full_finetune_distributed\n")
        assert f"model   ok: {total:,} parameters, {total:,} of them trained" in out
        assert f"0.0 MiB for frozen weights, {16 * total / 2**20:.1f} MiB for what is trained" in out
    for options, taken in {
        ("optim.name=adamw_bf16",): 8,
        ("optim.in_backward=true", "optim.max_grad_norm=0", "run.global_batch_size=1"): 12,
    }.items():
        cli.main(["validate", "my_full.yaml", *options])
        assert f"{taken * total / 2**20:.1f} MiB for what is trained" in capsys.readouterr().out
    cli.main(["validate", "my_full.yaml", "data.new_tokens=['<|a|>','<|b|>']"])
    out = capsys.readouterr().out
    assert f"model   ok: {total + 2 * shape.hidden_size:,} parameters" in out  # tied: one table
    assert f"2 tokens added: embed_tokens and lm_head have {shape.vocab_size + 2:,} rows" in out
    assert shape.tie_word_embeddings and "LoRA" not in out
    cli.main(["validate", "my_full.yaml", "model.offload=[weights]"])
    out = capsys.readouterr().out
    block = (total - shape.vocab_size * shape.hidden_size - shape.hidden_size) // shape.num_hidden_layers
    rest = total - block * shape.num_hidden_layers
    gathered = 4 * (rest + 2 * block) + 8 * max(rest, 2 * block)
    assert f"on each device about {gathered / 2**20:.1f} MiB for what is gathered" in out
    assert f"in CPU memory {16 * total / 2**20:.1f} MiB over all processes" in out
    assert f"per forward and backward {(12 * total - 4 * rest) / 2**20:.1f} MiB travel" in out
    with pytest.raises(SystemExit):
        cli.main(["validate", "my_full.yaml", "lora.rank=4"])
    assert "lora.rank is not an option" in capsys.readouterr().err


def test_validate_of_pairs_and_all_weights(workplace, capsys):
    """No adapter, AdamW's 16 bytes a weight; with a copy for the reference that one's too, in model.dtype."""
    lines = (ASSETS / "tiny_dpo/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("pairs.jsonl").write_text("".join(lines[:FIRST_ROWS]), encoding="utf-8")
    Path("my_full_dpo.yaml").write_text("model: {path: model}\nlora: {rank: 0}\ndata: {train: pairs.jsonl}\n")
    with torch.device("meta"):
        total = sum(param.numel() for param in build_model(read_config("model")).parameters())
    for more, copied in (([], 0), (["dpo.reference=copy"], 2), (["dpo.reference=copy", "model.dtype=float32"], 4)):
        cli.main(["validate", "my_full_dpo.yaml", *more])
        out = capsys.readouterr().out
        assert "for dpo_distributed\n" in out and "LoRA" not in out
        what = "the frozen copy" if copied else "frozen weights"
        assert f"{copied * total / 2**20:.1f} MiB for {what}, {16 * total / 2**20:.1f} MiB for what is trained" in out
        assert f"model   ok: {total:,} parameters, {total:,} of them trained" in out
    cli.main(["data", "my_full_dpo.yaml", "--examples", "0"])
    assert f"{FIRST_ROWS} examples" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["validate", "my_full_dpo.yaml", "--recipe", "lora_distributed"])
    assert "lora.rank is 0, which means all weights in dpo_distributed alone" in capsys.readouterr().err


def test_validate_of_nf4_counts_fewer_bytes(workplace, capsys):

    for quantize in ("none", "nf4"):
        cli.main(["validate", "c.yaml", f"model.quantize={quantize}"])
        out = capsys.readouterr().out
        assert ("NF4: " in out) == (quantize == "nf4")
    with torch.device("meta"):
        model = build_model(read_config("model"))
    cfg = dry_run.read_config(dry_run.Options, "c.yaml", ["model.quantize=nf4"])
    sizes = [dry_run.frozen_bytes(model.requires_grad_(False), dtype) for dtype in ("float32", "bfloat16")]
    nf4 = dry_run.frozen_bytes(dry_run.build(cfg, range(0))[0], "bfloat16")
    assert sizes[0] == 2 * sizes[1] and nf4 < sizes[1]


def test_validate_of_fp8_counts_a_byte_per_weight_and_its_scales(workplace, capsys):
    cli.main(["validate", "c.yaml", "model.quantize=fp8"])
    assert re.search(r"FP8: \d+ frozen linears, 0\.\d\d GiB \(1\.0\d\d bytes per weight\)", capsys.readouterr().out)


def test_nf4_bytes_per_weight_are_those_of_real_tensors(workplace):
    cfg = dry_run.read_config(dry_run.Options, "c.yaml", ["model.quantize=nf4"])
    model, _ = dry_run.build(cfg, range(0))
    load_weights(model, "model", device=torch.device("cpu"), dtype=torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight
    parts = [weight.quantized_data, weight.quantized_scalers, weight.quantization_factor]
    stored = sum(part.numel() * part.element_size() for part in parts)
    assert stored == pytest.approx(weight.numel() * dry_run.NF4_BYTES, rel=1e-6)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.path=nowhere"], "command line: model.path is 'nowhere', which does not exist"),
        (["data.train=nowhere.jsonl"], "data.train[0].path is 'nowhere.jsonl', which does not exist"),
        (["model.path=train.jsonl"], "model.path is 'train.jsonl', which is a file and no model directory; name the one that holds config.json"),
        (["lora.adapter=c.yaml"], "lora.adapter is 'c.yaml', which is a file and no adapter directory"),
        (["lora.target_modules=[q_prog]"], "q_proj"),
        (["lora.modules_to_save=[lm_head]"], "lm_head"),
        (["run.global_batch_size=0"], "run.global_batch_size is 0; accepted are 1 to"),
        (["data.train=nowhere.txt"], "data.train[0].path is 'nowhere.txt', which does not exist"),
        (["run.out=c.yaml"], "command line: run.out is 'c.yaml', which is a file; name a directory"),
        (["run.out=c.yaml/x/y"], "command line: run.out is 'c.yaml/x/y', below the file c.yaml; name another directory"),
        (["run.resume=nowhere"], "command line: run.resume is 'nowhere', and there is no such directory (looked in "),
    ],
)
def test_validate_says_what_is_wrong(overrides, words, workplace, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["validate", "c.yaml", *overrides])
    assert left.value.code in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and "Traceback" not in error


@pytest.mark.parametrize("override", ["optim.name=adamw_8bit", "model.compile=on"])
def test_validate_refuses_what_needs_a_compiler_where_there_is_none(override, workplace, capsys, monkeypatch):
    for module in (device, optim):
        monkeypatch.setattr(module, "missing_compiler", lambda device: "a C compiler, g++")
    with pytest.raises(SystemExit):
        cli.main(["validate", "c.yaml", override])
    assert "this machine lacks a C compiler, g++: install it, or set " in capsys.readouterr().err


def test_validate_says_which_checkpoint_is_continued_and_who_takes_a_division(workplace, capsys):
    cli.main(["validate", "c.yaml", "run.resume=auto", "model.shard=4"])
    lines = capsys.readouterr().out.splitlines()
    assert "resume: no usable checkpoint in out, starting from the beginning" in lines
    assert "        model.shard=4: for recipes on several processes alone, on a number of processes that 4 divides" in lines
    cli.main(["validate", "c.yaml", "model.activation_checkpointing=auto", "model.offload=[activations]"])
    assert "        model.activation_checkpointing=auto: on a GPU, two steps show how many blocks must be" in capsys.readouterr().out
    cli.main(["validate", "c.yaml", "model.shard=all"])
    assert "        model.shard=all: for recipes on several processes alone\n" in capsys.readouterr().out


def test_validate_refuses_a_damaged_model_config(workplace, capsys):
    file = Path("model/config.json")
    for text, words in (
        ("{", "not valid JSON"),
        (json.dumps({"architectures": ["FancyForCausalLM"]}), "'FancyForCausalLM' is not supported"),
        (json.dumps(json.loads(file.read_text()) | {"new_knob": 3}), "new_knob"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit):
            cli.main(["validate", "c.yaml"])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("part", ["train", "valid"])
def test_validate_finds_an_id_for_which_the_model_has_no_row(part, workplace, capsys):
    """As the recipe does: tokenizer and config.json are of two models, and only one part of the data writes the id."""
    last = model_config(read_config("model")).vocab_size - 1
    file = Path("model/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": last}))
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    for name in ("train", "valid"):
        Path(f"{name}.jsonl").write_text((json.dumps({"messages": [question, answer]}) + "\n") * 2)
    cli.main(["validate", "c.yaml"])  # nothing in the data writes the id that has no row
    assert "disk    ok" in capsys.readouterr().out
    question["content"] += load_tokenizer("model").decode([last])
    Path(f"{part}.jsonl").write_text(json.dumps({"messages": [question, answer]}) + "\n")
    with pytest.raises(SystemExit):
        cli.main(["validate", "c.yaml"])
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: data.{part}: the tokenizer of model writes the id {last} (")
    assert "data    ok" in printed.out and "model   ok" not in printed.out


def test_a_disk_that_is_too_small_is_told_before_the_run(tmp_path):
    with pytest.raises(UserError, match=rf"run\.out: its checkpoints take 1,048,576\.0 GiB, .* are free at {tmp_path}"):
        dry_run.check_disk(tmp_path / "a" / "b", 2**50)


def test_data_reports_and_shows_examples(workplace, capsys):
    cli.main(["data", "c.yaml", "--examples", "2"])
    out = capsys.readouterr().out
    assert f"{FIRST_ROWS} read: {FIRST_ROWS} used, 0 dropped" in out
    assert "data.train[0]  train.jsonl" in out and "data.valid[0]  valid.jsonl" in out
    assert len(re.findall(r"^--- train\.jsonl:\d+: .* trained ---$", out, re.MULTILINE)) == 2
    assert "{+" in out  # the trained part, where there is no colour


def test_data_asks_nothing_about_the_run(workplace, capsys):
    """What needs held-out rows, or a directory to write to, is for `tune run` and `tune validate` to refuse."""
    cli.main(["data", "c.yaml", "data.valid=[]", "run.exact_match_rows=5", "run.eval_every=5", "run.out=c.yaml"])
    assert f"{FIRST_ROWS} read: {FIRST_ROWS} used, 0 dropped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["data", "c.yaml", "data.valid_fraction=0.1"])
    assert "data.valid_fraction and data.valid both give" in capsys.readouterr().err


def test_data_tells_held_out_rows_from_trained_ones(workplace, capsys):
    """Those of a fraction come from the same file: without a heading its account stood there twice, in other figures."""
    heading = "\n\nheld-out rows, for valid_loss and answers\n"
    for options, block in (([], "data.valid[0]  valid.jsonl"), (["data.valid=[]", "data.valid_fraction=0.1"], "data.train[0]  train.jsonl")):
        cli.main(["data", "c.yaml", *options, "--examples", "0"])
        assert f"{heading}{block}\n" in capsys.readouterr().out
    cli.main(["data", "c.yaml", "data.valid=[]", "--examples", "0"])
    assert "held-out" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["validate", "check"])
def test_a_model_that_cannot_be_trained_is_told_before_the_data_is_read(workplace, capsys, command):
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"architectures": ["OtherForCausalLM"]}))
    Path("train.jsonl").write_text("{broken")
    with pytest.raises(SystemExit):
        cli.main([command, "c.yaml"])
    told = capsys.readouterr()
    assert "architecture 'OtherForCausalLM' is not supported" in told.err and "data " not in told.out


def test_validate_counts_one_example_as_one(workplace, capsys):
    row = Path("train.jsonl").read_text().splitlines()[0]
    Path("train.jsonl").write_text(row)
    cli.main(["validate", "c.yaml"])
    assert f"data    ok: 1 example, {FIRST_ROWS} held out\n" in capsys.readouterr().out


def test_data_names_a_bad_row_by_file_and_line(workplace, capsys):
    lines = Path("train.jsonl").read_text().splitlines()
    Path("train.jsonl").write_text("\n".join([*lines[:2], "{broken", *lines[2:]]))
    with pytest.raises(SystemExit):
        cli.main(["data", "c.yaml"])
    assert "train.jsonl:3" in capsys.readouterr().err


def test_validate_says_what_is_dropped_cut_or_noted_in_training_and_validation_data(workplace, capsys):
    for part in ("train", "valid"):
        lines = Path(f"{part}.jsonl").read_text().splitlines()
        Path(f"{part}.jsonl").write_text("\n".join([*lines[:2], '{"messages": []}', *lines[2:]]))
    cli.main(["validate", "c.yaml", "data.max_bad_rows=0.1", "data.max_seq_len=104", "data.truncation=right"])
    out = capsys.readouterr().out
    for part in ("train", "valid"):
        dropped = f'data.{part}[0]: 1 of {FIRST_ROWS + 1} rows dropped (data.max_bad_rows); first {part}.jsonl:3: empty "messages"'
        assert f"\n        {dropped}\n" in out
    assert re.search(r"\n        data\.train\[0\]: \d+ x cut at data\.max_seq_len, first in train\.jsonl:\d+\n", out)


def test_every_recipe_says_it_too():
    for path in RECIPES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert ("log.print(summary(loader, valid))" in text) == ("build_datasets(" in text), path


def test_the_groups_are_those_of_the_recipes():
    """Options stands for the Config of every shipped recipe: its fields are in each of them."""
    names = {field.name for field in fields(dry_run.Options)}
    text = (RECIPES / "lora_single_device.py").read_text()
    for field in fields(dry_run.Options):
        assert re.search(rf"^    {field.name}: {field.type.__name__} = ", text, re.MULTILINE)
    assert names == {"model", "lora", "data", "optim", "run"}


def test_validate_and_a_real_model_agree_on_what_is_trained(workplace):
    cfg = dry_run.read_config(dry_run.Options, "c.yaml", [])
    model, reports = dry_run.build(cfg, range(0))
    with torch.device("meta"):
        other = build_model(read_config("model"))
    _, report, _ = add_adapter(other, cfg.lora, range(0))
    assert reports == [str(report)]
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in other.named_parameters()]


def test_which_recipe_a_config_is_for(workplace, capsys):
    """Its own group, the command in its header, the end of its name, its group lora; where none tells, it is refused."""
    texts = {
        "a.yaml": ("dpo: {beta: 0.2}\n", "dpo_distributed"),
        "b.yaml": ("#   tune run --nproc_per_node 2 full_finetune_distributed --config tiny/full\nmodel: {}\n", "full_finetune_distributed"),
        "my_reward.yaml": ("model: {}\n", "reward_distributed"),
        "c2.yaml": ("lora: {rank: 4}\n", "lora_single_device"),
    }
    for name, (text, recipe) in texts.items():
        Path(name).write_text(text)
        assert dry_run.recipe_of(name, []) == recipe
    Path("mine.yaml").write_text("model: {path: model}\ndata: {train: train.jsonl}\n")
    assert dry_run.recipe_of("mine.yaml", ["kto.beta=0.3"]) == "kto_distributed"
    assert dry_run.recipe_of("c.yaml", ["kto.beta=0.3"]) == "kto_distributed"  # its group lora speaks for no recipe against it
    assert dry_run.recipe_of("tiny/lora", ["kto.beta=0.3"]) == "lora_single_device"
    for command in ("validate", "data"):
        with pytest.raises(SystemExit):
            cli.main([command, "mine.yaml"])
        assert "mine.yaml does not tell which recipe it is for: add --recipe lora_single_device" in capsys.readouterr().err
        cli.main([command, "mine.yaml", "--recipe", "lora_distributed"])
    shutil.copy(CONFIGS / "tiny/full.yaml", "copied.yaml")
    assert dry_run.recipe_of("copied.yaml", []) == "full_finetune_distributed"


@pytest.mark.parametrize("command", ["validate", "data", "check"])
@pytest.mark.parametrize(
    "text, words",
    [
        ("- a\n", "any.yaml:1: a config is a mapping of groups: model:, data:, ..."),
        ("a\n", "any.yaml:1: a config is a mapping of groups: model:, data:, ..."),
        ("", "model.path is empty; name a Hugging Face model directory"),
        ("lr: 1e-3\n", "any.yaml:1: lr is not an option; did you mean optim.lr?"),
        ("modle: {path: model}\n", "any.yaml:1: modle.path is not an option; did you mean model.path?"),
        ("model: {path: a, path: b}\n", "any.yaml:1: model.path is given twice, first at any.yaml:1"),
        ("model: {_component_: a.b}\n", "any.yaml:1: model._component_ is refused"),
        ("model: {dtype: half}\n", "any.yaml:1: model.dtype is 'half'; the choices are"),
    ],
)
def test_a_config_without_a_recipe_has_its_mistakes_told_first(text, words, command, workplace, capsys):
    Path("any.yaml").write_text(text)
    with pytest.raises(SystemExit) as left:
        cli.main([command, "any.yaml"])
    error = capsys.readouterr().err
    assert left.value.code == 2 and words in error and "does not tell" not in error


def test_what_one_recipe_alone_takes_is_no_mistake_of_a_config_without_one(workplace, capsys):
    Path("any.yaml").write_text("model: {path: model}\ndata: {train: train.jsonl}\noptim: {name: adamw_bf16}\n")
    with pytest.raises(SystemExit) as left:
        cli.main(["validate", "any.yaml"])
    assert left.value.code == 1 and "any.yaml does not tell which recipe it is for" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "data"])
@pytest.mark.parametrize("config", ["tiny/lora", "tiny/full", "c.yaml"])
def test_pairs_are_refused_where_the_recipe_refuses_them(config, command, workplace, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, config, "data.train=builtin:tiny_dpo/train.jsonl", "data.valid=builtin:tiny_dpo/valid.jsonl"])
    assert left.value.code == 1
    words = "data.train[0]: builtin:tiny_dpo/train.jsonl is preference data (it has chosen, rejected), which is not trained on here but in dpo"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, options, recipe, words",
    [
        ("tiny/lora", ["dpo.beta=0.1"], "", "command line: dpo.beta is not an option here, the group dpo belongs to dpo_distributed alone"),
        ("tiny/dpo", [], "lora_single_device", "dpo.yaml:13: dpo.beta is not an option here, the group dpo belongs to dpo_distributed"),
        ("tiny/kto", [], "dpo_distributed", "kto.beta is not an option here, the group kto belongs to kto_distributed alone"),
        ("tiny/lora", ["reward.center_weight=0.1"], "", "the group reward belongs to reward_distributed alone"),
        ("tiny/full", ["lora.rank=4"], "", "lora.rank is not an option here, the group lora belongs to recipes that train adapters"),
    ],
)
def test_a_group_of_another_recipe_is_named_with_it(config, options, recipe, words, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["validate", config, *options, *(["--recipe", recipe] if recipe else [])])
    assert left.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.py")))
def test_the_options_of_a_dry_run_are_the_recipes(recipe):
    theirs = importlib.import_module(f"torchft.recipes.{recipe}").Config()
    assert flatten(dry_run.RUNS.get(recipe, (dry_run.Options, ""))[0]()) == flatten(theirs)
