"""The decoder-only transformer that all families share, with the names of Hugging Face checkpoints.

    ids -> embed_tokens -> layers x [ x + attention(norm(x)), x + mlp(norm(x)) ] -> norm -> lm_head

What differs between families (biases, norms, windows, RoPE, scales, caps) is a field of TransformerConfig, which the files
in `models/` make from a config.json; where the norms of a layer stand is its block (block.py). `__init__` runs on the meta
device; weights are streamed in, or filled by `init_weights`.

Legend: B batch, T tokens, D hidden, E head_dim, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from torchft.modules.attention import LayerCache, build_mask
from torchft.modules.block import BLOCKS
from torchft.modules.checkpointing import Checkpointing
from torchft.modules.int8_head import Int8Head
from torchft.modules.loss import linear_cross_entropy, linear_logprobs, soft_cap
from torchft.modules.moe import MoeConfig, share_balance
from torchft.modules.norm import build_norm
from torchft.modules.rope import BY_LENGTH, RopeConfig, inverse_frequencies, rope_tables
from torchft.modules.tree_mask import build_tree_mask


@dataclass(frozen=True)
class TransformerConfig:
    """Every shape and choice of one model, under the names of config.json where it has one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig  # of all layers, unless layer_ropes says otherwise
    max_position_embeddings: int  # longest sequence it was trained on; not enforced
    tie_word_embeddings: bool  # lm_head.weight is embed_tokens.weight
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_over_heads: bool = False  # one norm over the whole width of q and of k (OLMo 2), not one per head
    norm_offset: bool = False  # norms multiply by 1 + weight (Gemma)
    block: str = "pre_norm"  # where the norms stand: a name of block.BLOCKS
    activation: str = "silu"  # of the feed forward's gate: silu | gelu_tanh
    packed_qkv: bool = False  # q, k and v are one linear, qkv_proj
    packed_gate_up: bool = False  # gate and up are one linear, gate_up_proj
    sliding_windows: tuple[int | None, ...] = ()  # tokens seen back, itself included, per layer; () = no layer has one
    layer_ropes: tuple[RopeConfig, ...] = ()  # per layer; () = `rope` in all of them
    initializer_range: float = 0.02  # standard deviation of freshly initialised weights
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of block "scaled"
    attention_multiplier: float | None = None  # of the scores; None = 1 / sqrt(head_dim)
    attn_logit_softcapping: float | None = None  # scores become cap * tanh(score / cap)
    attention_sinks: bool = False  # a trained score of each head that takes its share of the softmax (gpt-oss)
    final_logit_softcapping: float | None = None  # and logits likewise
    logits_scaling: float = 1.0  # logits are divided by it
    moe: MoeConfig | None = None  # the feed forwards are mixtures of experts

    def __post_init__(self) -> None:
        assert self.num_attention_heads % self.num_key_value_heads == 0, (
            self.num_attention_heads,
            self.num_key_value_heads,
        )
        assert len(self.sliding_windows) in (0, self.num_hidden_layers), self.sliding_windows
        assert len(self.layer_ropes) in (0, self.num_hidden_layers), self.layer_ropes
        assert all(rope.head_dim == self.head_dim for rope in (self.rope, *self.layer_ropes)), (self.rope, self.head_dim)


class KVCache:
    """Keys and values of the tokens so far, of all layers, for generation. One column is one token of every row.

    Rows of different lengths are padded on the left, with documents telling padding from text.
    """

    def __init__(self, config: TransformerConfig, batch_size: int, max_tokens: int, device: torch.device) -> None:
        shape = (batch_size, config.num_key_value_heads, max_tokens, config.head_dim)
        self.layers = [LayerCache(shape) for _ in range(config.num_hidden_layers)]
        self.capacity = max_tokens  # columns in all
        self.documents = torch.zeros(batch_size, max_tokens, dtype=torch.int32, device=device)
        self.length = 0  # columns filled

    def extend(self, num_tokens: int, documents: Tensor | None) -> Tensor:
        """Take in the documents (B, T) of the next columns (None = 0); returns those of all columns so far, (B, S)."""
        start, self.length = self.length, self.length + num_tokens
        if documents is not None:
            self.documents[:, start : self.length] = documents
        return self.documents[:, : self.length]


