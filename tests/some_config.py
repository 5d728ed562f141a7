"""A recipe's options for tests of the parser, and short ways to read and to refuse a config."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from torchft.config import (
    DataConfig,
    KtoOptions,
    LoraOptions,
    ModelConfig,
    OptimConfig,
    PreferenceOptions,
    RewardOptions,
    RunConfig,
)
from torchft.errors import ConfigError
from torchft.options import list_options
from torchft.parse import read_config


@dataclass
class Config:
    """A recipe's options with one field of its own."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    beta: float = 0.1  # of a loss of its own


@dataclass
class PreferenceConfig(Config):
    """With the groups that recipes of preferences have of their own; each recipe has one of them."""

    dpo: PreferenceOptions = field(default_factory=PreferenceOptions)
    kto: KtoOptions = field(default_factory=KtoOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)


NAMES = [option.name for option in list_options(Config)]
NEEDED = ["model.path=m", "data.train=a.jsonl"]  # without them every config is refused


def read(yaml: str, tmp_path: Path, *overrides: str) -> Config:
    """The config of a YAML text and overrides; files that it names need not exist."""
    file = tmp_path / "c.yaml"
    file.write_text(yaml, encoding="utf-8")
    own = any(text.startswith(("dpo.", "kto.", "reward.")) for text in overrides)
    return read_config(PreferenceConfig if own else Config, str(file), list(overrides), paths=False)


def refused(yaml: str, tmp_path: Path, *overrides: str) -> str:
    """The message with which a config is refused, the directory of the file left out."""
    with pytest.raises(ConfigError) as caught:
        read(yaml, tmp_path, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")
