"""An MLP, 64-128-128-64-10 with ReLU, on scikit-learn's digits.

Deeper than the task asks for, so that pairs and longer runs of dense layers can be fused. Writes
`digits_mlp.onnx` and `digits_mlp.npz` (input `pixels`, 0 white to 1 black, row by row), whose 600 rows are
the test split: never trained on. About ten seconds on one core.

    python models/digits_mlp.py [--out FOLDER]
"""

from collections import OrderedDict

from common import DIGITS_LICENCE, DIGITS_SOURCE, digits, publish, setup, shifted, train
from torch import nn

EPOCHS = 150


def build() -> nn.Module:
    """The network: (n, 64) pixels to (n, 10) logits."""
    layers = OrderedDict[str, nn.Module]()
    for i, (before, after) in enumerate([(64, 128), (128, 128), (128, 64)], start=1):
        layers[f"dense{i}"] = nn.Linear(before, after)
        layers[f"relu{i}"] = nn.ReLU()
    layers["classify"] = nn.Linear(64, 10)
    return nn.Sequential(layers)


def main() -> None:
    out = setup(__doc__)
    train_x, train_y, test_x, test_y = digits()
    network = build()
    train(network, lambda rows: [shifted(train_x[rows]).flatten(1)], train_y, epochs=EPOCHS, rate=3e-3)
    publish(
        network,
        "digits_mlp",
        {"pixels": test_x.flatten(1)},
        test_y,
        out,
        about="""MLP (64-128-128-64-10, ReLU) that reads handwritten digits of 8x8 pixels, row by row,
        0 white to 1 black.""",
        data=DIGITS_SOURCE,
        data_licence=DIGITS_LICENCE,
    )


if __name__ == "__main__":
    main()
