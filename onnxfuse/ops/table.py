"""The table of operators: what each one is, in one row.

A row is a fact about the operator, not about an analysis of it: its kind, which inputs carry data and which
hold weights, and its traits. Lists of operators are queries:

    OPS.having(Trait.IDEMPOTENT)         the operators with a trait
    OPS.of_kind(Kind.POOL).names         names in ONNX's own domain
    OPS.get("com.microsoft", "Gelu")     one row

What an analysis knows of an operator is a rule beside that analysis, under the row's key (see `facet`); for
many operators the kind is enough, and they need no rule. So an element-wise operator takes one row here and
what is its own: its PyTorch function, and the bounds of its curve where it is not monotone.

The traits hold for data in floating point, for attributes that are not negative, and outside of training.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

Key = tuple[str, str]
"""An operator's domain ("" for ONNX's own) and name."""

MICROSOFT = "com.microsoft"
"""The domain of the operators that ONNX Runtime contributes."""

EVERY = None
"""As the number of operands: all inputs carry data."""


def parse_key(text: str) -> Key:
    """The key of an operator that is written "Conv" or "com.acme::Op"."""
    domain, _, name = text.rpartition("::")
    return "" if domain == "ai.onnx" else domain, name


class Kind(enum.Enum):
    """Families of operators, each with its description; an operator has one."""

    ACTIVATION = "a nonlinearity, element by element, that stands behind linear operators"
    ELEMENTWISE = "another function of elements"
    LINEAR = "sums up products of its operands, or of data and weights"
    RECURRENT = "runs a cell with weights over the steps of a sequence"
    ATTENTION = "queries attend to keys and values"
    EMBEDDING = "turns vectors by their positions"
    NORMALIZATION = "scales by statistics"
    SOFTMAX = "weighs the elements along an axis against each other"
    POOL = "one value for each window"
    REDUCE = "one value for each run along axes"
    CUMULATIVE = "combines each element with those before it along an axis"
    MOVE = "moves, copies or drops elements"
    SCATTER = "writes elements into a tensor at computed places"
    SEARCH = "places of elements, and elements by their order"
    RESAMPLE = "values between the places of an image"
    QUANTIZE = "between numbers and their compact form"
    SHAPE = "the shape of a tensor, not its values"
    FILL = "makes a tensor from sizes and attributes"
    RANDOM = "draws numbers"
    SIGNAL = "Fourier transforms and what goes with them"
    LOSS = "a training objective"
    SEQUENCE = "sequences of tensors, and optional ones"
    CONTROL = "runs graphs that it holds in its attributes"
    OTHER = "none of these: text, image files, lists of boxes"


class Trait(enum.Flag):
    """Yes-or-no facts; see the module on what they leave aside."""

    NONE = 0
    IDEMPOTENT = enum.auto()
    """f(f(x)) = f(x)."""
    MONOTONE = enum.auto()
    """A function of one input that does not decrease, where it is defined."""
    KEEPS_ZERO = enum.auto()
    """Zeros in its operands give zeros."""
    AFFINE = enum.auto()
    """Its output is an affine function of its operands taken together."""
    SCALES = enum.auto()
    """Linear in each of two operands: one scales the other (of a quotient the second scales the first)."""
    ADDS = enum.auto()
    """The sum of its operands, each with factor 1."""
    SELECTS = enum.auto()
    """Every element that it gives is one of an operand, a bound, a filling or 0: nothing is computed."""
    SAME_ELEMENTS = enum.auto()
    """The elements of its operand, each once, perhaps in other places."""
    SAME_ORDER = enum.auto()
    """The elements of its operand, each once, in the same order, whatever the shape."""
    CARRIES_WEIGHTS = enum.auto()
    """Hands elements of its operands on, moved, cut, repeated, padded or cast: a weight behind it still is
    that weight, an index that index."""
    CONVOLVES = enum.auto()
    """Moves a kernel of float weights over a regular grid."""
    SIZES = enum.auto()
    """Exporters compute sizes with it: shapes, bounds of slices, numbers of heads."""


_NONE, _IDEMPOTENT, _MONOTONE, _ZERO = Trait.NONE, Trait.IDEMPOTENT, Trait.MONOTONE, Trait.KEEPS_ZERO
_AFFINE, _SCALES, _ADDS, _SELECTS = Trait.AFFINE, Trait.SCALES, Trait.ADDS, Trait.SELECTS
_CARRIES, _CONVOLVES, _SIZES = Trait.CARRIES_WEIGHTS, Trait.CONVOLVES, Trait.SIZES
_LINEAR_MAP = _AFFINE | _ZERO
_PICKS = _LINEAR_MAP | _SELECTS
_PERMUTES = _PICKS | Trait.SAME_ELEMENTS
_VIEWS = _PERMUTES | Trait.SAME_ORDER
_COPIES = _VIEWS | _IDEMPOTENT | _MONOTONE


@dataclass(frozen=True)
class Op:
    """One operator.

    Attributes:
        name: as ONNX spells it.
        kind: its family.
        domains: where it is found, with the same meaning; "" is ONNX's own.
        operands: how many of the first inputs carry data, `EVERY` for all; the others are parameters.
        weights: the inputs where a stored float tensor is something that was trained.
        traits: see `Trait`.
    """

    name: str
    kind: Kind
    domains: tuple[str, ...] = ("",)
    operands: int | None = 1
    weights: tuple[int, ...] = ()
    traits: Trait = Trait.NONE


class Operators:
    """A set of operators, each under its keys. Queries give smaller sets."""

    def __init__(self, rows: Mapping[Key, Op]) -> None:
        self._rows = dict(rows)
        self.names = frozenset(name for domain, name in self._rows if not domain)
        """The names of those in ONNX's own domain."""

    def having(self, *traits: Trait) -> Operators:
        """Those with all these traits."""
        return self._where(lambda op: all(trait in op.traits for trait in traits))

    def of_kind(self, *kinds: Kind) -> Operators:
        """Those of any of these kinds."""
        return self._where(lambda op: op.kind in kinds)

    def weighted(self) -> Operators:
        """Those with inputs for trained weights."""
        return self._where(lambda op: bool(op.weights))

    def unary(self) -> Operators:
        """Those whose first input alone carries data."""
        return self._where(lambda op: op.operands == 1)

    def get(self, domain: str, name: str) -> Op | None:
        """The row of an operator, None for one that is not in the set."""
        return self._rows.get((domain, name))

    def items(self) -> Iterable[tuple[Key, Op]]:
        """Keys with their rows."""
        return self._rows.items()

    def _where(self, holds: Callable[[Op], bool]) -> Operators:
        return Operators({key: op for key, op in self._rows.items() if holds(op)})

    def __or__(self, other: Operators) -> Operators:
        return Operators({**self._rows, **other._rows})

    def __sub__(self, other: Operators) -> Operators:
        return Operators({key: op for key, op in self._rows.items() if key not in other})

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[Key]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


