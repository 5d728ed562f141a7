"""Losses of preferences, as pure functions of log-probabilities or scores per sequence: no model, no batch, no mean.

Symbols, of one pair or a vector (P,) of pairs: w the chosen answer, l the rejected one; log pi(y|x) the sum over the
answer's tokens of their log-probabilities, |y| their number. A log-ratio is log pi(y|x) - log pi_ref(y|x), with pi_ref the
model at the start. Every function returns one loss for each pair, in nats where it is a likelihood; the recipe sums them
and divides by the pairs of the whole step. Only SimPO, ORPO and the SFT term take means over tokens, as their papers do.

Left out: losses that compare pairs of a batch with each other (AOT), or need a judge's probabilities (SPPO, EXO).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchft.config import PreferenceOptions

REFERENCE_FREE = ("simpo", "orpo", "cpo")  # of PreferenceOptions.loss
FIGURES = ("rewards_chosen", "rewards_rejected", "margin", "accuracy", "logps_chosen", "logps_rejected", "kl")


def preference_loss(policy: Tensor, reference: Tensor | None, lengths: Tensor, options: PreferenceOptions) -> Tensor:
    """The loss that `dpo.loss` names: policy and reference (P, 2) log pi(y|x), lengths (P, 2), of w and l -> (P,).

    reference: None for the losses that need none.
    """
    beta, smoothing = options.beta, options.label_smoothing
    # In fp64, for these few numbers: differences of sums of hundreds of nats, which IPO squares.
    chosen, rejected = implicit_rewards(policy, reference, lengths, options.loss).unbind(1)
    match options.loss:
        case "sigmoid":
            loss = sigmoid(chosen, rejected, beta, smoothing)
        case "robust":
            loss = robust(chosen, rejected, beta, smoothing)
        case "ipo":
            loss = ipo(chosen, rejected, beta)
        case "hinge":
            loss = hinge(chosen, rejected, beta)
        case "apo_zero":
            loss = apo_zero(chosen, rejected, beta)
        case "apo_down":
            loss = apo_down(chosen, rejected, beta)
        case "simpo":
            loss = simpo(chosen, rejected, beta, options.gamma)
        case "orpo":
            loss = orpo(chosen, rejected, beta)
        case "cpo":
            loss = cpo(chosen, rejected, beta)
        case other:
            raise AssertionError(other)  # torchft/checks.py holds the choices
    if options.sft_weight:
        loss = loss + options.sft_weight * sft(policy[:, 0] / lengths[:, 0])
    return loss.float()


def sum_by_answer(values: Tensor, sequences: Tensor, num_sequences: int) -> Tensor:
    """Per-token values (B, T) to their sums over each answer, (num_sequences,); see torchft/data/loader.py for `sequences`.

    Also of no answers it is connected to the graph, so that every process of a run has a backward to do.
    """
    return values.new_zeros(num_sequences + 1).index_add(0, sequences.flatten(), values.flatten())[:-1]


def figures(
    policy: Tensor, reference: Tensor | None, lengths: Tensor, options: PreferenceOptions
) -> dict[str, Tensor]:
    """What people watch, summed over the pairs of a batch, without gradient; arguments as in `preference_loss`.

    Rewards are beta times what the loss compares. accuracy: pairs whose chosen answer has the higher reward; a tie, as all
    pairs are before the first step, counts half.
    """
    policy = policy.detach()
    rewards = options.beta * implicit_rewards(policy, reference, lengths, options.loss)
    margin = rewards[:, 0] - rewards[:, 1]
    accuracy = (margin.sign() + 1) / 2
    values = [rewards[:, 0], rewards[:, 1], margin, accuracy, policy[:, 0], policy[:, 1]]
    return dict(zip(FIGURES[:-1], (value.sum().float() for value in values), strict=True))


def kl_estimate(policy: Tensor, reference: Tensor, batch_sequences: Tensor, lengths: Tensor) -> Tensor:
    """How far the policy is from the reference on the data's answers, in nats per token, summed over pairs: half the squared
    log-ratio of each token, whose mean over the policy's own text would be near the KL divergence (Schulman 2020,
    http://joschu.net/blog/kl-approx.html, k2). policy, reference: of each token, (B, T).
    """
    squares = (policy.detach() - reference).square() / 2
    return (sum_by_answer(squares, batch_sequences, lengths.numel()).view_as(lengths) / lengths).mean(1).sum()


def implicit_rewards(policy: Tensor, reference: Tensor | None, lengths: Tensor, loss: str) -> Tensor:
    """What a loss compares, (P, 2) fp64: log-ratios; for SimPO and ORPO log pi per token, for CPO log pi.

    Times beta it is the reward that a policy implies, which is what is logged.
    """
    if loss in REFERENCE_FREE:
        return policy.double() if loss == "cpo" else policy.double() / lengths
    assert reference is not None, loss
    return policy.double() - reference


def sigmoid(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, eq. 7 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290: -log sigma(beta (chosen - rejected)), of
    log-ratios.

    label_smoothing e: conservative DPO, -(1 - e) log sigma(m) - e log sigma(-m), for labels wrong with probability e
    (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf).
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """rDPO, section 3 of Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409: unbiased where labels are wrong with
    probability e < 1/2: (-(1 - e) log sigma(m) + e log sigma(-m)) / (1 - 2 e), of log-ratios.
    """
    margin = beta * (chosen - rejected)
    noisy = -(1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)
    return noisy / (1 - 2 * label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """IPO, eq. 17 of Azar et al. 2023, https://arxiv.org/abs/2310.12036: (h - 1 / (2 tau))^2 with h the difference of the
    log-ratios, sums over tokens as in the paper, and tau = beta.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """RSO's hinge-norm, section 3 of Liu et al. 2023, https://arxiv.org/abs/2309.06657: max(0, 1 - beta (chosen -
    rejected)), of log-ratios; SLiC (https://arxiv.org/abs/2305.10425) with a reference.
    """
    return F.relu(1 - beta * (chosen - rejected))


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-zero, eq. 7 of D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266: -sigma(beta chosen) + sigma(beta
    rejected), of log-ratios, plus 1 so that it is positive: for chosen answers better than the model's own.
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-down, eq. 8 of the same paper: sigma(beta chosen) - sigma(beta (chosen - rejected)), of log-ratios, plus 1: for
    chosen answers worse than the model's own.
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO, eq. 6 of Meng et al. 2024, https://arxiv.org/abs/2405.14734: -log sigma(beta (chosen - rejected) - gamma), of
    log pi per token.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """ORPO, eqs. 6 and 7 of Hong et al. 2024, https://arxiv.org/abs/2403.07691, of log pi per token: with odds p / (1 - p) and
    lambda = beta, -chosen - lambda log sigma(log odds(chosen) - log odds(rejected)).
    """
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return sft(chosen) - beta * F.logsigmoid(log_odds)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, by log(-expm1(x)) near zero and log1p(-e^x) elsewhere (Maechler 2012,
    https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf). A zero, the probability one, counts as -1e-12.
    """
    x = x.clamp(max=-1e-12)
    near = x > -0.6931
    # Each form sees only values that it can take: an infinity in the one not chosen would make the gradient NaN.
    return torch.where(near, torch.log(-torch.expm1(x.where(near, -1.0))), torch.log1p(-torch.exp(x.where(~near, -1.0))))


def cpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """CPO, eqs. 3 to 5 of Xu et al. 2024, https://arxiv.org/abs/2401.08417, of log pi: -log sigma(beta (chosen - rejected))
    - chosen.
    """
    return -F.logsigmoid(beta * (chosen - rejected)) - chosen


def sft(chosen: Tensor) -> Tensor:
    """-log pi per token of the chosen answer: the added term of Pang et al. 2024, eq. 2, https://arxiv.org/abs/2404.19733."""
    return -chosen


