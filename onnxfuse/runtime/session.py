"""ONNX Runtime sessions: the judge of every pass.

Three promises hold for every session made here.

- *The provider is what the session says it is.* `onnxruntime.get_available_providers()` lists what the wheel
  was built with, not what this machine can load. So a provider counts only when a one-node session made with
  it reports it in `get_providers()`; that probe runs once a process, its output kept off the screen.
- *Nothing is printed.* ONNX Runtime's warnings and errors reach the user as one-line exceptions, never logs.
- *A feed is checked before it runs.* Names, types, ranks and fixed sizes are compared with the model's
  declaration and nothing is cast, so samples of float64 or of raw bytes are named as such, not converted.
  Only for types that NumPy lacks other arrays may stand (`narrow.stands_for`).

Inner tensors are read through *taps*: extra graph outputs appended to a copy of the model. ONNX Runtime
infers their types, and fuses nothing across a tapped tensor, so tap only what is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.shapes import TensorInfo, info_of
from onnxfuse.runtime.failures import failing_clearly, one_line
from onnxfuse.runtime.feeds import check_feed
from onnxfuse.runtime.handover import handed_over, runnable, set_outputs
from onnxfuse.runtime.narrow import NARROW, array_of, as_fed, is_narrow, ort_value
from onnxfuse.runtime.onnx_runtime import ort
from onnxfuse.runtime.providers import (
    CPU_PROVIDER,
    GPU_PROVIDERS,
    available_cores,
    make_session,
    probe_provider,
    session_options,
    short_name,
)

_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


class Runtime:
    """A provider and a number of threads to run models with. Cheap to make; makes `Session`s."""

    def __init__(self, provider: str = "auto", threads: int | None = None, device_id: int = 0) -> None:
        """Settle on a provider.

        Args:
            provider: "auto" is CUDA where a session really gets it, else CPU; or a name: "cpu", "cuda", ...
            threads: of one operator on the CPU; None takes `available_cores()`, and one for timings.
            device_id: which GPU.

        Raises:
            InputError: the named provider is unknown or cannot be had here, or `threads` is below 1.
        """
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        self.threads = threads or available_cores()
        self.timing_threads = threads or 1
        self.device_id = device_id
        self._provider = self._choose(provider)
        self.providers = (
            [self._provider] if self._provider == CPU_PROVIDER else [self._provider, CPU_PROVIDER]
        )

    def single(self) -> Runtime:
        """The same with one thread, for runs side by side."""
        twin = copy.copy(self)
        twin.threads = 1
        return twin

    def _choose(self, wanted: str) -> str:
        known = {short_name(name): name for name in ort.get_available_providers()}
        if wanted == "auto":
            cuda = known.get("cuda")
            return cuda if cuda and probe_provider(cuda, self.device_id)[0] == cuda else CPU_PROVIDER
        name = known.get(short_name(wanted)) or known.get(wanted.lower())
        if name is None:
            choices = ", ".join(["auto", *known])
            raise InputError(
                f"provider '{wanted}' is not in this build of ONNX Runtime; choose from {choices}"
            )
        if name == CPU_PROVIDER:
            return name
        got, reason = probe_provider(name, self.device_id)
        if got != name:
            raise InputError(f"provider '{wanted}' cannot be used on this machine: {reason}")
        return name

    def session(
        self,
        model: Model | onnx.ModelProto,
        *,
        taps: Sequence[str] = (),
        outputs: Sequence[str] | None = None,
        optimize: bool = True,
        threads: int | None = None,
        folder: Path | None = None,
    ) -> Session:
        """Make `model` ready to run.

        Args:
            model: left as it is; a `Model`'s external data is looked up in its folder (`Model.external_dir`).
            taps: tensors of the main graph to return besides the outputs; any may be named, outputs included.
            outputs: the outputs wanted, None for all; what nothing wanted depends on is not computed.
            optimize: False runs the graph as it is written, for noise floors.
            threads: overrides the runtime's number.
            folder: where the external data of a proto is.

        Raises:
            InputError: no tensor of a wanted name.
            NotApplicableError: ONNX Runtime refuses the model, or it is too large to hand over.
        """
        options = session_options()
        options.intra_op_num_threads = threads or self.threads
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if isinstance(model, onnx.ModelProto):
            proto = model
        else:
            proto, folder = runnable(model)
        if folder is not None:
            options.add_session_config_entry(_EXTERNAL_FOLDER, str(folder))
        declared = [output.name for output in proto.graph.output]
        wanted = list(dict.fromkeys([*(declared if outputs is None else outputs), *taps]))
        if wanted != declared:
            if proto is model:
                proto = onnx.ModelProto()
                proto.CopyFrom(model)
            set_outputs(proto, wanted)
        inputs = [info_of(value) for value in proto.graph.input]
        data, _values = handed_over(proto, options)  # the values must live until the session has copied them
        del model, proto  # a copy of all weights less while the session makes its own
        try:
            session = make_session(data, options, self._provider, self.device_id)
        except Exception as error:  # ORT's exceptions share no base class
            raise NotApplicableError(f"ONNX Runtime cannot load the model: {one_line(error)}") from error
        if session.get_providers()[0] != self._provider:
            raise NotApplicableError(f"ONNX Runtime cannot run the model on {short_name(self._provider)}")
        return Session(session, inputs, self.device_id)


class Session:
    """A model ready to run. Made by `Runtime.session`.

    Attributes:
        inputs: what `run` must be fed, in the model's order.
        output_names: the outputs, then the taps.
        providers: what runs it, as ONNX Runtime says, first choice first.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        declared: Iterable[TensorInfo],
        device_id: int,
    ) -> None:
        """Takes over a session of ONNX Runtime's.

        Args:
            session: runs the model.
            declared: the model's inputs as its proto declares them.
            device_id: which GPU.
        """
        self._session = session
        self._device_id = device_id
        fed = {arg.name for arg in session.get_inputs()}  # without the initializers that are listed as inputs
        self.inputs = [info for info in declared if info.name in fed]
        self.output_names: list[str] = [arg.name for arg in session.get_outputs()]
        outputs = session.get_outputs()
        self._narrow = {arg.name for arg in outputs if is_narrow(arg.type)}
        numbers = (arg for arg in outputs if arg.type.startswith("tensor(") and arg.type != "tensor(string)")
        self._numbers = {arg.name for arg in numbers}
        self.providers: list[str] = session.get_providers()

    def run(self, feed: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> Feed:
        """Run once.

        Args:
            feed: one array for each input, of exactly its type, rank and fixed sizes.
            outputs: which of `output_names` to return, None for all.

        Returns:
            The arrays by name.

        Raises:
            InputError: the feed does not fit the inputs, or an output is not among `output_names`.
            NotApplicableError: ONNX Runtime failed on the way, for instance on an index out of range.
        """
        check_feed(feed, self.inputs)
        names = self.output_names if outputs is None else list(outputs)
        if unknown := [name for name in names if name not in self.output_names]:
            raise InputError(f"'{unknown[0]}' is not among this session's outputs")
        if not names:
            return {}
        arrays = self._as_fed(feed)
        with failing_clearly():
            narrow = self._narrow.intersection(names) or any(a.dtype in NARROW for a in arrays.values())
            if not narrow and not (self._numbers.issuperset(names) and all(map(_is_plain, arrays.values()))):
                return dict(zip(names, self._session.run(names, arrays), strict=True))
            # Values are taken as they are, where `run` would copy every output: taps are large.
            values = {name: ort_value(array) for name, array in arrays.items()}
            found = self._session.run_with_ort_values(names, values)
            return dict(zip(names, map(array_of, found), strict=True))

    def _as_fed(self, feed: Mapping[str, np.ndarray]) -> Feed:
        return {info.name: as_fed(feed[info.name], info.dtype) for info in self.inputs}

    def bind(self, feed: Mapping[str, np.ndarray]) -> Bound:
        """Put `feed` where the model runs, for repeated runs without copies. Raises as `run` does."""
        check_feed(feed, self.inputs)
        return Bound(self._session, self._as_fed(feed), self.output_names, self._narrow, self._device_id)


def _is_plain(value: object) -> bool:
    """Whether an input is a tensor of numbers, not text and not a sequence."""
    return isinstance(value, np.ndarray) and not value.dtype.hasobject and value.dtype.kind in "biufc"


class Bound:
    """One feed bound to a session: `run` as often as needed, `fetch` what the last run computed.

    On a GPU the inputs are copied to it once and the outputs stay there until they are fetched, so a timed
    `run` is the model alone.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        feed: Mapping[str, np.ndarray],
        outputs: Sequence[str],
        narrow: Collection[str],
        device_id: int,
    ) -> None:
        """Copies `feed` to where the model runs.

        Args:
            session: runs the model.
            feed: one array for each input.
            outputs: names of the outputs that are computed.
            narrow: those of types that NumPy lacks, which are read in the memory of the CPU.
            device_id: which GPU.
        """
        device = "cuda" if session.get_providers()[0] in GPU_PROVIDERS else "cpu"
        self._session = session
        self._outputs = outputs
        self._binding = session.io_binding()
        self._inputs: list[ort.OrtValue] = []  # on the CPU they are the caller's arrays, to be kept alive
        with failing_clearly():
            for name, array in feed.items():
                value = ort_value(array, device, device_id)
                self._inputs.append(value)
                self._binding.bind_ortvalue_input(name, value)
            for name in outputs:
                self._binding.bind_output(name, "cpu" if name in narrow else device, device_id)

    def run(self, times: int = 1) -> None:
        """Run, once or several times, and wait for the outputs. Raises NotApplicableError where ONNX Runtime
        fails."""
        with failing_clearly():
            for _ in range(times):
                self._session.run_with_iobinding(self._binding)

    def fetch(self) -> Feed:
        """The outputs of the last run by name, on the host."""
        return dict(zip(self._outputs, map(array_of, self._binding.get_outputs()), strict=True))
