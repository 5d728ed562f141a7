"""Every field of a config.json changes the numbers, or is refused by name, or stands in a written set of inert ones."""

import copy
from typing import Any

import pytest
import torch
from field_cases import BASE, BASES, EXTRA, FAMILY_MUTATIONS, LONG_ROPE, MUTATIONS, REFUSED, ROPE, ROPE_MUTATIONS
from transformers import AutoConfig

from torchft.balance import balance_routers
from torchft.data.loader import Batch
from torchft.models import FAMILIES, build_model, fields, llama, model_config, read_config


def outputs(hf: dict[str, Any]) -> list[torch.Tensor]:
    """Logits and parameters of the freshly initialised model: what every honoured field has a part in. Of a mixture a step's
    gradients too, in which alone the router's auxiliary loss shows.
    """
    model = build_model(hf)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.1)
        ids = torch.arange(40).remainder(61)[None]
        logits = model(ids)
    if model.config.moe is not None:
        balance_routers(model, [Batch(ids, ids, None, None, 40, 40)], torch.device("cpu"))
        (model(ids, labels=ids) / 40).backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [logits, *model.state_dict().values(), *grads]


def differ(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return True
    return any((a - b).abs().max() > 1e-4 for a, b in zip(one, other, strict=True))


# They decide how long the lists of Phi-3's LongRoPE must be.
ROTATED_WIDTH = [("phi3", key) for key in ("hidden_size", "num_attention_heads", "partial_rotary_factor")]


def honoured(family: str) -> list[str]:
    return [key for key in (*BASES[family], *EXTRA.get(family, ())) if key in MUTATIONS and BASES[family].get(key, 0) is not None]


@pytest.mark.parametrize("family, key", [(family, key) for family in BASES for key in honoured(family)])
def test_every_honoured_field_matters(family, key):
    base = BASES[family]
    if key == "rope_theta" and base.get("rope_parameters"):  # read where these have none
        base = base | {"rope_parameters": {k: v for k, v in ROPE.items() if k != "rope_theta"}}
    value = FAMILY_MUTATIONS.get(family, {}).get(key, MUTATIONS[key])
    if (family, key) in ROTATED_WIDTH:
        with pytest.raises(ValueError, match="one for each pair of rotated dimensions"):
            model_config(base | {key: value})
    else:
        assert differ(outputs(base), outputs(base | {key: value}))


@pytest.mark.parametrize("family, key", [(family, key) for family in REFUSED for key in REFUSED[family]])
def test_a_field_with_one_right_value_is_refused_by_name(family, key):
    with pytest.raises(ValueError, match=key):
        model_config(BASES[family] | {key: REFUSED[family][key]})


@pytest.mark.parametrize("key", ROPE_MUTATIONS)
def test_every_rope_setting_matters(key):
    base = BASES["llama"]
    mutated = ROPE | {key: ROPE_MUTATIONS[key]}
    if key == "rope_type":
        mutated = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    assert differ(outputs(base), outputs(base | {"rope_parameters": mutated}))


@pytest.mark.parametrize(
    "key, value",
    [("beta_fast", 16.0), ("beta_slow", 2.0), ("truncate", False), ("attention_factor", 1.1), ("factor", 5.0)],
)
def test_every_yarn_setting_matters(key, value):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 100.0}
    base = BASES["qwen3"] | {"head_dim": 24}
    assert differ(outputs(base | {"rope_parameters": yarn}), outputs(base | {"rope_parameters": yarn | {key: value}}))


def test_max_position_embeddings_is_where_rope_scaling_falls_back_to():
    rope = {key: value for key, value in ROPE.items() if key != "original_max_position_embeddings"}
    base = BASES["llama"] | {"rope_parameters": rope, "max_position_embeddings": 16}
    assert not differ(outputs(base), outputs(BASES["llama"]))
    assert differ(outputs(base), outputs(base | {"max_position_embeddings": 32}))


@pytest.mark.parametrize("family", BASES)
def test_every_field_of_transformers_own_config_is_accounted_for(family):
    known = AutoConfig.for_model(family).to_dict()
    honoured_keys = set(honoured(family)) | {"max_position_embeddings", "rope_scaling", "rope_parameters"}
    inert = fields.INERT | vars(FAMILIES[BASES[family]["architectures"][0]]).get("INERT", frozenset())
    unaccounted = set(known) - {"_sliding_window_pattern"} - inert - set(fields.NEUTRAL) - honoured_keys
    unaccounted -= set(REFUSED.get(family, {}))
    assert unaccounted == set()


