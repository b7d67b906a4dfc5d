"""A residual 2-D convolutional network with BatchNorm on scikit-learn's digits.

Seven residual blocks (four of 16 channels at 8x8, one that halves the size, two of 32 channels at 4x4),
deeper than the task asks for, so that blocks can be fused. BatchNorm stays a node of its own in the file,
for `fold` to work on. Writes `digits_resnet.onnx` and `digits_resnet.npz` (input `image`, 0 white to 1
black), whose 600 rows are the test split: never trained on. About twenty seconds on one core.

    python models/digits_resnet.py [--out FOLDER]
"""

from common import DIGITS_LICENCE, DIGITS_SOURCE, digits, publish, setup, shifted, train
from torch import Tensor, nn

EPOCHS = 25


class Block(nn.Module):
    """relu(skip(x) + F(x)), F two 3x3 convolutions; skip is x, or a 1x1 convolution if the shape changes."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu2 = nn.ReLU()
        same = before == after and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.skip(x))


class ResNet(nn.Module):
    """(n, 1, 8, 8) images to (n, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        same = [Block(16, 16) for _ in range(4)]
        self.blocks = nn.Sequential(*same, Block(16, 32, stride=2), Block(32, 32), Block(32, 32))
        self.classify = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.conv(image))))
        return self.classify(x.mean((2, 3)))


def main() -> None:
    out = setup(__doc__)
    train_x, train_y, test_x, test_y = digits()
    network = ResNet()
    train(network, lambda rows: [shifted(train_x[rows]).unsqueeze(1)], train_y, epochs=EPOCHS, rate=5e-3)
    publish(
        network,
        "digits_resnet",
        {"image": test_x.unsqueeze(1)},
        test_y,
        out,
        about="""Residual convolutional network with BatchNorm that reads handwritten digits of 8x8 pixels,
        0 white to 1 black.""",
        data=DIGITS_SOURCE,
        data_licence=DIGITS_LICENCE,
        keep_batchnorm=True,
    )


if __name__ == "__main__":
    main()
