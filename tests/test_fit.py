"""What a user is told of tokens that the model has never seen: advice that the recipe at hand can follow."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torchft.config import ASSETS
from torchft.data.tokenizer import load_tokenizer
from torchft.fit import warn_of_misfits
from torchft.models import build_model, read_config


@pytest.mark.parametrize("whole", [True, False])
def test_a_control_token_without_training_is_named(whole: bool) -> None:
    folder = ASSETS / "tiny_llama"
    tokenizer, model = load_tokenizer(folder), build_model(read_config(folder))
    model.init_weights(torch.Generator().manual_seed(0))
    fresh, known = sorted(tokenizer.control_ids)[:2]
    with torch.no_grad():
        model.model.embed_tokens.weight[fresh] = 0
    model.requires_grad_(whole)
    model.lm_head.weight.requires_grad_(True)  # tied: the table alone, as beside adapters
    said: list[str] = []
    warn_of_misfits(model, SimpleNamespace(ids=np.array([fresh, known])), tokenizer, 128, said.append)
    name, other = (tokenizer.decode([token], skip_special=False) for token in (fresh, known))
    assert len(said) == 1 and name in said[0] and other not in said[0]
    assert ("lora.modules_to_save" in said[0]) != whole and ("learned from nothing" in said[0]) == whole
