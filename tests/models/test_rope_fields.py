"""RoPE settings: both spellings of every kind mean one thing, every setting matters, and the guide's example is real code."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from field_cases import BASES
from small_models import LLAMA3_ROPE, YARN_ROPE

from torchft.models import model_config
from torchft.modules.rope import rope_tables

REPO = Path(__file__).resolve().parents[2]
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 4.0, 5.0, 6.0]}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 16} | FACTORS
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3_ROPE,
    "yarn": {key: value for key, value in YARN_ROPE.items() if key != "rope_theta"},
    "longrope": LONG,
}
LLAMA = {key: value for key, value in BASES["llama"].items() if key not in ("rope_theta", "rope_parameters")}


def tables(hf: dict[str, Any], tokens: int) -> torch.Tensor:
    return torch.cat(rope_tables(model_config(hf).rope, torch.arange(tokens)[None]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "ministral", "smollm3", "gemma2", "olmo2", "granite"])
def test_both_spellings_are_one_config(family, kind):
    base = {key: value for key, value in BASES[family].items() if key not in ("rope_theta", "rope_parameters")}
    new = base | {"rope_parameters": KINDS[kind] | {"rope_theta": 500.0}}
    older = {"type" if key == "rope_type" else key: value for key, value in KINDS[kind].items()}
    assert model_config(new) == model_config(base | {"rope_theta": 500.0, "rope_scaling": older})
    assert model_config(new).rope.kind == kind and model_config(new).rope.theta == 500.0


def test_gemma3s_spellings_are_one_config():
    old = BASES["gemma3_text"]
    gone = ("rope_theta", "rope_local_base_freq", "rope_scaling")
    new = {key: value for key, value in old.items() if key not in gone} | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
    }
    config = model_config(new)
    assert config == model_config(old) and [rope.theta for rope in config.layer_ropes] == [50.0, 500.0]
    assert [rope.kind for rope in config.layer_ropes] == ["default", "linear"] and config.rope.theta == 500.0


def test_phi3s_spellings_are_one_config():
    old = BASES["phi3"]
    gone = ("rope_theta", "rope_scaling", "partial_rotary_factor")
    settings = {key: value for key, value in old["rope_scaling"].items() if key != "type"}
    settings |= {"rope_type": "longrope", "rope_theta": old["rope_theta"], "partial_rotary_factor": 0.5}
    new = {key: value for key, value in old.items() if key not in gone} | {"rope_parameters": settings}
    assert model_config(new) == model_config(old) == model_config(old | {"rope_scaling": old["rope_scaling"] | {"type": "su"}})
    inside = settings | {"original_max_position_embeddings": 16}  # as transformers 5 writes it
    assert model_config(new | {"rope_parameters": inside}) == model_config(old)


@pytest.mark.parametrize(
    "tokens, changes",
    [
        (16, {"short_factor": [1.0, 1.5, 2.0, 2.6]}),
        (17, {"long_factor": [3.0, 4.0, 5.0, 9.0]}),
        (17, {"original_max_position_embeddings": 17}),
        (3, {"factor": 3.0}),
        (3, {"attention_factor": 1.1}),
    ],
)
def test_every_longrope_setting_matters(tokens, changes):
    hf, changed = (LLAMA | {"rope_parameters": settings} for settings in (LONG, LONG | changes))
    assert not torch.allclose(tables(hf, tokens), tables(changed, tokens), atol=1e-4)


def test_factor_of_longrope_is_the_ratio_of_the_contexts_where_it_is_absent():
    given = model_config(LLAMA | {"rope_parameters": LONG | {"factor": LLAMA["max_position_embeddings"] / 16}})
    assert given == model_config(LLAMA | {"rope_parameters": LONG}) == model_config(LLAMA | {"rope_parameters": LONG | {"factor": None}})
    assert dataclasses.replace(given.rope, factor=1.0) != given.rope


def test_dynamic_goes_by_the_longest_position():
    dynamic = LLAMA | {"rope_parameters": KINDS["dynamic"]}
    plain = LLAMA | {"rope_parameters": KINDS["default"]}
    longest = LLAMA["max_position_embeddings"]
    torch.testing.assert_close(tables(dynamic, longest), tables(plain, longest), rtol=0, atol=1e-5)
    assert not torch.allclose(tables(dynamic, longest + 1), tables(plain, longest + 1), atol=1e-3)


def test_the_guides_example_is_the_familys_code():
    guide = (REPO / "docs" / "new_family.md").read_text("utf-8")
    code = guide.split("```python\n")[1].split("```")[0]
    doc = '    """The fields of a config.json -> our config. Raises ValueError naming a field that cannot be honoured."""\n'
    assert code in (REPO / "models" / "granite.py").read_text("utf-8").replace(doc, "")
    for name in ("models/__init__.py", "modules/block.py", "modules/transformer.py", "torchft/fuse.py", "tests/test_configs.py"):
        assert name in guide and (REPO / name).is_file()
    for line in guide.splitlines():
        if line.startswith("| tests/models/"):
            assert (REPO / line.split("|")[1].strip()).is_file(), line
