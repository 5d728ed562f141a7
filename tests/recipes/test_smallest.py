"""Recipes with lm_head in 8 bits and embed_tokens in CPU memory: curves, resume, preferences, rewards, `tune validate`."""

from pathlib import Path

import pytest
import test_dpo_distributed
import test_reward_distributed
from safetensors.torch import load_file
from test_lora_single_device import log_records, options

from torchft import cli
from torchft.errors import ConfigError
from torchft.recipes import dpo_distributed, lora_single_device, reward_distributed

SMALLEST = ("model.quantize=nf4_int8_head", "model.offload=[embeddings,activations]", "model.activation_checkpointing=full")
SHORT = ("run.max_steps=4", "run.sample_rows=0", "data.valid_fraction=0.25")
FILE = "adapter/adapter_model.safetensors"


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_an_embedding_in_cpu_memory_changes_no_bit(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    for name, more in (("here", []), ("there", ["model.offload=[embeddings]"])):
        lora_single_device.main(options(small_model, chat_data, tmp_path / name, *SHORT, "model.quantize=nf4", *more))
    assert log_records(tmp_path / "here") == log_records(tmp_path / "there")
    assert (tmp_path / "here" / FILE).read_bytes() == (tmp_path / "there" / FILE).read_bytes()


def test_a_head_in_8_bits_stays_near_the_curve(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """Near, and not on it: losses move by far less than they do from bf16 to NF4."""
    losses = {}
    for quantize in ("none", "nf4", "nf4_int8_head"):
        lora_single_device.main(options(small_model, chat_data, tmp_path / quantize, *SHORT, f"model.quantize={quantize}"))
        losses[quantize] = [record["loss"] for record in log_records(tmp_path / quantize) if "loss" in record]
    moved = [max(abs(a - b) for a, b in zip(losses["nf4"], losses[name], strict=True)) for name in ("nf4_int8_head", "none")]
    assert 0 < moved[0] < 0.3 * moved[1]


def test_a_stopped_run_continues_bit_for_bit(small_model: Path, chat_data: Path, tmp_path: Path) -> None:
    more = (*SMALLEST, "run.max_steps=4", "run.save_every=1", "run.resume=auto", "optim.schedule=constant")
    for name, stops in (("straight", (4,)), ("stopped", (2, 4))):
        for steps in stops:
            lora_single_device.main(options(small_model, chat_data, tmp_path / name, *more, f"run.max_steps={steps}"))
    for name in ("params", "optimizer", "rng"):
        one, other = (load_file(tmp_path / run / f"step_000004/{name}.safetensors") for run in ("straight", "stopped"))
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    assert (tmp_path / "straight" / FILE).read_bytes() == (tmp_path / "stopped" / FILE).read_bytes()


def test_preferences_start_at_ln_2(small_model: Path, pair_data: Path, tmp_path: Path) -> None:
    test_dpo_distributed.train(1, small_model, pair_data, tmp_path, "run.max_steps=2", *SMALLEST)
    losses = [record["loss"] for record in log_records(tmp_path) if "loss" in record]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5) and losses[1] != losses[0]
    assert dpo_distributed.store_frozen is lora_single_device.store_frozen


def test_a_reward_model_is_merged_into_what_it_was_trained_on(
    small_model: Path, pair_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    test_reward_distributed.train(1, small_model, pair_data, tmp_path, "run.max_steps=2", *SMALLEST)
    assert "merged into the dequantised NF4 weights" in capfd.readouterr().out
    assert reward_distributed.store_frozen is lora_single_device.store_frozen


def test_an_adapter_that_trains_the_head_is_refused_before_anything_is_loaded(
    small_model: Path, chat_data: Path, tmp_path: Path
) -> None:
    first = options(small_model, chat_data, tmp_path / "first", *SHORT, "run.max_steps=1", "lora.modules_to_save=[lm_head]")
    lora_single_device.main(first)
    more = options(small_model, chat_data, tmp_path / "more", *SHORT, *SMALLEST, f"lora.adapter={tmp_path / 'first/adapter'}")
    with pytest.raises(ConfigError, match="stores a frozen lm_head in 8 bits, and the adapter trains it whole"):
        lora_single_device.main(more)


def test_validate_says_where_the_ends_are(
    small_model: Path, chat_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [f"model.path={small_model}", f"data.train={chat_data}", f"run.out={tmp_path / 'out'}", "data.max_seq_len=128"]
    cli.main(["validate", "tiny/qlora", *given, *SMALLEST])
    out = capsys.readouterr().out
    assert "lm_head: 8 bits with a scale per row" in out and "embed_tokens: 81,920 weights stay in CPU memory" in out
    assert "memory: 0.2 MiB (and 0.3 MiB of CPU memory) for frozen weights" in out, out
