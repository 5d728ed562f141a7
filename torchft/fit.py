"""Whether data, tokenizer and model belong together; else an index error, or a model that never learns to stop."""

from collections.abc import Callable

import numpy as np

from torchft.data.dataset import Dataset
from torchft.data.tokenizer import Tokenizer
from torchft.errors import UserError
from torchft.modules.rope import BY_LENGTH
from torchft.modules.transformer import CausalLM, TransformerConfig
from torchft.modules.vocab import untrained_rows


def check_ids(config: TransformerConfig, tokenizer: Tokenizer, *datasets: Dataset | None) -> None:
    """Raises UserError, naming the token, if the data holds an id for which the model has no row.

    Also where two answers share a prompt that the model's RoPE would rotate for each of them in another way.
    """
    for dataset in datasets:
        _check_branches(config, dataset)
        largest = 0 if dataset is None else int(dataset.ids.max())
        if largest >= config.vocab_size:
            raise UserError(
                f"{dataset.key}: the tokenizer of {tokenizer.path} writes the id {largest} "
                f"({tokenizer.decode([largest], skip_special=False)!r}), but the model has {config.vocab_size:,} rows: "
                "tokenizer and config.json are of two models, or a token was added without data.new_tokens"
            )


def _check_branches(config: TransformerConfig, dataset: Dataset | None) -> None:
    if dataset is None or dataset.parts is None:  # no pairs
        return
    by_length = [rope for rope in (config.rope, *config.layer_ropes) if rope.kind in BY_LENGTH]
    limit = min((rope.original_max_positions for rope in by_length), default=0)
    trunk, chosen = dataset.parts.T
    longest = int(np.maximum(trunk + chosen, dataset.lengths - chosen).max())
    if by_length and longest > limit:
        raise UserError(
            f"{dataset.key}: a prompt with an answer takes {longest:,} tokens. Beyond {limit:,} this model's RoPE "
            f"({by_length[0].kind}) goes by the length of each text, and the two answers of a pair share one prompt: lower "
            "data.max_seq_len"
        )


def long_rows(config: TransformerConfig, max_seq_len: int) -> str:
    """A warning where rows are longer than any that the model has seen, or ""."""
    limit = config.max_position_embeddings
    if max_seq_len <= limit:
        return ""
    return f"WARNING: data.max_seq_len={max_seq_len} is beyond the {limit} positions that the model was trained on"


def warn_of_misfits(
    model: CausalLM, dataset: Dataset, tokenizer: Tokenizer, max_seq_len: int, say: Callable[[str], None]
) -> None:
    """Says what is allowed and seldom meant: rows longer than the model has seen, control tokens that it never has.

    `model` has its base weights. Tokens added in this run are left out: their rows are fresh on purpose.
    """
    if warning := long_rows(model.config, max_seq_len):
        say(warning)
    written = np.flatnonzero(np.bincount(dataset.ids))  # one pass; sorting 100 million ids would take seconds
    used = set(written.tolist()) & tokenizer.control_ids - set(tokenizer.added_ids)
    if untrained := untrained_rows(model, sorted(used)) if used else []:
        names = ", ".join(tokenizer.decode([token], skip_special=False) for token in untrained)
        advice = "Train the tables too (lora.modules_to_save=[embed_tokens,lm_head])"
        if all(param.requires_grad for param in model.parameters()):
            advice = "They are learned from nothing here, which takes many examples: see to that,"
        say(
            f"WARNING: the model seems never to have been trained on {names}, which the chat template writes. {advice} or "
            "choose another data.chat_template"
        )
