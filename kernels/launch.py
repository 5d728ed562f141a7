"""What every kernel's launcher needs: where Triton can run, and the checks of what it is given."""

import os

import torch
from torch import Tensor


def can_run(tensor: Tensor) -> bool:
    """Whether Triton kernels take this tensor: on CUDA, and anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless `tensor` has this shape (and dtype), and each row's elements lie side by side."""
    if tuple(tensor.shape) != shape or tensor.stride(-1) != 1 or (dtype is not None and tensor.dtype != dtype):
        raise ValueError(
            f"{name}: a kernel needs shape {shape}, dtype {dtype or tensor.dtype} and a last stride of 1; got "
            f"{tuple(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}"
        )
