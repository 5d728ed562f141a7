"""The tables of released sizes: each row is a whole config.json, and builds a model of the published size."""

import json

import pytest
import torch

from torchft.models import FAMILIES, build_model

# Published totals: the model cards, or the sum of the tensors' sizes in the checkpoints (a tied head counted once).
VISION_TOWER = 416_866_032  # SigLIP-So400m in Gemma 3 from 4B on, the same in all
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
    "DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama-1.1B": 1_100_048_384,
    "Yi-6B": 6_061_035_520,
    "Yi-1.5-9B": 8_829_407_232,
    "Yi-34B": 34_388_917_248,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.2": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Nemo-12B": 12_247_782_400,
    "Ministral-8B": 8_019_808_256,
    "Mixtral-8x7B": 46_702_792_704,
    "Mixtral-8x22B": 140_620_634_112,
    "Mistral-Small-24B": 23_572_403_200,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "SmolLM3-3B": 3_075_098_624,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-2-27B": 27_227_128_320,
    "Gemma-3-270M": 268_098_176,
    "Gemma-3-1B": 999_885_952,
    "Gemma-3-4B": 4_300_079_472 - VISION_TOWER - (1152 * 2560 + 1152),  # without the projection of the image tokens
    "Gemma-3-12B": 12_187_325_040 - VISION_TOWER - (1152 * 3840 + 1152),
    "Gemma-3-27B": 27_432_406_640 - VISION_TOWER - (1152 * 5376 + 1152),
    "Phi-3-mini-4k": 3_821_079_552,
    "Phi-3-medium-4k": 13_960_238_080,
    "Phi-4": 14_659_507_200,
    "Phi-4-mini": 3_836_021_760,
    "OLMo-2-1B": 1_484_916_736,
    "OLMo-2-7B": 7_298_617_344,
    "OLMo-2-13B": 13_716_198_400,
    "OLMo-2-32B": 32_234_279_936,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "Granite-3.2-2B": 2_533_531_648,
    "Granite-3.2-8B": 8_170_848_256,
    "Granite-3.3-2B": 2_533_539_840,
    "Granite-3.3-8B": 8_170_864_640,
    "GLM-4-9B-0414": 9_400_279_040,
    "GLM-4-32B-0414": 32_566_081_536,
}
SIZES = {name: hf for family in dict.fromkeys(FAMILIES.values()) for name, hf in family.SIZES.items()}


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
