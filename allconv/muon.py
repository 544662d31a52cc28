"""Muon: SGD with momentum whose update is orthogonalized, for the convolutions.

From Jordan et al., https://kellerjordan.github.io/posts/muon/, in the form for convolutions of
"94% on CIFAR-10" (airbench). torch.optim.Muon takes matrices only.
"""

import torch
from torch import Tensor
from torch.optim import SGD


def orthogonalize(update: Tensor, steps: int = 3) -> Tensor:
    """Newton-Schulz iteration towards the nearest matrix with orthonormal rows or columns.

    Three steps are airbench's; in float32, since a CPU without bfloat16 gains nothing from it.

    Args:
        update: (out, in).
        steps: iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: steep at zero, no need to converge to 1
    tall = update.shape[0] > update.shape[1]
    x = (update.mT if tall else update) / (update.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonSGD(SGD):
    """SGD, and Muon for the parameter groups that have `muon=True`.

    Muon's weights (out, in, h, w) are scaled to norm sqrt(out) before each step: batch norm makes
    their length meaningless, and so the rate alone decides how far they turn.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every group; the loss of the closure."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            if not group.get("muon"):
                continue
            for p in group["params"]:
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
