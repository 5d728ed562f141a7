"""Tokens added to a model that is trained whole: one curve, a directory that others load, a base for the next run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import problems, run_processes
from safetensors.torch import load_file, save_file
from test_full_finetune_distributed import dying_run, exported, options, tied_copy, train
from test_lora_distributed import assert_same_log
from test_lora_single_device import log_records, relative_error
from tiny_training import assert_same
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchft.adapter import probe_logits
from torchft.chat import load_model
from torchft.cli import main
from torchft.data.tokenizer import load_tokenizer
from torchft.recipes import full_finetune_distributed as recipe

CHATML = ("data.chat_template=chatml", "data.new_tokens=['<|im_start|>','<|im_end|>','<note>']")  # the last in no row
ENDS = ("model.embed_tokens.weight", "lm_head.weight")


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_one_curve_and_a_directory_that_transformers_loads(
    small_model: Path, chat_data: Path, tmp_path: Path, tied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 1, 2 and 4 processes, of which the last holds fewer rows of the grown tables than the others."""
    base = tied_copy(small_model, tmp_path) if tied else small_model
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    runs = {n: train(n, base, chat_data, tmp_path / str(n), *CHATML) for n in ((1, 4) if tied else (1, 2, 4))}
    for out in runs.values():
        assert_same_log(out, runs[1])
        assert relative_error(exported(out), exported(runs[1])) <= 1e-3
    folder, tensors, before = runs[4] / "model", exported(runs[4]), load_file(base / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == rows + 3 and (rows + 3) % 4
    new = [tensors[name][rows:] for name in ENDS[: 2 - tied]]
    assert all(len(each) == 3 and each.norm(dim=1).min() > 0 and not torch.equal(each[0], each[1]) for each in new)
    if not tied:  # no row of the data holds the last token: its embedding stays where it began
        old = before[ENDS[0]]
        assert ((new[0][2] - old.mean(0)) / old.std(0)).std() == pytest.approx(0.1, rel=0.4)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_model(folder, None, torch.float32, "none", torch.device("cpu"))
    ids = torch.randint(rows + 3, (2, 32), generator=torch.Generator().manual_seed(0))  # as probe_logits asks
    with torch.no_grad():
        assert (theirs(ids).logits - probe_logits(ours)).abs().max() <= 2e-5 * max(1, probe_logits(ours).std())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<note>"]) == [rows, rows + 1, rows + 2]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Ada"}], add_generation_prompt=True)
    assert list(asked["input_ids"])[0] == rows
    main(["generate", str(folder), "--prompt", "Ada and Bela", "--max-new-tokens", "4", "--dtype", "float32"])
    assert "no chat template" not in capsys.readouterr().err


def test_the_result_is_the_next_runs_base(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """It goes on where the first ended, without naming the tokens again, and may add more; the same again is refused."""
    first = train(1, small_model, chat_data, tmp_path / "first", *CHATML)
    fixed = ["optim.schedule=constant", "optim.warmup_steps=0"]
    again = train(2, first / "model", chat_data, tmp_path / "again", *fixed, "data.new_tokens=['<more>']")
    losses = [[r["loss"] for r in log_records(out) if "loss" in r] for out in (first, again)]
    assert losses[1][0] < losses[0][0] - 0.2 and losses[1][0] == pytest.approx(losses[0][-1], rel=0.1)
    tokenizer, size = load_tokenizer(again / "model"), load_tokenizer(small_model).vocab_size
    assert tokenizer.special_tokens["<|im_end|>"] == size + 1 and tokenizer.vocab_size == size + 4
    assert "<|im_start|>" in tokenizer.chat_template
    assert len(exported(again)["lm_head.weight"]) == len(exported(first)["lm_head.weight"]) + 1
    same = options(first / "model", chat_data, tmp_path / "same", *CHATML)
    assert run_processes(1, lambda _: recipe.main(same), tmp_path / "same") == [1]
    assert "data.new_tokens: '<|im_start|>' is empty, listed twice, or in the vocabulary" in problems(tmp_path / "same")


def test_spare_rows_are_used_before_any_is_added(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """As in Qwen's models: the tables keep their size, and the tokens' rows begin near the mean of those before."""
    base = tmp_path / "base"
    shutil.copytree(small_model, base)
    config = json.loads((base / "config.json").read_text())
    rows = config["vocab_size"]
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": rows + 7}))
    tensors = load_file(base / "model.safetensors")
    spare = {name: torch.cat([tensors[name], torch.full((7, 64), 9.0)]) for name in ENDS}
    save_file(tensors | spare, base / "model.safetensors")
    out = train(2, base, chat_data, tmp_path / "out", *CHATML)
    assert json.loads((out / "model/config.json").read_text())["vocab_size"] == rows + 7
    embedding = exported(out)["model.embed_tokens.weight"]
    assert embedding[rows : rows + 3].abs().max() < 1 and torch.equal(embedding[rows + 3 :], spare[ENDS[0]][rows + 3 :])


def test_a_killed_run_goes_on_bit_for_bit(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    more = (*CHATML, "run.save_every=2", "run.resume=auto", "model.dtype=bfloat16")
    straight = train(2, small_model, chat_data, tmp_path / "straight", *more)
    cfg = options(small_model, chat_data, tmp_path / "killed", *more)
    assert run_processes(2, lambda _: dying_run(cfg, 4), tmp_path / "killed") == [9, 9]
    assert run_processes(2, lambda _: recipe.main(cfg), tmp_path / "killed") == [0, 0], problems(tmp_path / "killed")
    assert_same(exported(tmp_path / "killed"), exported(straight))
    assert log_records(tmp_path / "killed") == log_records(straight)
    fewer = "data.new_tokens=['<|im_start|>','<|im_end|>']"
    other = options(small_model, chat_data, tmp_path / "killed", CHATML[0], fewer, *more[2:])
    assert run_processes(1, lambda _: recipe.main(other), tmp_path / "killed") == [1]
    assert "cannot be continued with another value of\n  data.new_tokens: " in problems(tmp_path / "killed")
