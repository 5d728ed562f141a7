"""In what the frozen weights are stored, and where: what model.quantize and model.offload make of a model on meta."""

from torchft.errors import ConfigError
from torchft.modules.fp8 import quantize_fp8
from torchft.modules.host_embedding import offload_embeddings
from torchft.modules.int8_head import quantize_head
from torchft.modules.nf4 import quantize_nf4
from torchft.modules.transformer import CausalLM
from torchft.modules.vocab import is_tied, trained_modules

INT8_HEAD = "nf4_int8_head"


def store_frozen(model: CausalLM, quantize: str, offload: list[str]) -> list[str]:
    """Give the frozen weights their storage, after the adapters and before the weights come. What was done, in lines.

    Args:
        quantize, offload: as model.quantize and model.offload have them; of the latter, activations are none of our business.

    Raises:
        ConfigError: what is to be stored in another form is trained, or needed on the GPU.
    """
    _refuse(model, quantize, offload)
    reports: list[object] = []
    if quantize in ("nf4", INT8_HEAD):
        reports.append(quantize_nf4(model))
    elif quantize == "fp8":
        reports.append(quantize_fp8(model))
    if quantize == INT8_HEAD:
        reports.append(quantize_head(model))
    if "embeddings" in offload:
        reports.append(offload_embeddings(model))
    return [str(report) for report in reports]


def _refuse(model: CausalLM, quantize: str, offload: list[str]) -> None:
    trained = trained_modules(model)
    if quantize == INT8_HEAD and "lm_head" in trained:
        raise ConfigError(
            f"model.quantize: {INT8_HEAD} stores a frozen lm_head in 8 bits, and the adapter trains it whole: use nf4"
        )
    if "embeddings" in offload and "embed_tokens" in trained:
        raise ConfigError(
            "model.offload: embeddings keeps a frozen embed_tokens in CPU memory, and the adapter trains it whole: remove it"
        )
    if "embeddings" in offload and is_tied(model) and quantize != INT8_HEAD:
        raise ConfigError(
            "model.offload: embeddings would move the model's lm_head too, since the two are one tied weight, of which every step "
            f"needs all on the GPU: set model.quantize={INT8_HEAD}, which gives the head a copy of its own in 8 bits, or remove it"
        )
