"""Takes secrets out of everything a run prints or writes: config, log, checkpoints, trackers.

Known are the values of environment variables with a telling name (HF_TOKEN, WANDB_API_KEY, ...), tokens by their shape
(hf_...), credentials in URLs, and strings under a telling key. Left out: secrets that look like ordinary words.
"""

import os
import re
from typing import Any

HIDDEN = "***"
# Whole words only: max_new_tokens and supervised_tokens are no secrets.
TELLING_NAME = re.compile(
    r"(^|[_.-])(token|secret|password|passwd|credentials?|api_?key|access_?key)($|[_.-])", re.IGNORECASE
)
TELLING_SHAPE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}"  # GitHub
    r"|\bAKIA[A-Z0-9]{16}\b"  # AWS
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password@host
)
SHORTEST_SECRET = 8  # characters; a shorter value of a telling variable (TOKEN=1) would hide half of every log


def redact_text(text: str) -> str:
    """`text` with every known secret replaced by ***."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and TELLING_NAME.search(name):
            text = text.replace(value, HIDDEN)
    return TELLING_SHAPE.sub(HIDDEN, text)


def redact(value: Any, key: str = "") -> Any:
    """A copy of a JSON-like value without secrets; `key` is the name it stands under."""
    if isinstance(value, dict):
        return {redact_text(str(name)): redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if isinstance(value, str):
        return HIDDEN if value and TELLING_NAME.search(key) else redact_text(value)
    return value
