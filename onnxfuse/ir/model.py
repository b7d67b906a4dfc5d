"""The model under edit: a graph that can be loaded, edited, typed and written.

Shapes come from the file and ONNX's inference; those that only a run shows are noted here by
`runtime.observed_shapes`.
"""

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto

from onnxfuse.errors import InputError
from onnxfuse.ir import export, external_data, saving, validation
from onnxfuse.ir.editing import EditableGraph
from onnxfuse.ir.graph import CycleError, without_collector
from onnxfuse.ir.nodes import Constant, Node
from onnxfuse.ir.shape_inference import infer
from onnxfuse.ir.shapes import TensorInfo, fill
from onnxfuse.runtime import observed_shapes

Feed = dict[str, np.ndarray]
Source = str | os.PathLike[str] | bytes | ModelProto


class Model(EditableGraph):
    """A model under edit; `Model.load` makes one."""

    @classmethod
    def load(cls, source: Source, folder: Path | None = None) -> "Model":
        """A model from a path, the bytes of a file, or a ModelProto (which is copied).

        External data is only looked at for its place and size; of what is no path, it lies in `folder`. Nodes
        that are out of order are sorted.

        Raises:
            InputError: the file is missing, damaged, no ONNX model, not valid, or too new; or its external
                data is missing, too short, outside the model's folder or behind a symbolic link.
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
        validation.check_functions(proto, what)
        model = cls(proto, path, Path(os.path.abspath(path)).parent if path is not None else folder)
        model._external = validation.check_tensors(proto, model.folder)
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

    def check_finite(self) -> None:
        """Streams all stored values; refuses NaN anywhere, and Inf where an operator computes with it as a
        parameter (`validation.PARAMETERS`; in a mask or a bound an infinity is meant).

        Raises:
            InputError: names the tensor.
        """
        for tensor in self.initializers:
            self._check_finite(tensor.name, tensor, self.consumers(tensor))
        for node in self.nodes:
            for key, value in node.attrs.items():
                if isinstance(value, Constant) and node.constant_form:
                    self._check_finite(node.outputs[0].name, value, self.consumers(node.outputs[0]))
                elif isinstance(value, Constant):
                    self._check_finite(f"{key} of {node.label}", value, ())
        bodies = (external_data.graph_tensors(body) for node in self.nodes for body in node.bodies)
        functions = (external_data.node_tensors(n) for f in self.source.functions for n in f.node)
        for proto in itertools.chain.from_iterable((*bodies, *functions)):
            if validation.find_nonfinite(proto, self.folder) == "NaN":
                raise InputError(f"tensor '{proto.name}' has a NaN value")

    def _check_finite(self, name: str, tensor: Constant, users: Iterable[Node]) -> None:
        stored = tensor.stored
        if stored is None:
            found = validation.nonfinite(tensor.values)
        else:
            found = validation.find_nonfinite(stored.values_proto, stored.folder)
        if found == "NaN" or (found and any(n.key in validation.PARAMETERS for n in users)):
            raise InputError(f"weight '{name}' has {'a NaN' if found == 'NaN' else 'an infinite'} value")

    def shapes(self, feed: Feed | None = None) -> dict[str, TensorInfo]:
        """Type and shape of every tensor of the main graph, by name.

        They come from the file's declarations and ONNX shape inference. Where a feed is given, what is
        still unknown comes from running ONNX Runtime on it, with the concrete sizes it has there.

        Raises:
            InputError: a feed that does not fit the inputs.
            NotApplicableError: a model that ONNX Runtime can't run, if it has to.
        """
        found = self.cached("shapes", lambda: infer(self))
        if feed is None or all(info.complete for info in found.values()):
            return dict(found)
        runs = self._runs()
        run = next((result for known, result in runs if _same_arrays(known, feed)), None)
        if run is None:
            run = observed_shapes.run(self, found, feed)
            runs[:] = [(dict(feed), run), *runs[:1]]
        return {name: fill(info, run.get(name)) for name, info in found.items()}

    def _runs(self) -> list[tuple[Feed, dict[str, TensorInfo]]]:
        """The latest feeds run for shapes, and what they showed."""
        return self.cached("runs", list)

    def type_of(self, name: str) -> TensorInfo:
        """Like `shapes()[name]`; where that knows no type, with the type and rank that a run has shown."""
        info = self.shapes()[name]
        for _, run in self._runs() if info.dtype is None else ():
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
        saving.save(Path(path), export.shell(self, self.shapes), export.weights(self), self.folder, source)


def _same_arrays(a: Feed, b: Feed) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
