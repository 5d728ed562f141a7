"""A batch's way to a GPU: from pinned memory, so that the host need not wait for what the GPU was given before."""

import pytest
import torch
from test_loader import batch


@pytest.mark.parametrize("pins", [True, False])
def test_a_gpu_copies_from_pinned_memory_where_it_is_to_be_had(pins, monkeypatch):
    """Else from where the batch is. Tensors that stand for those on the GPU stay on the CPU here."""
    made, pinned, sent = batch([[0, 1]]), [], []

    def pin_memory(self):
        if not pins:
            raise RuntimeError("CUDA error: out of memory")
        pinned.append(self.clone())
        return pinned[-1]

    def to(self, device, non_blocking):
        assert device.type == "cuda" and non_blocking
        sent.append(self)
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = made.to("cuda")
    assert [id(tensor) for tensor in sent] == [id(tensor) for tensor in (pinned if pins else made.tensors().values())]
    assert len(sent) == 4
    for name, tensor in made.tensors().items():
        assert torch.equal(getattr(moved, name), tensor), name


@pytest.mark.gpu
def test_a_batch_is_on_the_gpu_without_a_wait():
    """As it was when it was sent, though the GPU comes to it late and its memory on the host is used again by then."""
    made = [batch([[0, 1], [2]], num_rows=256) for _ in range(2)]
    expected, long = made[0].input_ids.clone(), torch.ones(8192, 8192, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            long = long @ long * 1e-4
        moved = made[0].to("cuda")
        made[0].input_ids.zero_()
        for _ in range(10):
            made[1].to("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(moved.input_ids.cpu(), expected)
