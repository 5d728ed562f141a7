"""The rotation's tables: fp32 whatever the model's dtype, right at long range, and the rotation itself."""

import math

import pytest
import torch

from torchft.modules.rope import RopeConfig, apply_rope, document_lengths, inverse_frequencies, rope_tables
from torchft.modules.transformer import CausalLM, TransformerConfig


def exact_tables(rope: RopeConfig, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unscaled tables in Python's double precision."""
    pairs = range(rope.head_dim // 2)
    angles = [position * rope.theta ** (-2 * pair / rope.head_dim) for pair in pairs]
    return torch.tensor([math.cos(a) for a in angles]), torch.tensor([math.sin(a) for a in angles])


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("position", [0, 1, 4095, 131071])
def test_tables_are_exact_to_fp32(theta, position):
    rope = RopeConfig(head_dim=128, theta=theta)
    cos, sin = rope_tables(rope, torch.tensor([[position]]))
    expected_cos, expected_sin = exact_tables(rope, position)
    assert cos.dtype == sin.dtype == torch.float32
    # An fp32 angle of p radians is known to some p * 2^-23; PITFALLS M1 saw 1.4e-4 at 4,095 in fp32 and 1.69 in bf16.
    bound = 4e-7 * max(position, 1)
    assert (cos[0, 0] - expected_cos).abs().max() <= bound
    assert (sin[0, 0] - expected_sin).abs().max() <= bound


def test_llama3_stretches_slow_pairs_and_keeps_fast_ones():
    plain = inverse_frequencies(RopeConfig(head_dim=128, theta=500000.0))
    scaled = inverse_frequencies(
        RopeConfig(head_dim=128, theta=500000.0, kind="llama3", factor=8.0, original_max_positions=8192)
    )
    turns = 8192 * plain / (2 * math.pi)
    ratio = plain / scaled
    assert torch.equal(ratio[turns > 4.0], torch.ones_like(ratio[turns > 4.0]))
    torch.testing.assert_close(ratio[turns < 1.0], torch.full_like(ratio[turns < 1.0], 8.0))
    between = ratio[(turns <= 4.0) & (turns >= 1.0)]
    assert len(between) > 0 and (between > 1.0).all() and (between < 8.0).all()


def test_rotation_keeps_norms_and_depends_on_distance_only():
    rope = RopeConfig(head_dim=16)
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(q_position: int, k_position: int) -> torch.Tensor:
        rotated_q = apply_rope(q, *rope_tables(rope, torch.tensor([[q_position]])))
        rotated_k = apply_rope(k, *rope_tables(rope, torch.tensor([[k_position]])))
        torch.testing.assert_close(rotated_q.norm(), q.norm())
        return (rotated_q * rotated_k).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), rtol=1e-4, atol=1e-4)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-2


def test_halves_are_paired_not_neighbours():
    """HF's layout: dimension i turns with i + E/2. Meta's pairs 2i with 2i + 1."""
    rope = RopeConfig(head_dim=4)
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    rotated = apply_rope(x, *rope_tables(rope, torch.tensor([[1]])))
    torch.testing.assert_close(rotated.flatten(), torch.tensor([math.cos(1), 0.0, math.sin(1), 0.0]))


def test_rotation_is_computed_in_fp32_and_returned_in_the_inputs_dtype():
    rope = RopeConfig(head_dim=64)
    torch.manual_seed(0)
    x = torch.randn(1, 1, 2, 64).bfloat16()
    tables = rope_tables(rope, torch.tensor([[4095]]))
    got = apply_rope(x, *tables)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rope(x.float(), *tables).bfloat16())


