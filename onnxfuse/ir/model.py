"""The model under edit: a graph that can be loaded, edited, typed and written.

Shapes come from the file and ONNX's inference; those that only a run shows are noted here by
`runtime.observed_shapes`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto

from onnxfuse.errors import InputError
from onnxfuse.ir import export, saving, validation
from onnxfuse.ir.editing import EditableGraph
from onnxfuse.ir.external_data import DataFolder
from onnxfuse.ir.graph import CycleError, without_collector
from onnxfuse.ir.shape_inference import Inference, infer, inferred, undeclared
from onnxfuse.ir.shapes import TensorInfo

Feed = dict[str, np.ndarray]
"""Arrays by the name of the input, output or inner tensor that they belong to."""

LoadableModel = str | os.PathLike[str] | bytes | ModelProto
"""A model for `Model.load`: a path, the bytes of a file, or a proto."""


class Model(EditableGraph):
    """A model under edit; `Model.load` makes one."""

    @classmethod
    def load(cls, source: LoadableModel, data: DataFolder | None = None) -> "Model":
        """A model from a path, the bytes of a file, or a ModelProto (which is copied).

        External data is only looked at for its place and size; of what is no path, it lies in `data`. Nodes
        that are out of order are sorted.

        Raises:
            InputError: the file is missing, damaged, no ONNX model, not valid, or too new; or its external
                data is missing, too short, or outside the model's folder, also through a symbolic link.
        """
        path, what = None, "the model"
        if isinstance(source, ModelProto):
            proto = ModelProto()
            proto.CopyFrom(source)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            proto = validation.parse(bytes(source), what)
        else:
            path = Path(source)
            what = f"'{path}'"
            proto = validation.parse(validation.read_file(path), what)
        validation.check_names(proto, what)
        validation.check_versions(proto, what)
        validation.check_attributes(proto.graph, what)
        validation.check_functions(proto, what)
        model = cls(proto, path, DataFolder.of_model(path) if path is not None else data)
        model._external = validation.check_tensors(proto, model.data)
        with without_collector():
            model._import()
        try:
            nodes = model.nodes
        except CycleError as error:
            raise InputError(f"{what} is not valid: {error}") from error
        validation.check_operators(proto, [n.origin for n in nodes if n.origin is not None], what)
        live = model._live(())
        model._dead_at_load = {n for n in nodes if n not in live}
        model._unused_at_load = {t for t in model.initializers if not model._used(t)}
        return model

    def shapes(self) -> dict[str, TensorInfo]:
        """Type and shape of every tensor of the main graph, by name.

        They come from the file's declarations and ONNX shape inference; `runtime.observed_shapes` knows more.
        """
        return dict(self._inference().shapes)

    def proven(self) -> dict[str, TensorInfo]:
        """Types and shapes of computed tensors and inputs, as they follow from the inputs' declarations
        alone.

        What the file declares of other tensors may be wrong: a batch of one there often survives from an
        export whose inputs were made dynamic afterwards. Whoever rewrites by a shape must not believe it.
        Sizes that don't follow are None or names that inference made up.
        """
        return dict(self._proven())

    def unproved(self) -> frozenset[str]:
        """The tensors of which `shapes` says what the file declares and the operators don't tell."""
        return self._inference().unproved

    def belied(self) -> frozenset[str]:
        """The tensors of which the file declares a shape that its operators contradict."""
        return self._inference().belied

    def _inference(self) -> Inference:
        return self.cached("shapes", lambda: infer(self, self._proven()))

    def _proven(self) -> dict[str, TensorInfo]:
        return self.cached("proven", lambda: inferred(undeclared(self)))

    def observations(self) -> list[tuple[Feed, dict[str, TensorInfo]]]:
        """The latest feeds of which the shapes are known, and these; to be added to, and empty again after
        an edit."""
        return self.cached("observations", list)

    def type_of(self, name: str) -> TensorInfo:
        """Like `shapes()[name]`; where that knows no type, with the type and rank that a run has shown."""
        info = self.shapes()[name]
        for _, run in self.observations() if info.dtype is None else ():
            shown = run.get(name)
            if shown is not None and shown.shape is not None:
                return TensorInfo(name, shown.dtype, (None,) * len(shown.shape))
        return info

    def to_proto(self) -> ModelProto:
        """The model as a proto of its own; external references stay references."""
        return export.model(self, self.shapes)

    def extract(self, inputs: Sequence[str], outputs: Sequence[str]) -> ModelProto:
        """A model of the nodes between, complete with the weights they need (external ones brought in).

        Its inputs are declared with what `shapes()` knows, so dynamic dimensions stay dynamic; the type of
        a tensor that only a run has shown counts, its sizes don't.

        Args:
            inputs: names of tensors that become the graph inputs.
            outputs: names of tensors that become the graph outputs.

        Raises:
            KeyError: no tensor of that name.
            InputError: an output depends on something else, or the type of an input is unknown.
        """
        return export.between(self, inputs, outputs, self.type_of)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model atomically: the file appears whole or not at all.

        External references keep pointing to the same file if it lies in the target's folder, else their
        data is copied, range by range, into `OUT.data` beside it. Edited tensors stay where they were,
        inline or external; a model that would pass 2 GB gets its initializers moved to `OUT.data` too.

        Raises:
            InputError: the target is the input or one of its data files (through links, too), or can't be
                written.
        """
        source = self.folder / self.path.name if self.folder and self.path else None
        saving.save(Path(path), export.shell(self, self.shapes), export.weights(self), self.data, source)
