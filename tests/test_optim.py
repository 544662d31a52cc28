"""Muon, against its formulas written out."""

import copy

import pytest
import torch

from allconv.optim import MuonSGD, orthogonalize


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(orthogonalize(update, steps=6))
    assert values.min() > 0.6
    assert values.max() < 1.3


def newton_schulz(matrix):
    """Three steps of the quintic polynomial, on the wide side of a matrix."""
    if len(matrix) > matrix.shape[1]:
        return newton_schulz(matrix.T).T
    x = matrix / (matrix.square().sum().sqrt() + 1e-7)
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def muon_step(weight, gradient, buffer, lr, momentum):
    """A weight (out, in, h, w) and its momentum after one step."""
    buffer = momentum * buffer + gradient
    update = (gradient + momentum * buffer).flatten(1)
    scaled = weight * len(weight) ** 0.5 / weight.square().sum().sqrt()
    return scaled - lr * newton_schulz(update).view_as(weight), buffer


def sgd_step(weight, gradient, buffer, lr, momentum, decay):
    """A weight and its momentum after one step."""
    buffer = momentum * buffer + gradient + decay * weight
    return weight - lr * buffer, buffer


@pytest.fixture
def parameters():
    """A wide, a tall and a small convolution, a bias, and two that never get a gradient."""
    torch.manual_seed(5)
    shapes = {
        "wide": (4, 3, 3, 3),
        "tall": (16, 2, 1, 1),
        "bias": (7,),
        "linear": (5, 6),
        "idle_conv": (4, 4, 3, 3),
        "idle_bias": (4,),
    }
    return {name: torch.nn.Parameter(torch.randn(s).double()) for name, s in shapes.items()}


MUON = ("wide", "tall", "idle_conv")


def optimizer(parameters):
    muon = {"params": [parameters[name] for name in MUON], "lr": 0.3, "momentum": 0.6}
    return MuonSGD(
        [
            {"params": [parameters["linear"]], "weight_decay": 0.02},
            {"params": [parameters["bias"], parameters["idle_bias"]]},
            {**muon, "muon": True},
        ],
        lr=0.1,
        momentum=0.9,
    )


def gradients(parameters, step):
    draws = torch.Generator().manual_seed(step)
    for name, p in parameters.items():
        gradient = torch.randn(p.shape, generator=draws, dtype=p.dtype)
        p.grad = None if name.startswith("idle") else gradient


def test_steps_are_those_of_the_formulas(parameters):
    muon = optimizer(parameters)
    expected = {name: p.detach().clone() for name, p in parameters.items()}
    buffers = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(4):
        gradients(parameters, step)
        for group in muon.param_groups:  # as a schedule does
            group["lr"] *= 0.5
        for name, p in parameters.items():
            if p.grad is None:
                continue
            state = expected[name], p.grad, buffers[name]
            if name in MUON:
                expected[name], buffers[name] = muon_step(*state, 0.3 * 0.5 ** (step + 1), 0.6)
            else:
                rest = 0.1 * 0.5 ** (step + 1), 0.9, 0.02 if name == "linear" else 0
                expected[name], buffers[name] = sgd_step(*state, *rest)
        muon.step()
        for name, p in parameters.items():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-10, atol=1e-12)
    norms = [expected[name].norm() ** 2 / len(expected[name]) for name in ("wide", "tall")]
    assert all(0.5 < norm < 2 for norm in norms)


def test_goes_on_from_its_saved_state(parameters):
    first = optimizer(parameters)
    for step in range(3):
        gradients(parameters, step)
        first.step()
    copies = copy.deepcopy(parameters)
    second = optimizer(copies)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for pair in ((first, parameters), (second, copies)):
        for step in range(3, 5):
            gradients(pair[1], step)
            pair[0].step()
    for name, p in parameters.items():
        assert torch.equal(p, copies[name]), name


def test_closure_is_called_with_gradients_and_its_loss_returned(parameters):
    muon = optimizer(parameters)
    before = parameters["wide"].detach().clone()

    def closure():
        muon.zero_grad()
        loss = parameters["wide"].square().sum() + parameters["bias"].sum()
        loss.backward()
        return loss

    expected = (before.square().sum() + parameters["bias"].sum()).item()
    assert muon.step(closure).item() == pytest.approx(expected)
    assert not torch.equal(parameters["wide"], before)
