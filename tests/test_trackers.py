"""TensorBoard and W&B, against stand-ins with the calls of tensorboard 2.20 and wandb 0.31."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from torchft.config import RunConfig
from torchft.errors import UserError
from torchft.metrics import RunLogger


@pytest.mark.parametrize(
    ("module", "tracker", "extra"),
    [("torch.utils.tensorboard", "tensorboard", "tensorboard"), ("wandb", "wandb:p", "wandb")],
)
def test_a_missing_tracker_names_its_extra(
    module: str, tracker: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # import then raises ImportError
    with pytest.raises(UserError, match=rf"pip install torchft-recipes\[{extra}\]"):
        RunLogger(RunConfig(out=str(tmp_path), trackers=[tracker]), {}, torch.device("cpu"))


def test_trackers_get_every_record_and_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int) -> None:
            calls.append(("open", log_dir, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append(("close",))

    def init(**options: Any) -> Any:
        calls.append(("init", options["project"], options["id"], options["resume"], options["config"]))
        log = lambda record, step: calls.append((record, step))  # noqa: E731
        return types.SimpleNamespace(id="abc", log=log, finish=lambda: calls.append(("finish",)))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=dict))
    state = None
    for step in (1, 2):
        run = RunConfig(out=str(tmp_path), trackers=["wandb:p", "tensorboard"])
        log = RunLogger(run, {"model": {"token": "secret", "path": "m"}}, torch.device("cpu"))
        log.begin(total_steps=2, steps_per_epoch=2, start_step=step - 1, state=state)
        loss, one = torch.tensor(1.0 / step), torch.ones(())
        log.step(step, loss=loss, supervised=1, tokens=1, lr=0.1, grad_norm=one, found_inf=one * 0)
        state = log.state()
        log.close()
    assert state["wandb_id"] == "abc"
    opened = [call for call in calls if call[0] in ("open", "init")]
    hidden = {"model": {"token": "***", "path": "m"}}
    assert opened == [
        ("open", str(tmp_path / "tensorboard"), 1),
        ("init", "p", None, "allow", hidden),
        ("open", str(tmp_path / "tensorboard"), 2),
        ("init", "p", "abc", "allow", hidden),
    ]
    assert ("loss", 1.0, 1) in calls and ("loss", 0.5, 2) in calls
    assert calls.count(("close",)) == calls.count(("finish",)) == 2
    sent = [call for call in calls if isinstance(call[0], dict)]
    assert [(record["loss"], step) for record, step in sent] == [(1.0, 1), (0.5, 2)]
