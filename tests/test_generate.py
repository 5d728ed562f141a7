"""Decoding in a batch with a cache is decoding alone without one; sampling, stopping, and what is left as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from torchft.errors import UserError
from torchft.generate import eval_mode, generate
from torchft.models import build_model
from torchft.modules.checkpointing import apply_activation_checkpointing
from torchft.modules.transformer import CausalLM

PROMPTS = [[5, 17, 3], [44], [1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 9]]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 47,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4}
QWEN3 = LLAMA | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 8,
    "tie_word_embeddings": True,
}


def random_model(hf: dict) -> CausalLM:
    model = build_model(hf)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # attention and logits far from uniform: every greedy choice is clear
    return model


@pytest.fixture
def model() -> CausalLM:
    return random_model(LLAMA)


def without_cache(model: CausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad(), eval_mode(model):
        for _ in range(num_tokens):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("hf", [LLAMA, MISTRAL, QWEN3], ids=lambda hf: hf["model_type"])
def test_greedy_is_the_same_in_a_batch_alone_and_in_transformers(hf):
    model = random_model(hf)
    got = generate(model, PROMPTS, max_new_tokens=12, stop_ids=set())
    assert got == [without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(reply) for reply in got}) == len(PROMPTS)

    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf), attn_implementation="eager").eval()
    reference.load_state_dict(model.state_dict())
    for prompt, reply in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert expected[0, len(prompt) :].tolist() == reply


def test_stop_ids_end_a_row_and_are_left_out(model):
    free = generate(model, PROMPTS, max_new_tokens=12, stop_ids=set())
    stops = {free[0][4], free[2][0]}
    seen = []
    stopped = generate(
        model, PROMPTS, max_new_tokens=12, stop_ids=stops, on_token=lambda row, token: seen.append((row, token))
    )
    for row, (whole, cut) in enumerate(zip(free, stopped, strict=True)):
        expected = []
        for token in whole:
            if token in stops:
                break
            expected.append(token)
        assert cut == expected
        assert [token for owner, token in seen if owner == row] == expected
    assert stopped[2] == [] and len(stopped[0]) <= 4


def test_decoding_ends_when_every_row_has_stopped(model, monkeypatch):
    calls = []
    original = CausalLM.forward

    def counted(self, *args, **kwargs):
        calls.append(args)
        return original(self, *args, **kwargs)

    first = generate(model, PROMPTS[:1], max_new_tokens=12, stop_ids=set())[0]
    monkeypatch.setattr(CausalLM, "forward", counted)
    assert generate(model, PROMPTS[:1], max_new_tokens=12, stop_ids={first[0]}) == [[]]
    assert len(calls) == 1
    calls.clear()
    assert generate(model, PROMPTS[:1], max_new_tokens=3, stop_ids=set()) == [first[:3]]
    assert len(calls) == 3


def test_nothing_to_do(model):
    assert generate(model, [], max_new_tokens=5, stop_ids=set()) == []
    assert generate(model, PROMPTS, max_new_tokens=0, stop_ids=set()) == [[], [], [], []]


def shares(model: CausalLM, **options) -> torch.Tensor:
    """How often each token comes first, over 2,000 draws after one prompt: (V,)."""
    drawn = generate(model, [[5, 17, 3]] * 2000, max_new_tokens=1, stop_ids=set(), **options)
    return torch.bincount(torch.tensor(drawn).flatten(), minlength=47) / 2000


@pytest.mark.parametrize("temperature", [0.7, 2.5])
def test_sampling_follows_the_probabilities(model, temperature):
    with torch.no_grad():
        expected = (model(torch.tensor([[5, 17, 3]]))[0, -1] / temperature).softmax(-1)
    # Total variation of 2,000 draws from 47 tokens is around 0.5 * sqrt(47 / 2000) = 0.08 at most.
    assert 0.5 * (shares(model, temperature=temperature) - expected).abs().sum() < 0.1


@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.8])
def test_top_p_keeps_the_smallest_set_that_holds_it(model, top_p):
    with torch.no_grad():
        probabilities = (model(torch.tensor([[5, 17, 3]]))[0, -1] / 2.5).softmax(-1)
    kept, mass = [], 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept.append(token)
        mass += probabilities[token].item()
    assert 0 < len(kept) < 40
    expected = torch.zeros(47)
    expected[kept] = probabilities[kept] / mass
    got = shares(model, temperature=2.5, top_p=top_p)
    assert set(got.nonzero().flatten().tolist()) <= set(kept)
    assert 0.5 * (got - expected).abs().sum() < 0.1


def test_sampling_is_seeded_and_leaves_the_global_random_state_alone(model):
    state = torch.get_rng_state()
    options = {"max_new_tokens": 12, "stop_ids": set(), "temperature": 1.5}
    one, again, other = (generate(model, PROMPTS, seed=seed, **options) for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)


class Dropping(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.dropout(x, 0.5, self.training), self.weight)


def test_modes_are_restored_and_dropout_is_off(model):
    expected = generate(model, PROMPTS, max_new_tokens=6, stop_ids=set())
    dropping = Dropping(24, 40, bias=False)
    dropping.weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj = dropping
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert generate(model, PROMPTS, max_new_tokens=6, stop_ids=set()) == expected
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()

    def interrupt(row: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, max_new_tokens=6, stop_ids=set(), on_token=interrupt)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_a_model_that_is_checkpointed_and_compiled_generates_uncompiled(model):
    expected = generate(model, PROMPTS, max_new_tokens=6, stop_ids=set())
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    for block in model.model.layers:
        block.compile(backend=backend)
    apply_activation_checkpointing(model, "full")
    ids = torch.tensor([[1, 2, 3]])
    model(ids, labels=ids).backward()
    num_before = len(compilations)
    assert num_before > 0
    assert generate(model, PROMPTS, max_new_tokens=6, stop_ids=set()) == expected
    assert len(compilations) == num_before
    model(ids, labels=ids).backward()  # the compiled blocks are still in place
    assert len(compilations) == num_before


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, 47]], {}, "outside 0 .. 46"),
        ([[-1]], {}, "outside 0 .. 46"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
        ([[1]], {"seed": 2**64}, "seed is 18446744073709551616"),
        ([[1]], {"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
    ],
)
def test_bad_requests_are_refused(model, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompts, max_new_tokens=2, stop_ids=set(), **options)