def test_casting_the_model_leaves_the_tables_alone():
    rope = RopeConfig(head_dim=8, kind="llama3", factor=8.0, original_max_positions=64)
    config = TransformerConfig(17, 16, 24, 1, 2, 1, 8, 1e-5, rope, 128, False)
    seen = []

    def record(module: torch.nn.Module, args: tuple) -> None:
        seen.append(args[1:3])

    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            model = CausalLM(config).to(dtype)
        model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(0))
        model.model.layers[0].register_forward_pre_hook(record)
        logits[dtype] = model(torch.arange(17)[None], positions=torch.arange(4079, 4096)[None])
        assert not any("rot" in name or "freq" in name for name in model.state_dict())
    (cos, sin), (cos_low, sin_low) = seen
    assert cos_low.dtype == sin_low.dtype == torch.float32
    assert torch.equal(cos, cos_low) and torch.equal(sin, sin_low)
    assert logits[torch.bfloat16].dtype == torch.bfloat16


def test_a_documents_length_is_its_own():
    """Packed rows, left padding, and a cache that will hold 5 tokens more: the last document of a row grows, no other."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 0, 1, 2, 3, 4, 5]])
    assert document_lengths(positions).tolist() == [[3, 3, 3, 2, 2, 3, 3, 3], [1, 1, 6, 6, 6, 6, 6, 6]]
    assert document_lengths(positions, more=5).tolist() == [[3, 3, 3, 2, 2, 8, 8, 8], [1, 1, 11, 11, 11, 11, 11, 11]]
    assert document_lengths(torch.tensor([[7], [3]]), more=2).tolist() == [[10], [6]]


def test_longrope_takes_its_long_factors_beyond_the_original_length():
    rope = RopeConfig(
        4, kind="longrope", factor=4.0, original_max_positions=16, short_factors=(1.0, 2.0), long_factors=(8.0, 16.0)
    )
    lengths = torch.tensor([[15, 16, 17]])
    plain = torch.tensor([1.0, 0.01])
    expected = torch.stack([plain / torch.tensor(f) for f in ((1.0, 2.0), (1.0, 2.0), (8.0, 16.0))])
    torch.testing.assert_close(inverse_frequencies(rope, lengths)[0], expected)
    cos, _ = rope_tables(rope, torch.zeros(1, 1, dtype=torch.int64))
    assert cos[0, 0, 0].item() == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))


def test_dynamic_stretches_the_slowest_pair_by_the_excess():
    """At twice the original length and factor 1, theta is such that the slowest pair turns half as fast (NTK's definition)."""
    rope = RopeConfig(8, kind="dynamic", factor=1.0, original_max_positions=32)
    plain = inverse_frequencies(RopeConfig(8))
    inside, beyond = inverse_frequencies(rope, torch.tensor([[32, 64]]))[0]
    torch.testing.assert_close(inside, plain)
    assert beyond[-1].item() == pytest.approx(plain[-1].item() / 2) and beyond[0] == plain[0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_leaves_the_rest_alone(interleaved):
    rope = RopeConfig(head_dim=12, partial_rotary_factor=0.5)
    x = torch.randn(2, 5, 3, 12)
    tables = rope_tables(rope, torch.arange(5)[None])
    y = apply_rope(x, *tables, interleaved)
    assert tables[0].shape == (1, 5, 3) and torch.equal(y[..., 6:], x[..., 6:])
    assert torch.equal(y[..., :6], apply_rope(x[..., :6], *tables, interleaved)) and not torch.equal(y[:, 1:, :, :6], x[:, 1:, :, :6])
    pairs = y[..., :6].unflatten(-1, (3, 2)) if interleaved else y[..., :6].unflatten(-1, (2, 3)).transpose(-1, -2)
    before = x[..., :6].unflatten(-1, (3, 2)) if interleaved else x[..., :6].unflatten(-1, (2, 3)).transpose(-1, -2)
    torch.testing.assert_close(pairs.norm(dim=-1), before.norm(dim=-1))


def test_without_rope_nothing_moves():
    rope = RopeConfig(head_dim=12, partial_rotary_factor=0.0)
    x = torch.randn(1, 5, 3, 12)
    assert torch.equal(apply_rope(x, *rope_tables(rope, torch.arange(5)[None])), x)