class Decoder(nn.Module):
    """From token ids to normalised hidden states."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.ropes = config.layer_ropes or (config.rope,) * config.num_hidden_layers
        self.beyond_sdpa = config.attn_logit_softcapping is not None or config.attention_sinks
        self.multiplier = config.embedding_multiplier
        self.frequencies: dict[tuple[RopeConfig, torch.device], Tensor] = {}
        self.windows = config.sliding_windows or (None,) * config.num_hidden_layers
        self.checkpointing = Checkpointing()  # replaced by apply_activation_checkpointing
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BLOCKS[config.block](config, layer) for layer in range(config.num_hidden_layers))
        self.norm = build_norm(config, config.hidden_size)
        self.balance = share_balance(self.layers, config.moe)  # None for most models

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        cache: KVCache | None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, D); arguments as in CausalLM.forward."""
        num_tokens, device = input_ids.shape[1], input_ids.device
        start, more = 0, 0
        if self.balance is not None:
            self.balance.see(input_ids, documents, branches)
        if cache is not None:
            start, more = cache.length, cache.capacity - cache.length - num_tokens
            documents = cache.extend(num_tokens, documents)
        if positions is None:
            positions = torch.arange(start, start + num_tokens, device=device)[None]
        # (B or 1, T, R/2) twice
        tables = {rope: rope_tables(rope, positions, more, self._frequencies(rope, device)) for rope in dict.fromkeys(self.ropes)}
        if branches is not None:
            assert documents is not None and cache is None, "a tree of branches is trained, and never generated from"
            masks = {window: build_tree_mask(documents, branches, positions, window) for window in set(self.windows)}
        else:
            options = {"cached": cache is not None, "beyond_sdpa": self.beyond_sdpa}
            masks = {
                window: build_mask(input_ids, start + num_tokens, window, documents, **options) for window in set(self.windows)
            }
        # The norm's dtype is the one to compute in; an embedding that is trained is kept in fp32.
        h = self.embed_tokens(input_ids).to(self.norm.weight.dtype)  # (B, T, D)
        if self.multiplier != 1.0:
            h = h * torch.tensor(self.multiplier, dtype=h.dtype)  # rounded to that dtype: so was Gemma trained
        for index, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[index]
            cos, sin = tables[self.ropes[index]]
            h = self.checkpointing.run(index, block, h, cos, sin, masks[self.windows[index]], layer_cache, start)
        return self.norm(h)

    def _frequencies(self, rope: RopeConfig, device: torch.device) -> Tensor | None:
        """RoPE's, where the text does not matter: copied to the device once, which a CUDA graph could not do for itself."""
        if rope.kind in BY_LENGTH:
            return None
        if (rope, device) not in self.frequencies:
            self.frequencies[rope, device] = inverse_frequencies(rope).to(device)
        return self.frequencies[rope, device]


class CausalLM(nn.Module):
    """The decoder with its head: logits, or with labels the summed loss or each token's log-probability."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        cap = config.final_logit_softcapping
        # Swapped by torchft.fuse where there is no cap.
        self.head_loss = linear_cross_entropy if cap is None else partial(linear_cross_entropy, softcap=cap)
        self.head_logprobs = linear_logprobs if cap is None else partial(linear_logprobs, softcap=cap)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        branches: Tensor | None = None,
        labels: Tensor | None = None,
        per_token: bool = False,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), or with labels the fp32 sum of the supervised tokens' cross entropies.

        input_ids (B, T) int. positions (B, T) int, by default counted from each row's start (or the cache's end).
        documents (B, T) int: tokens attend within equal ids only; None = every row is one document without padding.
        labels (B, T) int, ALREADY SHIFTED: labels[b, t] is what position t should predict; -100 = not supervised. The
            loss is taken here, inside forward, because that is where FSDP2 has gathered the head's weight.
        branches (B, T) int: a document is a trunk, 0, and answers to it, 1 and up, that do not see each other.
        per_token: instead of the sum, the log-probability of each label, (B, T) fp32, 0 where none is supervised.
        cache: the tokens follow those already in it. last_only: logits of the last position alone, (B, 1, V).
        """
        h = self.model(input_ids, positions, documents, cache, branches)  # (B, T, D)
        if self.config.logits_scaling != 1.0:
            h = h / self.config.logits_scaling  # as if the logits were divided, which nobody holds
        if per_token:
            logprobs = self.head_logprobs(h.flatten(0, 1), self.lm_head.weight, labels.flatten(), scale=self.head_scale)
            return logprobs.view(labels.shape).clone()  # FSDP2 hooks what leaves here, and warns of views
        if labels is not None:
            return self.head_loss(h.flatten(0, 1), self.lm_head.weight, labels.flatten(), scale=self.head_scale)
        logits = self.lm_head(h[:, -1:] if last_only else h)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else soft_cap(logits, cap).to(logits.dtype)

    @property
    def head_scale(self) -> Tensor | None:
        """Of the head's rows, (V,), where they are in 8 bits."""
        return self.lm_head.weight_scale if isinstance(self.lm_head, Int8Head) else None

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill every parameter as transformers does: norms one, biases zero, all else normal (`initializer_range`)."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(0.0 if self.config.norm_offset else 1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=self.config.initializer_range, generator=generator)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalLM":
        """Behind `.to()`, `.cuda()` and `.to_empty()`, which would make two parameters of a tied one leaving meta."""
        tied = self.lm_head.weight is self.model.embed_tokens.weight
        super()._apply(fn, recurse)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self
