"""AllCNN, the all-convolutional network.

From the notebook "The AllConv Net, a parameter efficient ConvNet as baseline", after Springenberg
et al., "Striving for Simplicity: The All Convolutional Net" (arXiv:1412.6806). Layer names and
outputs are the notebook's, so weights can be exchanged with it (`tests/test_model.py`).
"""

import torch
from torch import Tensor, nn


def conv(c_in: int, c_out: int, kernel_size: int, stride: int, dropout: float) -> nn.Sequential:
    """Convolution, batch norm and channel dropout; the ReLU comes after the shortcut."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel_size, stride, padding=kernel_size // 2),
        nn.BatchNorm2d(c_out),
        nn.Dropout2d(dropout),
    )


class AllCNN(nn.Module):
    """All-convolutional network: strided downsampling, one map per class, global average pooling.

    The defaults are the notebook's network; `dropout=0, rectify_logits=False` trains better.

    Args:
        width: channels after the first convolution (64: 1,387,044 parameters; 32: 354,628).
        num_classes: number of classes.
        residuals: add each layer's input to its output where their shapes match.
        dropout: probability of dropping a channel after each layer, at least 0 and below 1.
        rectify_logits: apply ReLU and dropout to the class maps, as the notebook does; the logits
            are then never negative.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        width: int = 64,
        num_classes: int = 100,
        residuals: bool = False,
        dropout: float = 0.2,
        rectify_logits: bool = True,
    ):
        super().__init__()
        if not 1 <= width <= 4096:  # 5.7 billion parameters
            raise ValueError(f"width is {width}: it must be from 1 to 4096")
        if not 2 <= num_classes <= 100_000:
            raise ValueError(f"num_classes is {num_classes}: it must be from 2 to 100000")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}: it must be at least 0 and below 1")
        self.width, self.num_classes, self.residuals = width, num_classes, residuals
        w, p = width, dropout
        self.conv1 = conv(3, w, 3, 1, p)
        self.conv2 = conv(w, w, 3, 1, p)
        self.conv3 = conv(w, 2 * w, 3, 2, p)
        self.conv4 = conv(2 * w, 2 * w, 3, 1, p)
        self.conv5 = conv(2 * w, 2 * w, 3, 1, p)
        self.conv6 = conv(2 * w, 4 * w, 3, 2, p)
        self.conv7 = conv(4 * w, 4 * w, 3, 1, p)
        self.conv8 = conv(4 * w, 4 * w, 1, 1, p)
        self.conv8.append(nn.ReLU())
        self.conv9 = nn.Sequential(nn.Conv2d(4 * w, num_classes, 1))
        if rectify_logits:
            self.conv9.extend([nn.Dropout2d(dropout), nn.ReLU()])

    def maps(self, x: Tensor) -> Tensor:
        """Evidence maps (B, num_classes, ceil(H/4), ceil(W/4)) of normalized images."""
        x = self.conv1(x).relu()  # (B, w, 32, 32) for 32 x 32 images
        x = self._shortcut(self.conv2(x), x)
        x = self.conv3(x).relu()  # (B, 2w, 16, 16)
        x = self._shortcut(self.conv4(x), x)
        x = self._shortcut(self.conv5(x), x)
        x = self.conv6(x).relu()  # (B, 4w, 8, 8)
        x = self._shortcut(self.conv7(x), x)
        # conv8 has its own ReLU; in the residual net, the sum is rectified once more
        x = (self.conv8(x) + x).relu() if self.residuals else self.conv8(x)
        return self.conv9(x)  # (B, num_classes, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalized images (B, 3, H, W)."""
        # mean, not AvgPool2d(8): takes any image size, and has a deterministic backward on CUDA
        return self.maps(x).mean((2, 3))

    def _shortcut(self, y: Tensor, x: Tensor) -> Tensor:
        return (y + x if self.residuals else y).relu()


def biases_before_norm(net: AllCNN) -> list[nn.Parameter]:
    """The convolution biases that have no effect, since a batch norm follows."""
    return [layer[0].bias for layer in list(net.children())[:-1]]


def dirac_(net: AllCNN) -> None:
    """Initialize the 3x3 convolutions after the first as partial identities.

    From Jordan, "94% on CIFAR-10 in 3.29 Seconds" (arXiv:2404.00498).
    """
    for layer in list(net.children())[1:7]:
        weight = layer[0].weight
        nn.init.dirac_(weight.data[: weight.shape[1]])


@torch.no_grad()
def whiten_(net: AllCNN, images: Tensor, eps: float = 5e-4) -> None:
    """Initialize the first convolution with filters that whiten 3x3 patches, and their negatives.

    From Page, "How to Train Your ResNet" (myrtle.ai), with the eps of arXiv:2404.00498. Filters
    after the first 54 keep their random initialization. `images` are normalized training images
    (B, 3, H, W); `eps` is added to the variances, which limits the gain of weak directions.
    """
    patches = nn.functional.unfold(images.double(), 3).transpose(1, 2).reshape(-1, 27)  # (n, 27)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (directions / (variances + eps).sqrt()).T.flip(0)  # strongest direction first
    # the sign of an eigenvector is arbitrary, and differs between machines
    filters *= filters.sum(1, keepdim=True).sign()
    pairs = torch.stack([filters, -filters], 1).view(-1, 3, 3, 3)  # (54, 3, 3, 3)
    weight = net.conv1[0].weight
    weight[:54] = pairs[: len(weight)].to(weight)
