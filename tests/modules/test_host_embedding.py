"""An embedding in CPU memory has the numbers of one that is not, and whoever would train or tie it is told."""

import copy

import pytest
import torch
from test_fuse import ALL, adapted, assert_equal, batch

from torchft.checks import KERNELS
from torchft.fuse import swap
from torchft.kernels.gather_rows import gather_rows
from torchft.modules.host_embedding import HostEmbedding, host_tables, offload_embeddings
from torchft.modules.int8_head import quantize_head


def test_the_same_loss_gradients_and_names() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    assert "7,808 weights" in str(offload_embeddings(twin))
    assert isinstance(twin.model.embed_tokens, HostEmbedding) and host_tables(twin) == [twin.model.embed_tokens.weight]
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(model(**batch()), twin(**batch()))
    assert_equal(model, twin, 0.0)


def test_fuse_gives_it_the_kernel_unless_it_is_switched_off() -> None:
    for off, words in (((), "kernels: the loss and the embedding"), (("embedding",), "the CPU fetches the embedding's rows")):
        model = adapted()
        offload_embeddings(model)
        report = str(swap(model, ("lora", *off)))
        assert words in report and (model.model.embed_tokens.gather is gather_rows) == (not off)
    assert "embedding" not in str(swap(adapted(), ("lora",))) and "embedding" in KERNELS and "embedding" in ALL


def test_ids_on_another_device_go_to_the_kernel() -> None:
    model = adapted()
    offload_embeddings(model)
    seen = []
    empty = lambda ids: torch.empty(*ids.shape, 128, device=ids.device)  # noqa: E731
    model.model.embed_tokens.gather = lambda table, ids: seen.append((table, ids)) or empty(ids)
    ids = torch.zeros(5, 2, dtype=torch.int64, device="meta").T
    assert model.model.embed_tokens(ids).shape == (2, 5, 128)
    [(table, given)] = seen
    assert table.data_ptr() == model.model.embed_tokens.weight.data_ptr() and not table.requires_grad
    assert given.is_contiguous() and given.device.type == "meta"


def test_what_is_trained_or_needed_elsewhere_is_refused() -> None:
    tied = adapted(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="the model's lm_head too"):
        offload_embeddings(tied)
    quantize_head(tied)
    offload_embeddings(tied)  # the head has a copy of its own
    trained = adapted()
    trained.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="embed_tokens is trained here"):
        offload_embeddings(trained)


# ---- The kernel, in Triton's interpreter or on a GPU


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 12, 100, 5000])
def test_rows_are_copied_bit_for_bit(width: int, dtype: torch.dtype, eager: bool) -> None:
    on_gpu = torch.cuda.is_available()
    table = torch.randn(29, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = table.pin_memory() if on_gpu else table
    for ids in (torch.tensor([[0, 28, 28], [7, 3, 0]]), torch.tensor([5], dtype=torch.int32), torch.empty(0, 4, dtype=torch.int64)):
        found = gather_rows(table, ids.cuda() if on_gpu else ids, eager=eager)
        assert found.device.type == ("cuda" if on_gpu else "cpu") and found.dtype == dtype
        assert torch.equal(found.cpu(), table[ids.long()])


def test_an_id_without_a_row_gives_nan_and_reads_nothing() -> None:
    table, ids = torch.ones(4, 3), torch.tensor([3, 4, -1, 2**40])
    if torch.cuda.is_available():
        table, ids = table.pin_memory(), ids.cuda()
    found = gather_rows(table, ids).cpu()
    assert torch.equal(found[0], torch.ones(3)) and found[1:].isnan().all()


def test_what_the_kernel_would_misread_is_refused() -> None:
    table, ids = torch.ones(4, 6), torch.zeros(3, 2, dtype=torch.int64)
    for wrong in ((table[:, :3], ids), (table, ids.T), (table, ids.float()), (table[0], ids)):
        with pytest.raises(ValueError, match="need a contiguous table"):
            gather_rows(*wrong)


@pytest.mark.gpu
def test_pageable_memory_is_refused_and_nothing_waits_for_the_gpu() -> None:
    ids = torch.randint(1000, (2, 2048), device="cuda")
    table = torch.randn(1000, 4096).bfloat16()
    with pytest.raises(ValueError, match="not pinned"):
        gather_rows(table, ids)
    table = table.pin_memory()
    gather_rows(table, ids)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gather_rows(table, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), table[ids.cpu()])
