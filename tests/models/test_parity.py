"""Logits and gradients of every family against transformers, on small random models with odd shapes.

The reference is transformers' eager attention in fp32; the bound is about 5 times the rounding differences seen (3e-6). Then the
same with several documents in a row, and with a cache token by token.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import CASES, in_our_names, make_twins
from torch import Tensor, nn

from torchft.modules.transformer import KVCache


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def twins(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """(transformers' model, ours with the same weights, ids (2, T))."""
    return make_twins(request.param)


def test_logits_equal_transformers(twins):
    reference, ours, ids = twins
    with torch.no_grad():
        expected, got = reference(ids).logits, ours(ids)
    bound = 2e-5 * max(1.0, expected.std().item())
    assert (got - expected).abs().max() <= bound


def test_gradients_equal_transformers(twins):
    reference, ours, ids = twins
    labels = torch.randint(reference.config.vocab_size, ids.shape)
    labels[0, :9] = -100
    F.cross_entropy(reference(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    ours(ids, labels=labels).backward()
    assert_same_gradients(ours, reference)


def assert_same_gradients(ours: nn.Module, reference: nn.Module) -> None:
    grads = {name: parameter.grad for name, parameter in reference.named_parameters()}
    expected = in_our_names(grads, reference.config.model_type)
    got = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, error in gradient_errors(got, expected).items():
        assert error <= 1e-5, name


def gradient_errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """||g - g'|| / ||g'|| of each tensor; one without a gradient to speak of (a key's bias shifts every score alike) is measured
    against the whole."""
    assert got.keys() == expected.keys()
    norms = {name: grad.norm() for name, grad in expected.items()}
    total, largest = torch.stack(list(norms.values())).norm(), max(norms.values())
    scales = {name: norm if norm > 1e-6 * largest else total for name, norm in norms.items()}
    return {name: ((got[name] - grad).norm() / scales[name]).item() for name, grad in expected.items()}


def logits_alone(reference: nn.Module, ids: Tensor) -> Tensor:
    """transformers' logits (T, V) of one document; by a copy, since dynamic RoPE remembers the longest document so far."""
    return copy.deepcopy(reference)(ids[None]).logits[0]


LENGTHS = (20, 33, 12)  # of the documents in a row; LongRoPE of 32 takes its short factors in two of them


def test_packed_documents_are_documents_alone(twins):
    """Logits and gradients of a row of three documents and padding, against each document by itself."""
    reference, ours, ids = twins
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor([*LENGTHS, 70 - sum(LENGTHS)]))
    positions = torch.cat([torch.arange(int(n)) for n in documents.bincount()])
    labels = torch.randint(reference.config.vocab_size, (70,))
    labels[documents == 3] = -100
    row = {"positions": positions[None], "documents": documents[None]}
    got = ours(ids[:1], **row)[0]
    ours(ids[:1], labels=labels[None], **row).backward()
    losses = []
    for document in range(3):
        inside = documents == document
        # Not a copy: the gradients are wanted. Dynamic RoPE forgets, since the shorter document after the longest is in its range.
        expected = reference(ids[:1, inside]).logits[0]
        assert (got[inside] - expected).abs().max() <= 2e-5 * max(1.0, expected.std().item()), document
        losses.append(F.cross_entropy(expected, labels[inside], reduction="sum"))
    sum(losses).backward()
    assert_same_gradients(ours, reference)


@torch.no_grad()
def test_with_a_cache_token_by_token(twins):
    """Two prompts, the shorter one padded on the left, then 6 tokens more, one at a time."""
    reference, ours, ids = twins
    prompt, padding = 64, 9
    documents = torch.ones(2, 70, dtype=torch.int32)
    documents[1, :padding] = 0
    positions = (documents.cumsum(1) - 1).clamp(min=0)
    expected = torch.stack([logits_alone(reference, row)[-7:] for row in (ids[0], ids[1, padding:])])  # (2, 7, V)
    cache = KVCache(ours.config, 2, 70, torch.device("cpu"))
    pieces = [slice(0, prompt), *(slice(index, index + 1) for index in range(prompt, 70))]
    got = [
        ours(ids[:, piece], positions=positions[:, piece], documents=documents[:, piece], cache=cache, last_only=True)
        for piece in pieces
    ]
    assert (torch.cat(got, dim=1) - expected).abs().max() <= 2e-5 * max(1.0, expected.std().item())


BF16_CASES = [
    *("llama-3.1-scaled", "mistral-window", "qwen2-untied", "qwen3-tied", "gemma2-untied", "phi4-partial", "olmo2"),
    *("granite-tied", "glm4", "smollm3-tied", "qwen3-moe", "mixtral", "gpt-oss"),
]


@pytest.mark.parametrize("twins", [CASES[name] for name in BF16_CASES], ids=BF16_CASES, indirect=True)
def test_bf16_is_as_accurate_as_transformers(twins):
    """Against fp64, at most 1.2 times transformers' own bf16 error in root mean square (seen: 0.67 to 0.93)."""
    reference, ours, ids = twins
    frequencies = reference.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        exact = reference.double()(ids).logits
        reference.bfloat16().model.rotary_emb.inv_freq = frequencies  # their from_pretrained keeps it in fp32 too
        theirs, got = reference(ids).logits, ours.bfloat16()(ids)
    assert got.dtype == torch.bfloat16
    their_error, our_error = ((logits - exact).square().mean().sqrt() for logits in (theirs, got))
    assert 0 < our_error <= 1.2 * their_error


@pytest.mark.parametrize("twins", [CASES["gemma2-untied"]], ids=["gemma2-untied"], indirect=True)
def test_gemmas_embedding_scale_is_rounded(twins):
    """In bf16, sqrt(54) = 7.348 is 7.34375, as in training: the first block's input is transformers' bit for bit."""
    inputs = []
    for model in twins[:2]:
        model.model.layers[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
        model.bfloat16()(twins[2])
    assert torch.equal(*inputs)
    embedded = twins[1].model.embed_tokens(twins[2])
    assert not torch.equal(inputs[1], embedded * 54**0.5)
