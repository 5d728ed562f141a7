"""Triton kernels, one operation per file, each beside its eager twin. `torchft.fuse` swaps them into a model."""
