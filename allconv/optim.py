"""Muon, the parameter groups, and the one-cycle schedule.

Muon is SGD with momentum and an orthogonalized update (Jordan et al.,
https://kellerjordan.github.io/posts/muon/). This is the variant for convolutions of airbench
(arXiv:2404.00498); torch.optim.Muon takes matrices only.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import SGD

from allconv.model import AllCNN

MUON_MOMENTUM = 0.6  # airbench's


def orthogonalize(update: Tensor, steps: int = 3) -> Tensor:
    """Newton-Schulz iteration towards the nearest matrix with orthonormal rows or columns.

    `update` is a matrix (out, in). Airbench takes three steps. In float32, since a CPU without
    bfloat16 arithmetic gains nothing from bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: steep at zero; convergence to 1 is not needed
    tall = update.shape[0] > update.shape[1]
    x = (update.mT if tall else update) / (update.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonSGD(SGD):
    """SGD, and Muon for parameter groups with `muon=True`.

    Before each step, Muon's weights (out, in, h, w) are scaled to norm sqrt(out). Batch norm makes
    their norm irrelevant, and the learning rate alone then decides how far they turn. Parameters
    without a gradient are skipped.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Update all groups; returns the closure's loss, if there is a closure."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in [group for group in self.param_groups if group.get("muon")]:
            for p in [p for p in group["params"] if p.grad is not None]:
                state, gradient = self.state[p], p.grad
                if "muon_buffer" not in state:
                    state["muon_buffer"] = torch.zeros_like(gradient)
                buffer = state["muon_buffer"].mul_(group["momentum"]).add_(gradient)
                update = gradient.add(buffer, alpha=group["momentum"])  # Nesterov
                p.mul_(len(p) ** 0.5 / p.norm())
                p.add_(orthogonalize(update.flatten(1)).view_as(p), alpha=-group["lr"])
                p.grad = None  # so that SGD leaves it alone
        super().step()
        return loss


def parameter_groups(net: AllCNN, h: Mapping[str, object]) -> list[dict]:
    """The parameters of SGD with weight decay, of SGD without, and of Muon; `h` as in the task."""
    inner = [layer[0].weight for layer in list(net.children())[1:-1]] if h["muon_lr"] else []
    rest = [p for p in net.parameters() if p.requires_grad and not any(p is q for q in inner)]
    decayed = [p for p in rest if h["decay_norms"] or p.ndim > 1]
    plain = [p for p in rest if not h["decay_norms"] and p.ndim == 1]
    groups = [
        {"params": decayed, "weight_decay": h["weight_decay"]},
        {"params": plain},
        {"params": inner, "lr": h["muon_lr"], "momentum": MUON_MOMENTUM, "muon": True},
    ]
    return [group for group in groups if group["params"]]


def triangle(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate after `step` of `total` steps.

    It rises linearly from 0.1 to 1 over the share `warmup` of the steps, then falls linearly to 0.
    """
    top = max(1, round(warmup * total)) if warmup else 0
    if step < top:
        return 0.1 + 0.9 * step / top
    return max(0.0, (total - step) / max(1, total - top))