READ_BY = {"hidden_act": ("gemma2", "gemma3_text"), "partial_rotary_factor": ("phi3", "glm4"), "auto_map": ("phi3",)}
READ_BY["quantization_config"] = ("gpt_oss",)


@pytest.mark.parametrize(
    "family, key", [(family, key) for family in BASES for key in fields.NEUTRAL if family not in READ_BY.get(key, ())]
)
def test_a_field_we_cannot_honour_is_refused_by_name(family, key):
    for value in fields.NEUTRAL[key]:
        model_config(BASES[family] | {key: value})
    with pytest.raises(ValueError, match=rf"config\.json: {key} is 'other', which cannot be honoured"):
        model_config(BASES[family] | {key: "other"})


@pytest.mark.parametrize("family", BASES)
def test_an_unknown_field_is_refused_by_name(family):
    with pytest.raises(ValueError, match=r"logit_softcap \(30\.0\) is not a known field"):
        model_config(BASES[family] | {"logit_softcap": 30.0})


@pytest.mark.parametrize("family, key", [("mistral", "attention_bias"), ("qwen2", "mlp_bias"), ("olmo2", "mlp_bias")])
def test_another_familys_field_is_refused(family, key):
    with pytest.raises(ValueError, match=key):
        model_config(BASES[family] | {key: True})


