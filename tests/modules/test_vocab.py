"""Training embed_tokens and lm_head: whole, tied, or the rows of added tokens only."""

import pytest
import torch
from torch import Tensor

from torchft.modules.lora import LoraSpec, add_lora, init_lora, trainable_parameters
from torchft.modules.rope import RopeConfig
from torchft.modules.transformer import CausalLM, TransformerConfig
from torchft.modules.vocab import (
    freeze_old_rows,
    init_new_rows,
    is_tied,
    resize_vocab,
    train_modules,
    trained_modules,
    untie,
    untrained_rows,
)


def build(*, tied: bool = False, vocab_size: int = 40) -> CausalLM:
    config = TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope=RopeConfig(16),
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    add_lora(model, LoraSpec(2, 6.0))
    return model


def finish(model: CausalLM) -> CausalLM:
    init_lora(model, torch.Generator().manual_seed(1))
    return model


def batch(vocab_size: int = 40) -> tuple[Tensor, Tensor]:
    ids = torch.randint(vocab_size, (3, 9), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_whole_modules_are_trained_in_fp32_over_a_bf16_base(names: tuple[str, ...]) -> None:
    model = build()
    model.to(torch.bfloat16)
    finish(model)
    train_modules(model, names)
    assert trained_modules(model) == names
    ids, labels = batch()
    assert model(ids).dtype == torch.bfloat16
    model(ids, labels=labels).backward()
    whole = {name: param for name, param in trainable_parameters(model).items() if ".lora_" not in name}
    assert sorted(name.split(".")[-2] for name in whole) == sorted(names)
    for name, param in whole.items():
        assert param.dtype == param.grad.dtype == torch.float32 and param.grad.any(), name


def test_training_does_not_change_the_function() -> None:
    model = finish(build())
    ids, _ = batch()
    before = model(ids)
    train_modules(model, ("embed_tokens", "lm_head"))
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_one_side_of_a_tied_pair_is_refused_with_the_fix(name: str) -> None:
    with pytest.raises(ValueError, match=rf"only {name}, .* name both: \[embed_tokens, lm_head\]"):
        train_modules(build(tied=True), (name,))


def test_both_sides_of_a_tied_pair_stay_one_parameter() -> None:
    model = finish(build(tied=True))
    train_modules(model, ("embed_tokens", "lm_head"))
    assert is_tied(model)
    whole = [name for name in trainable_parameters(model) if ".lora_" not in name]
    assert whole == ["model.embed_tokens.weight"]
    ids, labels = batch()
    model(ids, labels=labels).backward()
    grad = model.model.embed_tokens.weight.grad
    assert all(grad[row].any() for row in range(40)), "the head's gradient reaches every row"


def test_another_module_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'norm' cannot be trained whole; only embed_tokens and lm_head can"):
        train_modules(build(), ("norm",))


def test_untie_parts_the_pair_and_says_so_in_the_config() -> None:
    model = finish(build(tied=True))
    ids, _ = batch()
    before = model(ids)
    untie(model)
    assert not is_tied(model) and not model.config.tie_word_embeddings
    assert torch.equal(model(ids), before)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model.model.embed_tokens.weight.any()


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_start_near_the_mean_and_only_they_move(tied: bool) -> None:
    """Three AdamW steps with weight decay 0: every old row keeps its bits, every new row moves."""
    model = build(tied=tied)
    assert resize_vocab(model, 43) == 3
    train_modules(model, ("embed_tokens", "lm_head"))
    finish(model)
    new = range(40, 43)
    init_new_rows(model, new, torch.Generator().manual_seed(3))
    ends = [model.model.embed_tokens.weight, model.lm_head.weight]
    for weight in ends:
        old = weight[:40]
        distance = (weight[40:] - old.mean(0)).norm(dim=1) / old.std(0).norm()
        assert weight.shape == (43, 32) and distance.min() > 0.05 and distance.max() < 0.2
        assert not torch.equal(weight[40], weight[41])
    assert is_tied(model) == tied and model.config.vocab_size == 43

    before = [weight.detach().clone() for weight in ends]
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, weight_decay=0.0)
    for seed in range(3):
        ids = torch.randint(43, (4, 17), generator=torch.Generator().manual_seed(seed))
        model(ids[:, :-1], labels=ids[:, 1:]).backward()
        freeze_old_rows(model, new)
        optimizer.step()
        optimizer.zero_grad()
    for weight, start in zip(ends, before, strict=True):
        assert torch.equal(weight[:40], start[:40])
        assert all((weight[row] != start[row]).any() for row in new)


def test_new_rows_are_seeded() -> None:
    def rows(seed: int) -> Tensor:
        model = build()
        resize_vocab(model, 44)
        init_new_rows(model, range(40, 44), torch.Generator().manual_seed(seed))
        return model.lm_head.weight[40:].detach()

    assert torch.equal(rows(3), rows(3)) and not torch.equal(rows(3), rows(4))


def test_spare_rows_are_used_without_growing() -> None:
    """Qwen's tables have more rows than its tokenizer has tokens: added tokens take those, here 37 and 38 of 40."""
    model = build()
    train_modules(model, ("embed_tokens", "lm_head"))
    assert resize_vocab(model, 40) == 0
    old = model.lm_head.weight.detach().clone()
    init_new_rows(model, range(37, 39), torch.Generator().manual_seed(3))
    changed = (model.lm_head.weight != old).any(1).nonzero().flatten().tolist()
    assert changed == [37, 38]
    finish(model)
    ids, labels = batch()
    model(ids, labels=labels).backward()
    freeze_old_rows(model, range(37, 39))
    assert model.lm_head.weight.grad.any(1).nonzero().flatten().tolist() == [37, 38]


def test_shrinking_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot shrink from 40 to 39 rows"):
        resize_vocab(build(), 39)


def test_rows_that_were_never_trained_are_found_by_their_norm() -> None:
    """T12: a template's token whose row is zero, tiny or huge."""
    model = build(vocab_size=1000)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight[3] = 0
        weight[7] *= 0.01
        weight[9] *= 30
    assert untrained_rows(model, [1, 3, 7, 8, 9, 39]) == [3, 7, 9]
