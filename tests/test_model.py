"""The network: the notebook's function exactly, its repairs and its initializations."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from allconv.model import AllCNN, biases_before_norm, dirac_, whiten_

GOLDEN = np.load(Path(__file__).with_name("golden.npz"))


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_is_the_notebooks_function(kind):
    weights = {
        k.partition("/")[2]: torch.tensor(GOLDEN[k]) for k in GOLDEN if k.startswith(kind + "/")
    }
    net = AllCNN(width=4, residuals=kind == "residual", dropout=0)
    # both directions: the same names, the same shapes
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in weights.items()
    }
    net.load_state_dict(weights, strict=True)
    images = torch.tensor(GOLDEN["images"])
    with torch.no_grad():
        torch.testing.assert_close(
            net.eval()(images), torch.tensor(GOLDEN[f"{kind}-eval"]), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            net.train()(images), torch.tensor(GOLDEN[f"{kind}-train"]), atol=1e-5, rtol=0
        )


def test_dropout_modules_change_no_names():
    assert AllCNN(width=4).state_dict().keys() == AllCNN(width=4, dropout=0).state_dict().keys()


@pytest.mark.parametrize(
    ("width", "count"),
    [(64, 1_387_044), (32, 354_628), (16, 92_628), (48, 786_100), (96, 3_097_348)],
)
def test_parameter_counts(width, count):
    assert sum(p.numel() for p in AllCNN(width).parameters()) == count


@pytest.mark.parametrize("size", [20, 24, 32, 33])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_and_image_size(batch, size):
    net = AllCNN(width=2).eval()
    x = torch.randn(batch, 3, size, size)
    assert net(x).shape == (batch, 100)
    torch.testing.assert_close(net.maps(x).mean((2, 3)), net(x))


def test_only_the_repaired_network_has_negative_logits():
    x = torch.randn(8, 3, 32, 32)
    assert AllCNN(width=4)(x).min() >= 0
    assert AllCNN(width=4, dropout=0, rectify_logits=False)(x).min() < 0


@pytest.mark.parametrize(
    ("argument", "value"),
    [("width", 0), ("width", -3), ("num_classes", 1), ("dropout", 1.0), ("dropout", -0.1)],
)
def test_bad_arguments_are_named_with_their_value(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} is {value}: it must be"):
        AllCNN(**{argument: value})


def test_imports_torch_and_nothing_else_of_ours():
    code = (
        "import sys, allconv.model; names = set(sys.modules); "
        "assert not {'lightning', 'torchvision', 'torchmetrics', 'matplotlib'} & names; "
        "assert [n for n in sorted(names) if n.startswith('allconv')] == "
        "['allconv', 'allconv.model']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arguments", [{}, {"dropout": 0, "rectify_logits": False}])
def test_the_biases_before_a_norm_are_those_of_the_first_eight_convolutions(arguments):
    net = AllCNN(width=2, **arguments)
    names = {id(p): name for name, p in net.named_parameters()}
    found = [names[id(bias)] for bias in biases_before_norm(net)]
    assert found == [f"conv{i}.0.bias" for i in range(1, 9)]
    # and the norm does cancel them
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    before = net(images)
    for bias in biases_before_norm(net):
        torch.nn.init.normal_(bias)
    torch.manual_seed(1)
    torch.testing.assert_close(net(images), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("residuals", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_can_be_scripted(residuals):
    net = AllCNN(width=2, residuals=residuals).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.script(net)(images), net(images))


def test_dirac_starts_as_the_identity():
    net = AllCNN(width=4, dropout=0)
    dirac_(net)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(
        net.conv2[0](x) - net.conv2[0].bias[:, None, None], x, atol=1e-6, rtol=0
    )


def test_dirac_leaves_the_first_and_the_1x1_convolutions_random():
    torch.manual_seed(1)
    net = AllCNN(width=4)
    torch.manual_seed(1)
    untouched = AllCNN(width=4).state_dict()
    dirac_(net)
    changed = [k for k, v in net.state_dict().items() if not torch.equal(v, untouched[k])]
    assert changed == [f"conv{i}.0.weight" for i in range(2, 8)]


def test_whitening_filters_whiten():
    images = torch.nn.functional.avg_pool2d(torch.randn(200, 3, 34, 34), 3, 1)  # correlated
    net = AllCNN(width=64)
    whiten_(net, images, eps=0)
    maps = torch.nn.functional.conv2d(images, net.conv1[0].weight[:54:2])
    found = maps.transpose(0, 1).flatten(1)
    second_moments = found @ found.T / found.shape[1]
    torch.testing.assert_close(second_moments, torch.eye(27), atol=2e-3, rtol=0)
    torch.testing.assert_close(net.conv1[0].weight[:54:2], -net.conv1[0].weight[1:54:2])
