"""50 steps against PEFT (LoRA, rsLoRA, DoRA, both ends) and TRL (DPO): every step's loss, and the mean difference. PITFALLS 2d.

tests/test_lora_training.py and tests/recipes/test_dpo_trl.py hold the loops; they run 30 steps of it in `make test`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import test_dpo_trl
import test_lora_training
from scale import scaled
from tiny_models import load_with_adapter, make_base
from tiny_training import hide_cuda

STEPS = scaled(5, 50)


def check(ours: list[float], theirs: list[float], tally: Callable) -> None:
    assert len(ours) == len(theirs) == STEPS
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    worst, drift = max(map(abs, differences)), abs(sum(differences)) / STEPS
    assert worst <= 1e-4 and drift <= 1e-5
    assert ours[-1] < 0.95 * ours[0], "a curve that does not fall compares nothing"
    tally(1, "curves", f"{STEPS} steps", **{"a step": worst, "mean": drift})


@pytest.mark.parametrize("case", test_lora_training.CASES if scaled(0, 1) else ["rslora"])
def test_peft(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable) -> None:
    monkeypatch.setattr(test_lora_training, "NUM_STEPS", STEPS)
    spec, names = test_lora_training.CASES[case]
    make_base(tmp_path)
    model = load_with_adapter(tmp_path, spec, names, trained=False)
    theirs = test_lora_training.peft_losses(tmp_path, model, spec, names)
    check(test_lora_training.our_losses(model), theirs, tally)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not scaled(0, 1), reason="30 steps of it are in tests/recipes/test_dpo_trl.py")
def test_trl(small_model: Path, pair_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable) -> None:
    hide_cuda(monkeypatch)
    monkeypatch.setattr(test_dpo_trl, "STEPS", STEPS)
    ours, theirs = test_dpo_trl.both_curves(small_model, pair_data, tmp_path)
    check([record["loss"] for record in ours], [record["loss"] for record in theirs], tally)
