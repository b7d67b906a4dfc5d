"""A transformer encoder of four layers on scikit-learn's digits, read as sequences of ink.

The inked pixels of an image, in reading order, are its tokens: one id for each of 64 places and 4 shades,
so a sequence is 16 to 42 tokens long and is padded with 0. That gives what a text model has, with clean and
tiny data: integer ids, an attention mask, and padding tokens that nothing may depend on. Layers are
pre-norm, four heads, width 64, GELU. Writes `tiny_transformer.onnx` and `tiny_transformer.npz` (inputs
`input_ids`, `attention_mask`), whose 600 rows are the test split: never trained on. About a minute on one
core.

    python models/tiny_transformer.py [--out FOLDER]
"""

import torch
from common import DIGITS_LICENCE, DIGITS_SOURCE, TransformerLayer, digits, publish, setup, shifted, train
from torch import Tensor, nn

EPOCHS = 50
LAYERS = 4
WIDTH = 64
HEADS = 4
HIDDEN = 128
SHADES = 4
PAD = 0


def tokens(images: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask, both (n, longest) int64, of (n, 8, 8) images in [0, 1].

    Pixel p of shade s in 0..3 (white has none) is id 1 + 4 p + s; padding is id 0 with mask 0.
    """
    ink = (images.flatten(1) * SHADES).ceil().long()
    ids = torch.where(ink > 0, torch.arange(ink.shape[1]) * SHADES + ink, PAD)
    order = torch.sort((ink == 0).long(), dim=1, stable=True).indices[:, : (ink > 0).sum(1).max()]
    ids = ids.gather(1, order)
    return ids, (ids != PAD).long()


class InkEmbedding(nn.Module):
    """The embedding in training: a token is its place plus its shade, which few images can teach."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(64, 1, WIDTH) / 2)
        self.shade = nn.Parameter(torch.randn(1, SHADES, WIDTH) / 2)

    def table(self) -> Tensor:
        """(1 + 64 * 4, 64): a row for each id, zeros for padding."""
        return torch.cat([torch.zeros(1, WIDTH), (self.place + self.shade).flatten(0, 1)])

    def forward(self, ids: Tensor) -> Tensor:
        return self.table()[ids]


class Encoder(nn.Module):
    """(n, length) ids and mask to (n, 10) logits, from the mean over the tokens that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Module = InkEmbedding()
        self.layers = nn.ModuleList(TransformerLayer(WIDTH, HEADS, HIDDEN) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.classify = nn.Linear(WIDTH, 10)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.float()
        bias = ((mask - 1) * 1e4).unsqueeze(1).unsqueeze(1)
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, bias)
        weight = mask.unsqueeze(2)
        return self.classify((self.norm(x) * weight).sum(1) / weight.sum(1))


def main() -> None:
    out = setup(__doc__)
    train_x, train_y, test_x, test_y = digits()
    network = Encoder()
    train(network, lambda rows: tokens(shifted(train_x[rows])), train_y, epochs=EPOCHS, rate=2e-3)
    network.embedding = nn.Embedding.from_pretrained(network.embedding.table().detach(), padding_idx=PAD)
    ids, mask = tokens(test_x)
    publish(
        network,
        "tiny_transformer",
        {"input_ids": ids, "attention_mask": mask},
        test_y,
        out,
        about="""Transformer encoder (4 layers, width 64, 4 heads) that reads handwritten digits as sequences
        of inked pixels: id 1 + 4 p + s for pixel p of 8x8 in reading order and shade s of 4, 0 for
        padding.""",
        data=DIGITS_SOURCE,
        data_licence=DIGITS_LICENCE,
        axes={0: "batch", 1: "sequence"},
    )


if __name__ == "__main__":
    main()
