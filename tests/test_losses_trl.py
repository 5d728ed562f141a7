"""The same losses against TRL's own code; where TRL is not its paper, one line says how, and the rest must be equal.

TRL's losses stand within methods of its trainers. They are called here with stand-ins for the trainer and the model, so that
nothing but their arithmetic runs.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_losses import BATCHES, PAIRS, random_pairs, tensors
from torch import Tensor

from torchft import losses
from torchft.config import PreferenceOptions
from torchft.losses import preference_loss

pytest.importorskip("trl", reason="TRL, of the test extra, is not installed")

from trl import DPOTrainer, KTOTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402


def flat(tensor: Tensor) -> Tensor:
    """All batches as one, (BATCHES * PAIRS, 2): TRL's loss is a mean, and its gradient shows each pair's."""
    return tensor.reshape(BATCHES * PAIRS, 2)


def model_of(logps: Tensor, width: int) -> Any:
    """A model whose first completion token has all of a sequence's log-probability."""
    per_token = torch.cat([logps[:, None], torch.zeros(len(logps), width - 1)], 1)
    zeros = torch.zeros_like(per_token).detach()
    return lambda **kwargs: SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


class Accelerator(SimpleNamespace):
    device = torch.device("cpu")

    @staticmethod
    def gather_for_metrics(value: Any) -> Any:
        return value

    gather = gather_for_metrics

    @staticmethod
    def unwrap_model(model: Any) -> Any:
        return model


def trl_dpo(policy: Tensor, reference: Tensor, lengths: Tensor, loss: str, beta: float, smoothing: float) -> Tensor:
    """DPOTrainer's loss of (P, 2) log-probabilities: their mean."""
    width = int(lengths.max())
    mask = torch.arange(width)[None] < lengths.T.reshape(-1, 1)  # chosen first, then rejected
    mask = torch.cat([torch.zeros(len(mask), 1), mask], 1).long()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Accelerator(), ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=[loss], loss_weights=[1.0], beta=beta, label_smoothing=smoothing,
        use_weighting=False, aux_loss_enabled=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(),
    )  # fmt: skip
    ids = torch.zeros(len(mask), width + 1, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    return DPOTrainer._compute_loss(trainer, model_of(policy.T.reshape(-1), width), inputs, False)


def assert_same(ours: Tensor, theirs: Tensor, policy: Tensor) -> None:
    """ours: (P,), theirs: their mean. Values and each pair's gradient to 1e-6 of max(1, |x|)."""
    gradients = [torch.autograd.grad(loss, policy, retain_graph=True)[0] for loss in (ours.sum(), theirs * len(ours))]
    for mine, other in ((ours.mean(), theirs), gradients):
        assert ((mine - other).abs() / other.abs().clamp(min=1)).max() <= 1e-6


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "robust", "ipo", "apo_zero", "apo_down"])
def test_losses_with_a_reference_are_trls(loss: str) -> None:
    policy, reference, lengths = (flat(tensor) for tensor in tensors(random_pairs()))
    smoothing = 0.2 if loss == "robust" else 0.0  # TRL's sigmoid has no smoothing any more
    policy.requires_grad_()
    ours_of = policy, reference
    if loss == "ipo":  # TRL divides each log-ratio by its answer's tokens; the paper, eq. 17, does not
        ours_of = policy / lengths, reference / lengths
    ours = preference_loss(*ours_of, lengths, PreferenceOptions(loss, beta=0.3, label_smoothing=smoothing))
    assert_same(ours, trl_dpo(policy, reference, lengths, loss, 0.3, smoothing), policy)


def test_losses_without_a_reference_are_trls() -> None:
    policy, _, lengths = (flat(tensor) for tensor in tensors(random_pairs()))
    policy.requires_grad_()
    means = policy / lengths

    def trl_cpo(logps: Tensor, loss: str, beta: float, gamma: float = 0.0) -> Tensor:
        trainer = SimpleNamespace(
            alpha=0.0, accelerator=Accelerator(), loss_type=loss, beta=beta, simpo_gamma=gamma, label_smoothing=0.0
        )
        return CPOTrainer.cpo_loss(trainer, *logps.unbind(1))[0].mean()

    ours = preference_loss(policy, None, lengths, PreferenceOptions("simpo", beta=2.0, gamma=0.5))
    assert_same(ours, trl_cpo(means, "simpo", 2.0, 0.5), policy)
    ours = preference_loss(policy, None, lengths, PreferenceOptions("cpo", beta=0.1))
    # TRL adds the behaviour cloning as a mean over the batch's tokens; the paper as -log pi(y_w|x), a sum
    assert_same(ours + policy[:, 0], trl_cpo(policy, "sigmoid", 0.1), policy)
    ours = preference_loss(policy, None, lengths, PreferenceOptions("orpo", beta=0.25))
    theirs = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.25, accelerator=Accelerator()), *means.unbind(1))[0]
    # TRL's cross entropy is that of prompt and answer, over the batch's tokens; the paper's that of the answer, eq. 6
    assert_same(ours + means[:, 0], -theirs.mean(), policy)


def test_trls_log1mexp_has_no_gradient_near_zero() -> None:
    """Why ours masks what goes into each form; TRL's values are right."""
    from trl.experimental.orpo.orpo_trainer import log1mexp

    x = torch.tensor([-1e-9, -0.5, -3.0], requires_grad=True)
    assert torch.allclose(losses.log1mexp(x), log1mexp(x), rtol=1e-6)
    theirs, ours = (torch.autograd.grad(form(x).sum(), x)[0] for form in (log1mexp, losses.log1mexp))
    assert not theirs[0].isfinite() and ours.isfinite().all()


def test_kto_is_trls() -> None:
    values = random_pairs()
    policy, reference = (torch.from_numpy(values[name]).float().flatten() for name in ("w", "ref_w"))
    desirable = torch.rand(len(policy), generator=torch.Generator().manual_seed(0)) < 0.5
    policy.requires_grad_()
    kl_logps, kl_ref = reference[::2] + 1.3, reference[::2]
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Accelerator(), calculate_KL=True, precompute_ref_logps=True,
        loss_type="kto", beta=0.1, desirable_weight=1.2, undesirable_weight=0.8, aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, args=SimpleNamespace(use_liger_kernel=False),
        _compute_kl_logps=lambda model, batch: kl_logps,
    )  # fmt: skip
    ids = torch.zeros(len(policy), 2, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.tensor([[0, 1]]).expand_as(ids)}
    batch |= {"label": desirable, "ref_logps": reference, "ref_KL_logps": kl_ref}
    theirs = KTOTrainer._compute_loss(trainer, model_of(policy, 1), batch, False)
    kl = (kl_logps - kl_ref).mean().clamp(min=0)
    assert_same(losses.kto(policy - reference, desirable, kl, 0.1, (1.2, 0.8)), theirs, policy)
