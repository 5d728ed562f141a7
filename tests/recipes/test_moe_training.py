"""The recipes on mixtures of experts: the same run on one and two processes, stopped and resumed, answers and exports at the end."""

import json
import shutil
from pathlib import Path

import pytest
import test_dpo_distributed
import test_kto_distributed
import torch
from safetensors.torch import load_file, save_file
from test_dpo_distributed import SHORT
from test_full_finetune_distributed import exported
from test_full_finetune_distributed import train as train_whole
from test_lora_distributed import assert_same_log, assert_same_run, train
from test_lora_single_device import log_records, options

from torchft.cli import main
from torchft.models import build_model, gpt_oss, read_config
from torchft.recipes import lora_single_device
from torchft.stored import pieces

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="session")
def mixture(request: pytest.FixtureRequest, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with four experts in each layer, of which a token takes two, and random weights; `-balanced` with the
    router's auxiliary loss.
    """
    family, _, balanced = request.param.partition("-")
    folder = tmp_path_factory.mktemp("models") / request.param
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((small_model / name).read_bytes())
    ids = {key: value for key, value in read_config(small_model).items() if key.endswith("_token_id") or key == "vocab_size"}
    config = ids | SIZES | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "max_position_embeddings": 2048}
    if balanced:
        config |= {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    if family == "gpt_oss":
        config = {key: value for key, value in config.items() if key not in ("num_experts", "moe_intermediate_size")}
        config |= {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 4}
        config |= {"rope_scaling": gpt_oss.YARN, "sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(config))
    model = build_model(config)
    model.init_weights(torch.Generator().manual_seed(1))
    for block in model.model.layers if balanced else ():  # so that there is something to even out
        getattr(block.mlp, "router" if family == "gpt_oss" else "gate").weight.data *= 20
    stored = pieces(model)
    tensors = {piece.name: piece.cut(param.detach()).clone() for name, param in model.named_parameters() for piece in stored[name]}
    save_file(tensors, folder / "model.safetensors")
    return folder


def without_balance(mixture: Path, folder: Path) -> Path:
    """The same model, whose config.json does not ask for the loss."""
    plain = shutil.copytree(mixture, folder / "plain")
    config = json.loads((plain / "config.json").read_text()) | {"output_router_logits": False}
    (plain / "config.json").write_text(json.dumps(config))
    return plain


QLORA = ["model.quantize=nf4", "model.shard=all"]
RECOMPUTED = "model.activation_checkpointing=full"


@pytest.mark.parametrize("mixture, more", [("qwen3_moe", []), ("gpt_oss", QLORA)], ids=["lora", "qlora"], indirect=["mixture"])
def test_adapters_on_two_processes_are_those_of_one(mixture, chat_data, tmp_path, more):
    expected = train(0, mixture, chat_data, tmp_path / "0", *more[:1])
    out = train(2, mixture, chat_data, tmp_path / "2", *more)
    assert_same_run(out, expected)
    assert any("experts" in name for name in load_file(out / "adapter/adapter_model.safetensors"))
    losses = [record["loss"] for record in log_records(out) if "loss" in record]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("mixture", ["qwen3_moe"], indirect=True)
def test_all_weights_on_two_processes_are_those_of_one(mixture, chat_data, tmp_path):
    outs = [train_whole(count, mixture, chat_data, tmp_path / str(count)) for count in (1, 2)]
    assert_same_log(*outs)
    base, (one, two) = load_file(mixture / "model.safetensors"), (exported(out) for out in outs)
    assert one.keys() == two.keys() == base.keys()
    assert all(not torch.equal(one[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize("mixture", ["qwen3_moe-balanced", "gpt_oss-balanced"], indirect=True)
def test_the_auxiliary_loss_is_one_on_two_processes(mixture, chat_data, tmp_path):
    """Of the whole step, cut into four micro-batches on one process, four or one on two; logged beside the cross entropy."""
    expected = train(0, mixture, chat_data, tmp_path / "0")
    assert_same_run(train(2, mixture, chat_data, tmp_path / "2", "run.micro_batch_size=1", RECOMPUTED), expected)
    assert_same_run(train(2, mixture, chat_data, tmp_path / "1", "run.micro_batch_size=4", "model.shard=1"), expected)
    off = train(0, without_balance(mixture, tmp_path), chat_data, tmp_path / "off")
    balanced, plain = log_records(expected), log_records(off)
    assert ["aux_loss" in record for record in balanced] == ["loss" in record for record in balanced]
    assert not any("aux_loss" in record for record in plain)
    assert balanced[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert balanced[0]["grad_norm"] != plain[0]["grad_norm"]


@pytest.mark.parametrize("mixture", ["qwen3_moe-balanced"], indirect=True)
def test_the_auxiliary_loss_of_all_weights(mixture, chat_data, tmp_path):
    outs = [train_whole(count, mixture, chat_data, tmp_path / str(count)) for count in (1, 2)]
    assert_same_log(*outs)
    assert all(2 < record["aux_loss"] < 4 for record in log_records(outs[0]) if "loss" in record)  # of two of four experts


PREFERENCES = {
    "dpo": (test_dpo_distributed, "pair_data", []),
    "dpo of all weights": (test_dpo_distributed, "pair_data", ["lora.rank=0", "lora.alpha=32", "optim.lr=1e-3"]),
    "kto": (test_kto_distributed, "verdict_data", []),
}


@pytest.mark.parametrize("kind", PREFERENCES)
@pytest.mark.parametrize("mixture", ["qwen3_moe-balanced"], indirect=True)
def test_the_auxiliary_loss_beside_preferences(mixture, request, tmp_path, kind):
    """On one process, and on two, cut otherwise and recomputed."""
    module, data, more = PREFERENCES[kind]
    data = request.getfixturevalue(data)
    one = module.train(1, mixture, data, tmp_path / "1", *SHORT, *more, "run.micro_batch_size=8")
    two = module.train(2, mixture, data, tmp_path / "2", *SHORT, *more, "run.micro_batch_size=1", RECOMPUTED)
    ours, theirs = log_records(two), log_records(one)
    assert len(ours) == len(theirs) and all("aux_loss" in record for record in ours if "loss" in record)
    for record, wanted in zip(ours, theirs, strict=True):
        assert record == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("mixture", ["qwen3_moe-balanced"], indirect=True)
def test_it_is_said_before_the_run_and_refused_where_it_is_not_trained(mixture, chat_data, pair_data, capsys):
    more = [f"model.path={mixture}", "data.valid=[]", "data.valid_fraction=0.25"]
    main(["validate", "tiny/lora", f"data.train={chat_data}", *more])
    assert "the router's auxiliary loss is trained, times 0.3 (config.json: output_router_logits)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["validate", "tiny/reward", f"data.train={pair_data}", *more])
    assert "output_router_logits is true" in capsys.readouterr().err


@pytest.mark.parametrize("mixture", ["qwen3_moe-balanced"], indirect=True)
def test_a_resumed_run_has_the_same_bits(mixture, chat_data, tmp_path):
    cfg = options(mixture, chat_data, tmp_path, "run.save_every=2", "run.resume=auto", "run.max_steps=4")
    lora_single_device.main(cfg)
    log, adapter = log_records(tmp_path), tmp_path / "adapter/adapter_model.safetensors"
    expected = adapter.read_bytes()
    shutil.rmtree(tmp_path / "step_000004")
    shutil.rmtree(tmp_path / "adapter")
    lora_single_device.main(cfg)
    assert adapter.read_bytes() == expected and log_records(tmp_path) == log
