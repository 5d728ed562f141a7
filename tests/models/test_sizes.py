"""The tables of released sizes: each row is a whole config.json, and builds a model of the published size."""

import json

import pytest
import torch

from torchft.models import FAMILIES, build_model, llama, mistral, qwen2, qwen3

# Published totals: the model cards, or the sum of the tensors' sizes in the checkpoints (a tied head counted once).
PUBLISHED = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.3-70B": 70_553_706_496,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.2": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Nemo-12B": 12_247_782_400,
    "Mistral-Small-24B": 23_572_403_200,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}
SIZES = llama.SIZES | mistral.SIZES | qwen2.SIZES | qwen3.SIZES


def test_every_size_has_a_published_count():
    assert SIZES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_equal_the_published_ones(name):
    with torch.device("meta"):
        model = build_model(SIZES[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_sizes_are_whole_config_files():
    for name, hf in SIZES.items():
        assert json.loads(json.dumps(hf)) == hf, name
        assert hf["architectures"][0] in FAMILIES, name