def kto(ratios: Tensor, desirable: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """KTO, section 4.1 of Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306: lambda_y - v(x, y), without pairs.

    v = lambda_D sigma(beta (r - z)) where y is desirable, lambda_U sigma(beta (z - r)) where it is not.

    Args:
        ratios, desirable: log-ratios r (N,) and bool (N,).
        kl: the baseline z, a scalar >= 0 without gradient, from answers to other prompts.
        weights: lambda_D, lambda_U.
    """
    value = torch.sigmoid(beta * torch.where(desirable, ratios - kl, kl - ratios))
    return torch.where(desirable, weights[0], weights[1]) * (1 - value)


def verdict_sums(ratios: Tensor, desirable: Tensor, kl: Tensor, beta: float) -> Tensor:
    """What KTO logs, summed over answers, without gradient, (5,): how many are desirable, how many not, the rewards of
    either kind, and how many are on their side of the baseline (on it counts half).
    """
    rewards, good = beta * ratios.detach(), desirable.float()
    right = ((rewards - beta * kl).sign() * (2 * good - 1) + 1) / 2
    return torch.stack([good.sum(), (1 - good).sum(), (rewards * good).sum(), (rewards * (1 - good)).sum(), right.sum()])


def verdict_means(sums: Tensor, kl: Tensor) -> dict[str, Tensor]:
    """The figures of `verdict_sums`, each a mean over the answers that it is about."""
    good, bad, reward_good, reward_bad, right = sums
    chosen, rejected = reward_good / good.clamp(min=1), reward_bad / bad.clamp(min=1)
    accuracy = right / (good + bad).clamp(min=1)
    return {"rewards_chosen": chosen, "rewards_rejected": rejected, "margin": chosen - rejected, "accuracy": accuracy, "kl": kl}


def bradley_terry(chosen: Tensor, rejected: Tensor, center_weight: float = 0.0) -> Tensor:
    """The reward model's loss, eq. 2 of the DPO paper: -log sigma(chosen - rejected), of scores (P,).

    center_weight c adds c (chosen + rejected)^2, which holds the scores near zero (Eisenstein et al. 2023, eq. 2,
    https://arxiv.org/abs/2312.09244).
    """
    return -F.logsigmoid(chosen - rejected) + center_weight * (chosen + rejected).square()