_BOTH = ("", MICROSOFT)
_ROWS = (
    # Activations
    Op("Abs", Kind.ACTIVATION, traits=_IDEMPOTENT | _ZERO | _SIZES),
    Op("Celu", Kind.ACTIVATION, traits=_MONOTONE | _ZERO),
    Op("Clip", Kind.ACTIVATION, traits=_IDEMPOTENT | _MONOTONE | _SELECTS | _SIZES),
    Op("Elu", Kind.ACTIVATION, traits=_MONOTONE | _ZERO),
    Op("Erf", Kind.ACTIVATION, traits=_MONOTONE | _ZERO),
    Op("Gelu", Kind.ACTIVATION, _BOTH, traits=_ZERO),
    Op("HardSigmoid", Kind.ACTIVATION, traits=_MONOTONE),
    Op("HardSwish", Kind.ACTIVATION, traits=_ZERO),
    Op("LeakyRelu", Kind.ACTIVATION, traits=_MONOTONE | _ZERO),
    Op("Mish", Kind.ACTIVATION, traits=_ZERO),
    Op("PRelu", Kind.ACTIVATION, operands=EVERY, weights=(1,), traits=_ZERO),
    Op("Relu", Kind.ACTIVATION, traits=_IDEMPOTENT | _MONOTONE | _ZERO | _SELECTS),
    Op("Selu", Kind.ACTIVATION, traits=_MONOTONE | _ZERO),
    Op("Shrink", Kind.ACTIVATION, traits=_ZERO),
    Op("Sigmoid", Kind.ACTIVATION, traits=_MONOTONE),
    Op("Softplus", Kind.ACTIVATION, traits=_MONOTONE),
    Op("Softsign", Kind.ACTIVATION, traits=_MONOTONE | _ZERO),
    Op("SwiGLU", Kind.ACTIVATION, operands=EVERY, traits=_ZERO),
    Op("Swish", Kind.ACTIVATION, traits=_ZERO),
    Op("Tanh", Kind.ACTIVATION, traits=_MONOTONE | _ZERO),
    Op("ThresholdedRelu", Kind.ACTIVATION, traits=_IDEMPOTENT | _MONOTONE | _ZERO | _SELECTS),
    Op("BiasGelu", Kind.ACTIVATION, (MICROSOFT,), operands=EVERY, weights=(1,), traits=_ZERO),
    Op("FastGelu", Kind.ACTIVATION, (MICROSOFT,), operands=EVERY, weights=(1,), traits=_ZERO),
    Op("QuickGelu", Kind.ACTIVATION, (MICROSOFT,), traits=_ZERO),
    Op("ScaledSiLU", Kind.ACTIVATION, (MICROSOFT,), traits=_ZERO),
    # Element by element
    Op("Acos", Kind.ELEMENTWISE),
    Op("Acosh", Kind.ELEMENTWISE, traits=_MONOTONE),
    Op("Add", Kind.ELEMENTWISE, operands=EVERY, weights=(0, 1), traits=_LINEAR_MAP | _ADDS | _SIZES),
    Op("And", Kind.ELEMENTWISE, operands=EVERY, traits=_SIZES),
    Op("Asin", Kind.ELEMENTWISE, traits=_MONOTONE | _ZERO),
    Op("Asinh", Kind.ELEMENTWISE, traits=_MONOTONE | _ZERO),
    Op("Atan", Kind.ELEMENTWISE, traits=_MONOTONE | _ZERO),
    Op("Atanh", Kind.ELEMENTWISE, traits=_MONOTONE | _ZERO),
    Op("BitShift", Kind.ELEMENTWISE, operands=EVERY),
    Op("BitwiseAnd", Kind.ELEMENTWISE, operands=EVERY),
    Op("BitwiseNot", Kind.ELEMENTWISE),
    Op("BitwiseOr", Kind.ELEMENTWISE, operands=EVERY),
    Op("BitwiseXor", Kind.ELEMENTWISE, operands=EVERY),
    Op("Cast", Kind.ELEMENTWISE, traits=_LINEAR_MAP | _CARRIES | _SIZES),
    Op("CastLike", Kind.ELEMENTWISE, traits=_LINEAR_MAP | _CARRIES),
    Op("Ceil", Kind.ELEMENTWISE, traits=_IDEMPOTENT | _MONOTONE | _ZERO | _SIZES),
    Op("Cos", Kind.ELEMENTWISE),
    Op("Cosh", Kind.ELEMENTWISE),
    Op("Div", Kind.ELEMENTWISE, operands=EVERY, weights=(0, 1), traits=_SCALES | _SIZES),
    Op("Dropout", Kind.ELEMENTWISE, traits=_COPIES),
    Op("Equal", Kind.ELEMENTWISE, operands=EVERY, traits=_SIZES),
    Op("Exp", Kind.ELEMENTWISE, traits=_MONOTONE | _SIZES),
    Op("Floor", Kind.ELEMENTWISE, traits=_IDEMPOTENT | _MONOTONE | _ZERO | _SIZES),
    Op("Greater", Kind.ELEMENTWISE, operands=EVERY, traits=_SIZES),
    Op("GreaterOrEqual", Kind.ELEMENTWISE, operands=EVERY, traits=_SIZES),
    Op("Identity", Kind.ELEMENTWISE, traits=_COPIES | _CARRIES | _SIZES),
    Op("IsInf", Kind.ELEMENTWISE),
    Op("IsNaN", Kind.ELEMENTWISE),
    Op("Less", Kind.ELEMENTWISE, operands=EVERY, traits=_SIZES),
    Op("LessOrEqual", Kind.ELEMENTWISE, operands=EVERY, traits=_SIZES),
    Op("Log", Kind.ELEMENTWISE, traits=_MONOTONE | _SIZES),
    Op("Max", Kind.ELEMENTWISE, operands=EVERY, traits=_ZERO | _SELECTS | _SIZES),
    Op("Mean", Kind.ELEMENTWISE, operands=EVERY, traits=_LINEAR_MAP),
    Op("Min", Kind.ELEMENTWISE, operands=EVERY, traits=_ZERO | _SELECTS | _SIZES),
    Op("Mod", Kind.ELEMENTWISE, operands=EVERY, traits=_SIZES),
    Op("Mul", Kind.ELEMENTWISE, operands=EVERY, weights=(0, 1), traits=_SCALES | _ZERO | _SIZES),
    Op("Neg", Kind.ELEMENTWISE, traits=_LINEAR_MAP | _SIZES),
    Op("Not", Kind.ELEMENTWISE, traits=_SIZES),
    Op("Or", Kind.ELEMENTWISE, operands=EVERY, traits=_SIZES),
    Op("Pow", Kind.ELEMENTWISE, operands=EVERY, weights=(0, 1), traits=_SIZES),
    Op("Reciprocal", Kind.ELEMENTWISE, traits=_SIZES),
    Op("Round", Kind.ELEMENTWISE, traits=_IDEMPOTENT | _MONOTONE | _ZERO | _SIZES),
    Op("Sign", Kind.ELEMENTWISE, traits=_IDEMPOTENT | _MONOTONE | _ZERO | _SIZES),
    Op("Sin", Kind.ELEMENTWISE, traits=_ZERO),
    Op("Sinh", Kind.ELEMENTWISE, traits=_MONOTONE | _ZERO),
    Op("Sqrt", Kind.ELEMENTWISE, traits=_MONOTONE | _ZERO | _SIZES),
    Op("Sub", Kind.ELEMENTWISE, operands=EVERY, weights=(0, 1), traits=_LINEAR_MAP | _SIZES),
    Op("Sum", Kind.ELEMENTWISE, operands=EVERY, traits=_LINEAR_MAP | _ADDS),
    Op("Tan", Kind.ELEMENTWISE, traits=_ZERO),
    Op("Where", Kind.ELEMENTWISE, operands=EVERY, traits=_ZERO | _SELECTS | _SIZES),
    Op("Xor", Kind.ELEMENTWISE, operands=EVERY),
    # Linear, recurrent, attention
    Op("CausalConvWithState", Kind.LINEAR, weights=(1, 2)),
    Op("Conv", Kind.LINEAR, weights=(1, 2), traits=_CONVOLVES),
    Op("ConvInteger", Kind.LINEAR),
    Op("ConvTranspose", Kind.LINEAR, weights=(1, 2), traits=_CONVOLVES),
    Op("DeformConv", Kind.LINEAR, weights=(1, 3)),
    Op("Einsum", Kind.LINEAR, operands=EVERY, weights=(0, 1)),
    Op("Gemm", Kind.LINEAR, operands=2, weights=(0, 1, 2)),
    Op("MatMul", Kind.LINEAR, operands=EVERY, weights=(0, 1)),
    Op("MatMulInteger", Kind.LINEAR, operands=2),
    Op("QLinearConv", Kind.LINEAR),
    Op("QLinearMatMul", Kind.LINEAR),
    Op("FusedConv", Kind.LINEAR, (MICROSOFT,), weights=(1, 2), traits=_CONVOLVES),
    Op("FusedGemm", Kind.LINEAR, (MICROSOFT,), operands=2, weights=(0, 1, 2)),
    Op("FusedMatMul", Kind.LINEAR, (MICROSOFT,), operands=EVERY, weights=(0, 1)),
    Op("GRU", Kind.RECURRENT, weights=(1, 2, 3)),
    Op("LSTM", Kind.RECURRENT, weights=(1, 2, 3, 7)),
    Op("RNN", Kind.RECURRENT, weights=(1, 2, 3)),
    Op("Attention", Kind.ATTENTION, operands=3),
    Op("LinearAttention", Kind.ATTENTION, operands=3),
    Op("GroupQueryAttention", Kind.ATTENTION, (MICROSOFT,), operands=3),
    Op("MultiHeadAttention", Kind.ATTENTION, (MICROSOFT,), operands=3),
    Op("RotaryEmbedding", Kind.EMBEDDING, _BOTH),
    # Normalization
    Op("BatchNormalization", Kind.NORMALIZATION, weights=(1, 2)),
    Op("GroupNormalization", Kind.NORMALIZATION, weights=(1, 2)),
    Op("InstanceNormalization", Kind.NORMALIZATION, weights=(1, 2)),
    Op("LRN", Kind.NORMALIZATION),
    Op("LayerNormalization", Kind.NORMALIZATION, _BOTH, weights=(1, 2)),
    Op("LpNormalization", Kind.NORMALIZATION),
    Op("MeanVarianceNormalization", Kind.NORMALIZATION),
    Op("RMSNormalization", Kind.NORMALIZATION, weights=(1,)),
    # ONNX Runtime keeps it in ONNX's domain, where ONNX does not list it.
    Op("SimplifiedLayerNormalization", Kind.NORMALIZATION, weights=(1,)),
    Op("SkipLayerNormalization", Kind.NORMALIZATION, (MICROSOFT,), operands=2, weights=(2, 3, 4)),
    Op("SkipSimplifiedLayerNormalization", Kind.NORMALIZATION, (MICROSOFT,), operands=2, weights=(2, 3)),
    # Over windows and axes
    Op("Hardmax", Kind.SOFTMAX),
    Op("LogSoftmax", Kind.SOFTMAX),
    Op("Softmax", Kind.SOFTMAX),
    Op("AveragePool", Kind.POOL, traits=_LINEAR_MAP),
    Op("GlobalAveragePool", Kind.POOL, traits=_LINEAR_MAP),
    Op("GlobalLpPool", Kind.POOL, traits=_ZERO),
    Op("GlobalMaxPool", Kind.POOL, traits=_ZERO | _SELECTS),
    Op("LpPool", Kind.POOL, traits=_ZERO),
    Op("MaxPool", Kind.POOL, traits=_ZERO | _SELECTS),
    Op("ReduceL1", Kind.REDUCE, traits=_ZERO),
    Op("ReduceL2", Kind.REDUCE, traits=_ZERO),
    Op("ReduceLogSum", Kind.REDUCE),
    Op("ReduceLogSumExp", Kind.REDUCE),
    Op("ReduceMax", Kind.REDUCE, traits=_ZERO | _SELECTS | _SIZES),
    Op("ReduceMean", Kind.REDUCE, traits=_LINEAR_MAP),
    Op("ReduceMin", Kind.REDUCE, traits=_ZERO | _SELECTS | _SIZES),
    Op("ReduceProd", Kind.REDUCE, traits=_ZERO | _SIZES),
    Op("ReduceSum", Kind.REDUCE, traits=_LINEAR_MAP | _SIZES),
    Op("ReduceSumSquare", Kind.REDUCE, traits=_ZERO),
    Op("CumProd", Kind.CUMULATIVE),
    Op("CumSum", Kind.CUMULATIVE, traits=_LINEAR_MAP),
    # Moving elements
    Op("CenterCropPad", Kind.MOVE, traits=_PICKS),
    Op("Col2Im", Kind.MOVE, traits=_LINEAR_MAP),
    Op("Compress", Kind.MOVE, traits=_PICKS),
    Op("Concat", Kind.MOVE, operands=EVERY, traits=_PICKS | _CARRIES | _SIZES),
    Op("DepthToSpace", Kind.MOVE, traits=_PERMUTES),
    Op("Expand", Kind.MOVE, traits=_PICKS | _CARRIES | _SIZES),
    Op("Flatten", Kind.MOVE, traits=_VIEWS | _CARRIES | _SIZES),
    Op("Gather", Kind.MOVE, weights=(0,), traits=_PICKS | _SIZES),
    Op("GatherElements", Kind.MOVE, weights=(0,), traits=_PICKS),
    Op("GatherND", Kind.MOVE, weights=(0,), traits=_PICKS),
    Op("Pad", Kind.MOVE, traits=_AFFINE | _SELECTS | _CARRIES),
    Op("Reshape", Kind.MOVE, traits=_VIEWS | _CARRIES | _SIZES),
    Op("ReverseSequence", Kind.MOVE, traits=_PERMUTES),
    Op("Slice", Kind.MOVE, traits=_PICKS | _CARRIES | _SIZES),
    Op("SpaceToDepth", Kind.MOVE, traits=_PERMUTES),
    Op("Split", Kind.MOVE, traits=_PICKS | _CARRIES | _SIZES),
    Op("Squeeze", Kind.MOVE, traits=_VIEWS | _CARRIES | _SIZES),
    Op("Tile", Kind.MOVE, traits=_PICKS | _CARRIES | _SIZES),
    Op("Transpose", Kind.MOVE, traits=_PERMUTES | _CARRIES | _SIZES),
    Op("Trilu", Kind.MOVE, traits=_PICKS),
    Op("Unsqueeze", Kind.MOVE, traits=_VIEWS | _CARRIES | _SIZES),
    Op("Scatter", Kind.SCATTER, traits=_SELECTS),
    Op("ScatterElements", Kind.SCATTER),
    Op("ScatterND", Kind.SCATTER),
    Op("TensorScatter", Kind.SCATTER, operands=2, traits=_SELECTS),
    Op("ArgMax", Kind.SEARCH),
    Op("ArgMin", Kind.SEARCH),
    Op("NonMaxSuppression", Kind.SEARCH, operands=2),
    Op("NonZero", Kind.SEARCH),
    Op("OneHot", Kind.SEARCH),
    Op("TopK", Kind.SEARCH),
    Op("Unique", Kind.SEARCH),
    # Images and signals
    Op("AffineGrid", Kind.RESAMPLE),
    Op("GridSample", Kind.RESAMPLE, operands=2),
    Op("MaxRoiPool", Kind.RESAMPLE),
    Op("MaxUnpool", Kind.RESAMPLE),
    Op("Resize", Kind.RESAMPLE),
    Op("RoiAlign", Kind.RESAMPLE),
    Op("Upsample", Kind.RESAMPLE),
    Op("BlackmanWindow", Kind.SIGNAL),
    Op("DFT", Kind.SIGNAL),
    Op("HammingWindow", Kind.SIGNAL),
    Op("HannWindow", Kind.SIGNAL),
    Op("MelWeightMatrix", Kind.SIGNAL),
    Op("STFT", Kind.SIGNAL, weights=(2,)),
    # Types and shapes
    Op("BitCast", Kind.OTHER),
    Op("DequantizeLinear", Kind.QUANTIZE),
    Op("DynamicQuantizeLinear", Kind.QUANTIZE),
    Op("QuantizeLinear", Kind.QUANTIZE),
    Op("Shape", Kind.SHAPE),
    Op("Size", Kind.SHAPE),
    Op("Constant", Kind.FILL),
    Op("ConstantOfShape", Kind.FILL, traits=_SELECTS | _SIZES),
    Op("EyeLike", Kind.FILL),
    Op("Range", Kind.FILL, traits=_SIZES),
    Op("Bernoulli", Kind.RANDOM),
    Op("Multinomial", Kind.RANDOM),
    Op("RandomNormal", Kind.RANDOM),
    Op("RandomNormalLike", Kind.RANDOM),
    Op("RandomUniform", Kind.RANDOM),
    Op("RandomUniformLike", Kind.RANDOM),
    # Control flow, sequences, and the rest
    Op("If", Kind.CONTROL),
    Op("Loop", Kind.CONTROL),
    Op("Scan", Kind.CONTROL),
    Op("SequenceMap", Kind.CONTROL),
    Op("ConcatFromSequence", Kind.SEQUENCE),
    Op("Optional", Kind.SEQUENCE),
    Op("OptionalGetElement", Kind.SEQUENCE),
    Op("OptionalHasElement", Kind.SEQUENCE),
    Op("SequenceAt", Kind.SEQUENCE),
    Op("SequenceConstruct", Kind.SEQUENCE),
    Op("SequenceEmpty", Kind.SEQUENCE),
    Op("SequenceErase", Kind.SEQUENCE),
    Op("SequenceInsert", Kind.SEQUENCE),
    Op("SequenceLength", Kind.SEQUENCE),
    Op("SplitToSequence", Kind.SEQUENCE),
    Op("NegativeLogLikelihoodLoss", Kind.LOSS, operands=2),
    Op("SoftmaxCrossEntropyLoss", Kind.LOSS, operands=2),
    Op("Det", Kind.OTHER),
    Op("ImageDecoder", Kind.OTHER),
    Op("RegexFullMatch", Kind.OTHER),
    Op("StringConcat", Kind.OTHER),
    Op("StringNormalizer", Kind.OTHER),
    Op("StringSplit", Kind.OTHER),
    Op("TfIdfVectorizer", Kind.OTHER),
)

OPS = Operators({(domain, op.name): op for op in _ROWS for domain in op.domains})
"""All operators that onnxfuse knows."""
