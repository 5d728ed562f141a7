"""Training the two ends of the model: embed_tokens and lm_head whole, or only the rows of added tokens.

Beside an adapter these weights are trained as they are (PEFT's `modules_to_save`), in fp32 over a base of any dtype.
For added tokens the tables grow, the new rows start near the mean of the old ones, and the gradient of the old rows is
zeroed after each backward, so that one ordinary Parameter serves; it costs the optimizer states of all rows.

Order: model on meta -> `add_lora` -> `grow_vocab` -> `train_modules` -> load the weights -> `init_new_rows`, and
`freeze_old_rows` after every backward. A tied model has one Parameter for both ends and keeps it. Where all weights are
trained, `grow_vocab` and `init_new_rows` are all there is to do.

Legend: V vocabulary, D hidden.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.modules.sharding import cut, local, rows_held, whole
from torchft.modules.transformer import CausalLM

PATHS = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}  # PEFT's short name -> ours
NEW_ROW_SPREAD = (
    0.1  # of the old rows' standard deviation: enough to tell new tokens apart, little enough to stay near the mean
)


class TrainedEmbedding(nn.Embedding):
    """An embedding whose fp32 weight is trained; the decoder casts its output. Made by `train_modules`."""


class TrainedHead(nn.Linear):
    """An lm_head whose fp32 weight is trained, computing in the dtype of its input. Made by `train_modules`."""

    def forward(self, h: Tensor) -> Tensor:  # (..., D) -> (..., V)
        return F.linear(h, self.weight.to(h.dtype))


def train_modules(model: CausalLM, names: tuple[str, ...] | list[str]) -> None:
    """Make embed_tokens, lm_head or both trainable in fp32, for the whole of their weights. Call it after `add_lora`.

    Raises:
        ValueError: another name, or one side of a tied pair: training it would change the other side too, and a file
            that holds only one would be read by others as an untied model.
    """
    unknown = [name for name in names if name not in PATHS]
    if unknown:
        raise ValueError(
            f"lora.modules_to_save: {unknown[0]!r} cannot be trained whole; only {' and '.join(PATHS)} can"
        )
    if is_tied(model) and len(set(names)) == 1:
        raise ValueError(
            f"lora.modules_to_save names only {names[0]}, but in this model embed_tokens and lm_head are one tied "
            "weight; name both: [embed_tokens, lm_head] trains them as one"
        )
    tied = is_tied(model)
    if "embed_tokens" in names:
        embedding = TrainedEmbedding(*model.model.embed_tokens.weight.shape, device="meta")
        embedding.weight = nn.Parameter(model.model.embed_tokens.weight.detach().float())
        model.model.embed_tokens = embedding
    if "lm_head" in names:
        vocab_size, hidden_size = model.lm_head.weight.shape
        head = TrainedHead(hidden_size, vocab_size, bias=False, device="meta")
        head.weight = model.model.embed_tokens.weight if tied else nn.Parameter(model.lm_head.weight.detach().float())
        model.lm_head = head


def trained_modules(model: CausalLM) -> tuple[str, ...]:
    """The names of PATHS that `train_modules` made trainable."""
    ends = {"embed_tokens": model.model.embed_tokens, "lm_head": model.lm_head}
    return tuple(name for name, module in ends.items() if isinstance(module, TrainedEmbedding | TrainedHead))


def is_tied(model: CausalLM) -> bool:
    """Whether embed_tokens and lm_head are one Parameter."""
    return model.lm_head.weight is model.model.embed_tokens.weight


def untie(model: CausalLM) -> None:
    """Give lm_head a weight of its own, equal to embed_tokens', for an adapter that changes one of the two.

    Loading the base fills both from the one tensor of its file; what is exported is marked untied.
    """
    if is_tied(model):
        weight = model.lm_head.weight
        model.lm_head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config = dataclasses.replace(model.config, tie_word_embeddings=False)


def grow_vocab(model: CausalLM, new_ids: range) -> int:
    """Append the rows that added tokens need to a model on meta; returns how many: 0 of no tokens, or where spare rows do."""
    return resize_vocab(model, max(new_ids.stop, model.config.vocab_size)) if new_ids else 0


def resize_vocab(model: CausalLM, new_size: int) -> int:
    """Append rows to embed_tokens and lm_head; returns how many.

    On meta the weights' loader fills the old rows; on a loaded model they are copied. The new rows hold zeros until
    `init_new_rows`. A table that has spare rows already (Qwen's do) is left as it is.

    Raises:
        ValueError: the tables would shrink.
    """
    old_size = model.config.vocab_size
    if new_size < old_size:
        raise ValueError(f"the vocabulary cannot shrink from {old_size:,} to {new_size:,} rows")
    tied = is_tied(model)
    embedding, head = model.model.embed_tokens, model.lm_head
    embedding.weight = _grown(embedding.weight, new_size)
    head.weight = embedding.weight if tied else _grown(head.weight, new_size)
    embedding.num_embeddings = head.out_features = new_size
    model.config = dataclasses.replace(model.config, vocab_size=new_size)
    return new_size - old_size


def _grown(weight: nn.Parameter, rows: int) -> nn.Parameter:
    """weight (V, D) -> (rows, D), zeros below."""
    if rows == weight.shape[0]:
        return weight
    padded = torch.cat([weight.detach(), weight.new_zeros(rows - weight.shape[0], weight.shape[1])])
    return nn.Parameter(padded, requires_grad=weight.requires_grad)


@torch.no_grad()
def init_new_rows(model: CausalLM, new_rows: range, generator: torch.Generator) -> None:
    """Fill the rows of added tokens with the mean of the rows before them, plus a small seeded spread.

    At the mean, a new token's logit lies within the range of the known ones (Hewitt 2021,
    https://www.cs.columbia.edu/~johnhew/vocab-expansion.html). A row of zeros, or one never trained, gets a probability
    that has nothing to do with its neighbours'.

    Args:
        new_rows: token ids, all after the known ones; empty: nothing is done.
        generator: a CPU generator, so that one seed gives the same rows on every device.
    """
    for weight in _end_weights(model) if new_rows else []:
        assert 0 < new_rows.start < new_rows.stop <= weight.shape[0], (new_rows, tuple(weight.shape))
        table = whole(weight)  # the weight itself unless it is divided
        old = table[: new_rows.start].float()
        noise = torch.randn(len(new_rows), weight.shape[1], generator=generator).to(weight.device)
        table[new_rows.start : new_rows.stop] = (old.mean(0) + NEW_ROW_SPREAD * old.std(0) * noise).to(weight.dtype)
        weight.copy_(cut(table, weight))


@torch.no_grad()
def freeze_old_rows(model: CausalLM, new_rows: range) -> None:
    """Zero the gradient of every row but those of added tokens. Call it after backward, before the norm is taken.

    AdamW then leaves the old rows bit for bit as they were, as long as its weight decay is 0 for these two weights.
    """
    for weight in _end_weights(model):
        if weight.grad is not None:
            first, grad = rows_held(weight).start, local(weight.grad)
            grad[: max(0, new_rows.start - first)] = 0
            grad[max(0, new_rows.stop - first) :] = 0


def _end_weights(model: CausalLM) -> list[nn.Parameter]:
    """embed_tokens' and lm_head's weight; one if they are tied."""
    return (
        [model.model.embed_tokens.weight] if is_tied(model) else [model.model.embed_tokens.weight, model.lm_head.weight]
    )


@torch.no_grad()
def untrained_rows(model: CausalLM, token_ids: list[int]) -> list[int]:
    """Which of these tokens' embeddings were probably never trained: their norm lies outside that of the ordinary rows.

    For the control tokens of a chat template: a base model has rows for them, but may never have seen them (Llama 3's
    reserved tokens). Ordinary is between half the 1st and twice the 99th percentile of all rows' norms.
    """
    norms = whole(torch.linalg.vector_norm(model.model.embed_tokens.weight, dim=1, dtype=torch.float32))
    low, high = torch.quantile(norms, torch.tensor([0.01, 0.99], device=norms.device)).tolist()
    chosen = norms[token_ids].tolist()
    return [token for token, norm in zip(token_ids, chosen, strict=True) if not low / 2 <= norm <= high * 2]
