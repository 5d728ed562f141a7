"""Canaries in the environment, the config and the printed text: none may reach a file or the screen."""

from pathlib import Path

import pytest
import torch
from tiny_training import TinyRun

from torchft.checkpoint import save_checkpoint
from torchft.config import RunConfig
from torchft.metrics import RunLogger
from torchft.redact import redact, redact_text

CANARIES = {"HF_TOKEN": "canary-in-the-environment", "WANDB_API_KEY": "c0ffee" * 6}
SECRET_CONFIG = {
    "model": {"path": "https://me:canary-pass@host/x", "hf_token": "canary-by-key", "note": "hf_canarycanarycanary1"},
    "data": {"train": [{"path": "s3", "api_key": "canary-in-a-list"}], "chat_template": "canary-in-the-environment"},
}


def test_no_secret_reaches_a_file_or_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PITFALLS S6."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    log = RunLogger(RunConfig(out=str(tmp_path)), SECRET_CONFIG, torch.device("cpu"))
    log.begin(total_steps=1, steps_per_epoch=1)
    log.print("login with " + CANARIES["WANDB_API_KEY"])
    log.validation(1, valid_loss=0.5)
    run = TinyRun().train(0, 1)
    save_checkpoint(
        tmp_path, 1, params=run.params, optimizer=run.optimizer, state=log.state(), config=SECRET_CONFIG, keep_last=1
    )
    log.close()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    shown = "".join(capsys.readouterr())
    assert b"***" in written and "login with ***" in shown
    for secret in ("canary", "c0ffee" * 2):
        assert secret.encode() not in written and secret not in shown


def test_redaction_spares_what_is_no_secret() -> None:
    plain = {"run": {"max_new_tokens": 128, "new_tokens": ["<tool>"], "trackers": ["wandb:token-study"]}, "lr": 1e-4}
    assert redact(plain) == plain
    assert redact_text("12 tokens, step 3, sk-ipped, hf_model, user@host:8080") == (
        "12 tokens, step 3, sk-ipped, hf_model, user@host:8080"
    )
    assert redact({"token": "", "password": "x", "n": [("a", 1)]}) == {"token": "", "password": "***", "n": [["a", 1]]}
