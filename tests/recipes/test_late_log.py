"""A recipe whose log is read late, as on a GPU, when a step is not finite."""

from pathlib import Path

import pytest
import torch
from test_lora_single_device import log_records, options

from torchft import metrics
from torchft.errors import UserError
from torchft.metrics import RunLogger
from torchft.recipes import lora_single_device as recipe


@pytest.mark.parametrize("bad, more", [(3, "run.save_every=2"), (4, "run.save_every=2"), (4, "run.eval_every=4")])
def test_not_finite_stops_the_run_before_anything_is_validated_or_saved(
    bad: int, more: str, small_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the next step at the latest, of which no record is left either."""
    steps, original, validations = 0, recipe.clip_and_check, []

    class Late(RunLogger):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            self._runs_behind = True

    def poisoned(params: dict, max_norm: float, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal steps
        steps += 1
        return original(params, max_norm, loss * (float("nan") if steps == bad else 1.0))

    monkeypatch.setattr(recipe, "RunLogger", Late)
    monkeypatch.setattr(recipe, "clip_and_check", poisoned)
    monkeypatch.setattr(recipe, "evaluate", lambda *arguments: validations.append(arguments) or 1.0)
    monkeypatch.setattr(metrics, "SHORT_STEP", float("inf"))
    with pytest.raises(UserError, match=f"^step {bad}: the loss or gradient norm is not finite"):
        recipe.main(options(small_model, chat_data, tmp_path, more, "data.valid_fraction=0.1", "run.epochs=9"))
    assert steps == 4
    assert [record["step"] for record in log_records(tmp_path)] == list(range(1, bad))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == (["step_000002"] if "save" in more else [])
    assert not validations
