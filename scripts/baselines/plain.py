"""The baseline of scripts/bench_recipe.py that is our own: the recipe without its kernels, in one of four configurations.

    python scripts/baselines/plain.py compile cudnn OPTION=VALUE ...     # or eager instead of compile, flash instead of cudnn

The recipe's main runs as it is, with model.kernels switching every kernel off; compile: blocks by torch.compile; cudnn, flash: which
attention is asked first for rows of one document.
"""

import sys

from torch.nn.attention import SDPBackend

from torchft.modules import attention
from torchft.parse import parse
from torchft.recipes import full_finetune_distributed, lora_single_device

OFF = "model.kernels={lora: eager, cross_entropy: eager}"


def main() -> None:
    if not {"compile", "eager"} & set(sys.argv[1:2]) or not {"cudnn", "flash"} & set(sys.argv[2:3]):
        raise SystemExit("usage: plain.py compile|eager cudnn|flash [OPTION=VALUE ...]")
    compiled, backend, *options = sys.argv[1:]
    if backend == "flash":
        attention.SDPA_PRIORITY.sort(key=lambda kind: kind != SDPBackend.FLASH_ATTENTION)
    recipe = lora_single_device if any(option.startswith("lora.") for option in options) else full_finetune_distributed
    recipe.main(parse(recipe.Config, [*options, OFF, f"model.compile={'on' if compiled == 'compile' else 'off'}"]))


if __name__ == "__main__":
    main()
