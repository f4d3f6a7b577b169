"""Optimal transport between features and codes: IPOT (Xie et al., 2019), as CODIS' Algorithm 2 has it.

N features, K codes. A pure function of tensors.
"""

import torch

from .losses import in_full


@torch.no_grad()
def transport_plan(cost: torch.Tensor, beta: float = 0.5, outer: int = 50, inner: int = 1) -> torch.Tensor:
    """
    The plan T with rows of sum 1/N and columns of sum 1/K that moves N features onto K codes at least cost, by
    proximal point steps. (N, K) -> (N, K), fp32 (fp64 stays fp64), without gradient; two matrices of that size live.

    Public code of GOT, whose values these defaults are, holds three. Entropic solvers of POT give another plan: after
    few proximal steps T is as if regularised by about beta / outer, and with all of them it tends to the exact plan.

    Args:
        cost (`(N, K)`): D of equation 1, 1 - cosine.
        beta: Step of the proximal point (GOT's code: .5).
        outer, inner: Proximal steps, and scalings in each (GOT's code: 50 and 1).

    Raises:
        ValueError: a beta that is not above 0, or less than one step.
    """
    if not beta > 0 or outer < 1 or inner < 1:
        raise ValueError(f"expected beta above 0 and at least one step; got beta {beta}, outer {outer}, inner {inner}")
    with torch.autocast(cost.device.type, enabled=False):
        cost = in_full(cost)
        features, codes = cost.shape
        kernel = torch.exp(cost / -beta)  # (N, K)
        columns = cost.new_full((codes,), 1 / codes)  # (K,), sigma

        # one matrix is the kernel, the other the plan, scaled in its place
        plan = torch.ones_like(kernel)  # (N, K)
        for _ in range(outer):
            plan.mul_(kernel)
            for _ in range(inner):
                rows = 1 / (features * (plan @ columns))  # (N,), delta
                columns = 1 / (codes * (rows @ plan))  # (K,)
            plan.mul_(rows[:, None]).mul_(columns)
    return plan


def plan_entropy(plan: torch.Tensor) -> torch.Tensor:
    """Mean entropy of a feature's shares over the codes, in nats: log K where they are even. (N, K) -> 0-dim."""
    shares = plan * len(plan)  # (N, K), rows of sum 1
    return -torch.special.xlogy(shares, shares).sum(1).mean()


def codes_used(cosines: torch.Tensor) -> torch.Tensor:
    """How many codes are the nearest of any feature, as a share of those that could be. (N, K) -> 0-dim."""
    nearest = cosines.argmax(1)  # (N,)
    used = torch.zeros(cosines.shape[1], device=cosines.device).scatter(0, nearest, 1.0)  # (K,)
    return used.sum() / min(cosines.shape)