@pytest.mark.parametrize("family", BASES)
def test_inert_fields_are_inert(family):
    inert = dict.fromkeys(sorted(fields.INERT - {"architectures"}), 7)
    assert model_config(BASES[family] | inert) == model_config(BASES[family])


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("vocab_size", "61", "vocab_size is '61'"),
        ("vocab_size", True, "vocab_size is True"),
        ("hidden_size", -24, "hidden_size is -24"),
        ("num_hidden_layers", 2.0, "num_hidden_layers is 2.0"),
        ("num_key_value_heads", 3, "a divisor of num_attention_heads = 4"),
        ("head_dim", 7, "an even number"),
        ("rms_norm_eps", 0, "rms_norm_eps is 0"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        ("tie_word_embeddings", "no", "tie_word_embeddings is 'no'"),
        ("rope_parameters", {"rope_type": "proportional"}, "rope_type is 'proportional'; .* one of default, linear, dynamic"),
        ("rope_parameters", {"rope_type": "dynamic"}, "factor is missing"),
        ("rope_parameters", {"rope_type": "longrope"}, "short_factor is missing"),
        ("rope_parameters", LONG_ROPE, "short_factor is .* a list of 4 numbers above 0"),
        ("rope_parameters", LONG_ROPE | {"short_factor": [1, 1, 1, -1]}, "short_factor is"),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("rope_parameters", {"rope_type": "linear"}, "factor is missing"),
        ("rope_parameters", {"rope_type": "default", "factor": 2.0}, r"factor \(2.0\)"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}, "mscale"),
        ("rope_parameters", {"full_attention": ROPE}, "full_attention"),
        ("rope_parameters", {"rope_type": "linear", "type": "default", "factor": 2.0}, "type is 'default'"),
        ("rope_parameters", [], "rope_parameters is"),
        ("rope_parameters", "linear", "rope_parameters is 'linear'"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope_scaling is"),
        (
            "architectures",
            ["GPT2LMHeadModel"],
            "'GPT2LMHeadModel' is not supported; known are LlamaForCausalLM, Mistral.* write models/gpt2lmheadmodel.py: docs/new_f",
        ),
        ("architectures", ["LlamaForSequenceClassification"], "a reward model, .* transformers' AutoModelForSequenceClassification reads it"),
        ("architectures", ["Gemma3ForConditionalGeneration"], "not supported.* images too; its text part can be saved"),
        ("architectures", None, "architectures is None"),
        ("architectures", [["LlamaForCausalLM"]], "architecture .* is not supported"),
    ],
)
def test_bad_values_are_refused_by_name(key, value, message):
    with pytest.raises(ValueError, match=message):
        model_config(BASES["llama"] | {key: value})


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("qwen2", {"layer_types": ["full_attention"]}, "2 times full_attention or sliding_attention"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False}, "use_sliding_window true"),
        ("qwen3", {"sliding_window": 0, "max_window_layers": 0}, "sliding_window is 0"),
        ("qwen3", {"max_window_layers": "1"}, "max_window_layers is '1'"),
        ("qwen3", {"layer_types": 2}, "layer_types is 2"),
        ("llama", {"hidden_size": 26, "head_dim": None}, "hidden_size is 26"),
        ("phi3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type is 'dynamic'; Phi-3 models need"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "type is 'yarn'; Phi-3 models need 'default' or 'longrope'"),
        ("phi3", {"rope_scaling": LONG_ROPE | {"original_max_position_embeddings": 8}}, "original_max_position_embeddings is 8"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("glm4", {"partial_rotary_factor": 0.4}, "an even number of the 8 dimensions"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers is"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False}, "use_sliding_window true"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "only one of rope_scaling and rope_par"),
        ("gemma3_text", {"_sliding_window_pattern": 3}, "_sliding_window_pattern is 3"),
        ("gemma3_text", {"rope_scaling": None, "rope_parameters": {"other": {}}}, "other"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ("llama", {"rope_scaling": ROPE, "rope_theta": None}, "rope_theta is None"),
    ],
)
def test_contradictions_are_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        model_config(BASES[family] | changes)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_missing_shape_is_an_error(key):
    with pytest.raises(ValueError, match=f"{key} is missing"):
        model_config({k: v for k, v in BASES["llama"].items() if k != key})


def test_both_spellings_of_rope_are_one_config():
    scaling = {key: value for key, value in ROPE.items() if key not in ("rope_theta", "rope_type")} | {"type": "llama3"}
    plain = {key: value for key, value in BASES["llama"].items() if key != "rope_parameters"}
    old = plain | {"rope_scaling": scaling, "rope_theta": 5000.0}
    new = {k: v for k, v in plain.items() if k != "rope_theta"} | {"rope_parameters": ROPE | {"rope_theta": 5000.0}}
    assert model_config(old) == model_config(new)
    assert model_config(old).rope.theta == 5000.0


@pytest.mark.parametrize("family", BASES)
def test_absent_fields_have_transformers_defaults(family):
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    hf = {key: BASE[key] for key in required} | {"architectures": BASES[family]["architectures"]}
    hf |= {"num_attention_heads": 32, "hidden_size": 64}
    ours, theirs = model_config(hf), AutoConfig.for_model(family, **hf)
    names = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "initializer_range")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    theta = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)["rope_theta"]
    assert ours.rope.theta == theta and ours.rope.kind == theirs.rope_parameters.get("rope_type", "default")
    assert ours.rope.partial_rotary_factor == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert ours.head_dim == getattr(theirs, "head_dim", None) or 64 // 32
    window = getattr(theirs, "sliding_window", None) if getattr(theirs, "use_sliding_window", True) else None
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 2
    assert ours.sliding_windows == (() if window is None else tuple(window if "sliding" in kind else None for kind in kinds))
    if family != "glm4":  # half of 2 dimensions cannot be rotated
        follows = model_config(hf | {"num_key_value_heads": None, "head_dim": None})
        assert (follows.num_key_value_heads, follows.head_dim) == (32, 2)


def test_a_published_config_json_is_read(tmp_path):
    published = """{
      "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
      "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
      "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
      "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
      "pretraining_tp": 1, "rms_norm_eps": 1e-05,
      "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                       "original_max_position_embeddings": 8192, "rope_type": "llama3"},
      "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
      "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256
    }"""
    (tmp_path / "config.json").write_text(published)
    assert model_config(read_config(tmp_path)) == model_config(llama.SIZES["Llama-3.2-1B"])


@pytest.mark.parametrize("family", BASES)
def test_what_transformers_writes_is_read(family, tmp_path):
    hf = {key: value for key, value in copy.deepcopy(BASES[family]).items() if value is not None}
    AutoConfig.for_model(family, **hf).save_pretrained(tmp_path)
    assert model_config(read_config(tmp_path)) == model_config(BASES[family])


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"vocab_size": 61,}', "not valid JSON"),
        (b'{"vocab_size": 61, "vocab_size": 62}', "key 'vocab_size' stands there twice"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1, 2]", "holds a list"),
        (None, "no such file"),
    ],
)
def test_a_broken_config_file_is_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
