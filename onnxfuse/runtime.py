"""ONNX Runtime sessions: the judge of every pass.

Three promises hold for every session made here.

- *The provider is what the session says it is.* `onnxruntime.get_available_providers()` lists what the wheel
  was built with, not what this machine can load. So a provider counts only when a one-node session made with
  it reports it in `get_providers()`; that probe runs once a process, its output kept off the screen.
- *Nothing is printed.* ONNX Runtime's warnings and errors reach the user as one-line exceptions, never logs.
- *A feed is checked before it runs.* Names, types, ranks and fixed sizes are compared with the model's
  declaration and nothing is cast, so samples of float64 or of raw bytes are named as such, not converted.

Inner tensors are read through *taps*: extra graph outputs appended to a copy of the model. ONNX Runtime
infers their types, and fuses nothing across a tapped tensor, so tap only what is needed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import EncodeError
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.graph import Model
from onnxfuse.shapes import TensorInfo, info_of

Feed = dict[str, np.ndarray]
_Message = onnx.ModelProto | onnx.GraphProto


@contextlib.contextmanager
def _captured_output() -> Iterator[list[str]]:
    """Keep what C++ and Python code prints off the screen; the list gets the text when the block ends."""
    text: list[str] = []
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        spool = stack.enter_context(tempfile.TemporaryFile())
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed or absent stream
                stream.flush()
                saved = os.dup(descriptor)
                stack.callback(os.close, saved)
                stack.callback(os.dup2, saved, descriptor)
                os.dup2(spool.fileno(), descriptor)
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        try:
            yield text
        finally:
            spool.seek(0)
            text.append(spool.read().decode(errors="replace") + printed.getvalue())


with _captured_output():  # some builds log a failed device discovery while they are imported
    import onnxruntime as ort

_SILENT, _TALKING = 4, 3  # ORT's severities "fatal" and "error"; errors arrive as exceptions all the same
ort.set_default_logger_severity(_SILENT)
_CPU = "CPUExecutionProvider"
_GPU = {"CUDAExecutionProvider", "TensorrtExecutionProvider"}
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
_PROTOBUF_LIMIT = 2**31 - 1
# Of a model too large for one protobuf, tensors up to this size stay inside: shapes, axes, scales.
_KEPT_BYTES = 2**16


def available_cores() -> int:
    """Physical cores this process may use, by its affinity mask and its container's quota.

    ORT's own default counts the machine's cores, which oversubscribes the few that a container was given.
    """
    if not hasattr(os, "sched_getaffinity"):  # only Linux tells
        return os.cpu_count() or 1
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_read(siblings.format(cpu)) or cpu for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _cpu_quota()))


def _cpu_quota() -> int:
    """CPUs that the control group (version 2, else 1) grants, rounded up."""
    group = "/sys/fs/cgroup/"
    limits = _read(group + "cpu.max") or " ".join(
        _read(f"{group}cpu/cpu.cfs_{part}_us") or "max" for part in ("quota", "period")
    )
    quota, _, period = limits.partition(" ")
    unlimited = not (quota.isdigit() and period.isdigit())
    return sys.maxsize if unlimited else math.ceil(int(quota) / int(period))


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _short_name(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider").lower()


@functools.cache
def _probe(provider: str, device_id: int) -> tuple[str, str]:
    """What really happens when a session asks for `provider`: (the provider it got, why if another)."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    failure = ""
    with _captured_output() as text:
        ort.set_default_logger_severity(_TALKING)  # what the provider logs is the reason
        try:
            session = _make(model.SerializeToString(), _options(), provider, device_id)
            session.run(None, {"x": np.ones(1, np.float32)})
            got = session.get_providers()[0]
        except Exception as error:  # each provider fails in its own way, and any failure means "not here"
            got, failure = _CPU, str(error)
        finally:
            ort.set_default_logger_severity(_SILENT)
    return got, _load_failure(text[0] + failure)


def _load_failure(log: str) -> str:
    """The telling part of what a provider logs when it cannot be loaded."""
    for pattern in (
        r"with error: ([^\n]+)",
        r"(CUDA failure \d+: [^;\n]+)",
        r"(Please install [^\n]+?)[,.\n]",
    ):
        if found := re.search(pattern, log):
            return found[1].strip()
    return "ONNX Runtime could not make a session with it"


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    # Idle threads that spin take the cores that NumPy needs between two runs: ResNet-32 with a matrix product
    # after each batch of 64 takes 1.4 times as long on 2 busy cores. Batches of one are no slower without.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _make(model: bytes, options: ort.SessionOptions, provider: str, device_id: int) -> ort.InferenceSession:
    device: dict[str, str] = {"device_id": str(device_id)} if provider in _GPU else {}
    if provider == "CUDAExecutionProvider":
        # TensorFloat-32 keeps 10 bits of mantissa and is on by default: it would drown what a pass changed.
        device["use_tf32"] = "0"
    chain: list[Any] = [(provider, device)]
    if provider == "TensorrtExecutionProvider":
        chain.append(("CUDAExecutionProvider", {"device_id": str(device_id), "use_tf32": "0"}))
    if provider != _CPU:
        chain.append((_CPU, {}))
    return ort.InferenceSession(model, options, providers=chain, enable_fallback=0)


class Runtime:
    """Where and how models run: one provider, one number of threads. Cheap to make; makes `Session`s."""

    def __init__(self, provider: str = "auto", threads: int | None = None, device_id: int = 0) -> None:
        """Settle on a provider.

        Args:
            provider: "auto" is CUDA where a session really gets it, else CPU; or a name: "cpu", "cuda", ...
            threads: of one operator on the CPU; None takes `available_cores()`.
            device_id: which GPU.

        Raises:
            InputError: the named provider is unknown or cannot be had here, or `threads` is below 1.
        """
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        self.threads = threads or available_cores()
        self.device_id = device_id
        self._provider = self._choose(provider)
        self.providers = [self._provider] if self._provider == _CPU else [self._provider, _CPU]

    def single(self) -> Runtime:
        """The same with one thread, for runs side by side."""
        twin = copy.copy(self)
        twin.threads = 1
        return twin

    def _choose(self, wanted: str) -> str:
        known = {_short_name(name): name for name in ort.get_available_providers()}
        if wanted == "auto":
            cuda = known.get("cuda")
            return cuda if cuda and _probe(cuda, self.device_id)[0] == cuda else _CPU
        name = known.get(_short_name(wanted)) or known.get(wanted.lower())
        if name is None:
            choices = ", ".join(["auto", *known])
            raise InputError(
                f"provider '{wanted}' is not in this build of ONNX Runtime; choose from {choices}"
            )
        if name == _CPU:
            return name
        got, reason = _probe(name, self.device_id)
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
    ) -> Session:
        """Make `model` ready to run.

        Args:
            model: left as it is; external data is looked up in its folder (`Model.external_dir`).
            taps: tensors of the main graph to return besides the outputs; any may be named, outputs included.
            outputs: the outputs wanted, None for all; what nothing wanted depends on is not computed.
            optimize: False runs the graph as it is written, for noise floors.
            threads: overrides the runtime's number.

        Raises:
            InputError: no tensor of a wanted name.
            NotApplicableError: ONNX Runtime refuses the model, or it is too large to hand over.
        """
        options = _options()
        options.intra_op_num_threads = threads or self.threads
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if isinstance(model, onnx.ModelProto):
            proto = model
        else:
            proto = model.to_proto()
            if model.external_dir is not None:
                options.add_session_config_entry(_EXTERNAL_FOLDER, str(model.external_dir))
        declared = [output.name for output in proto.graph.output]
        wanted = list(dict.fromkeys([*(declared if outputs is None else outputs), *taps]))
        if wanted != declared:
            if proto is model:
                proto = onnx.ModelProto()
                proto.CopyFrom(model)
            _set_outputs(proto, wanted)
        data, _values = _handed_over(proto, options)  # the values must live until the session has copied them
        try:
            session = _make(data, options, self._provider, self.device_id)
        except Exception as error:  # ORT's exceptions share no base class
            raise NotApplicableError(f"ONNX Runtime cannot load the model: {_one_line(error)}") from error
        if session.get_providers()[0] != self._provider:
            raise NotApplicableError(f"ONNX Runtime cannot run the model on {_short_name(self._provider)}")
        return Session(session, proto.graph.input, self.device_id)


def _set_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Make `names` the model's outputs; new ones go untyped, ORT infers their types."""
    graph = proto.graph
    declared = {value.name: value for value in graph.output}
    known = {name for node in graph.node for name in node.output}
    known.update(item.name for item in (*graph.input, *graph.initializer))
    known.update(item.values.name for item in graph.sparse_initializer)
    if missing := [name for name in names if not name or name not in known]:
        raise InputError(f"the model has no tensor named '{missing[0]}'")
    del graph.output[:]
    graph.output.extend(declared.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    if not declared.keys() <= set(names):
        _drop_dead_nodes(graph)


def _drop_dead_nodes(graph: onnx.GraphProto) -> None:
    """Remove nodes that no output needs; ORT would run them all the same."""
    needed = {value.name for value in graph.output}
    live = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_used_names(node))
            live.append(node)
    nodes = live[::-1]
    del graph.node[:]
    graph.node.extend(nodes)


def _used_names(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node's inputs or anything in its bodies mention: at least the outer tensors it needs."""
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                yield from _used_names(inner)


def _serialized(proto: onnx.ModelProto) -> bytes | None:
    """The model's bytes; None where it is larger than one protobuf message can be, 2 GiB."""
    try:
        data = proto.SerializeToString()
    except EncodeError:
        return None
    return data if len(data) <= _PROTOBUF_LIMIT else None


def _handed_over(proto: onnx.ModelProto, options: ort.SessionOptions) -> tuple[bytes, list[ort.OrtValue]]:
    """(the model's bytes, []); or of a model too large for that (the bytes without its large initializers,
    their values), these values being put in `options`."""
    data = _serialized(proto)
    if data is not None:
        return data, []
    shell = onnx.ModelProto()
    _copy_fields(proto, shell, but="graph")
    _copy_fields(proto.graph, shell.graph, but="initializer")
    names: list[str] = []
    values: list[ort.OrtValue] = []
    for tensor in proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL or tensor.ByteSize() <= _KEPT_BYTES:
            shell.graph.initializer.append(tensor)
            continue
        stub = shell.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        stub.data_location = TensorProto.EXTERNAL
        stub.external_data.add(key="location", value="detached")
        names.append(tensor.name)
        array = np.asarray(numpy_helper.to_array(tensor), order="C")
        values.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type))
    data = _serialized(shell)
    if data is None:
        raise NotApplicableError(
            "even without its initializers the model is over 2 GiB, ONNX Runtime's limit"
        )
    options.add_external_initializers(names, values)
    return data, values


def _copy_fields(source: _Message, target: _Message, *, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        container = getattr(target, field.name)
        if hasattr(container, "MergeFrom"):
            container.MergeFrom(value)
        else:
            setattr(target, field.name, value)


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
        declared: Iterable[onnx.ValueInfoProto],
        device_id: int,
    ) -> None:
        self._session = session
        self._device_id = device_id
        fed = {arg.name for arg in session.get_inputs()}  # without the initializers that are listed as inputs
        self.inputs = [info_of(value) for value in declared if value.name in fed]
        self.output_names: list[str] = [arg.name for arg in session.get_outputs()]
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
        with _failing_clearly():
            return dict(zip(names, self._session.run(names, dict(feed)), strict=True))

    def bind(self, feed: Mapping[str, np.ndarray]) -> Bound:
        """Put `feed` where the model runs, for repeated runs without copies. Raises as `run` does."""
        check_feed(feed, self.inputs)
        return Bound(self._session, feed, self.output_names, self._device_id)


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
        device_id: int,
    ) -> None:
        device = "cuda" if session.get_providers()[0] in _GPU else "cpu"
        self._session = session
        self._outputs = outputs
        self._binding = session.io_binding()
        self._inputs: list[ort.OrtValue] = []  # on the CPU they are the caller's arrays, to be kept alive
        with _failing_clearly():
            for name, array in feed.items():
                value = ort.OrtValue.ortvalue_from_numpy(array, device, device_id)
                self._inputs.append(value)
                self._binding.bind_ortvalue_input(name, value)
            for name in outputs:
                self._binding.bind_output(name, device, device_id)

    def run(self) -> None:
        """Run once and wait for the outputs. Raises NotApplicableError where ONNX Runtime fails."""
        with _failing_clearly():
            self._session.run_with_iobinding(self._binding)

    def fetch(self) -> Feed:
        """The outputs of the last run by name, on the host."""
        return dict(zip(self._outputs, self._binding.copy_outputs_to_cpu(), strict=True))


def check_feed(feed: Mapping[str, np.ndarray], inputs: Sequence[TensorInfo]) -> None:
    """Raise InputError unless `feed` has exactly `inputs`, each of its type, rank and fixed sizes."""
    names = [info.name for info in inputs]
    if unknown := [name for name in feed if name not in names]:
        raise InputError(f"the model has no input '{unknown[0]}'; its inputs are {_listed(names)}")
    if missing := [name for name in names if name not in feed]:
        raise InputError(f"no array for input '{missing[0]}'; the model's inputs are {_listed(names)}")
    for info in inputs:
        array = feed[info.name]
        if not isinstance(array, np.ndarray):
            raise InputError(f"input '{info.name}' wants a NumPy array, got {type(array).__name__}")
        check_type(info, array.dtype, array.shape)


def check_type(info: TensorInfo, dtype: np.dtype, shape: Sequence[int]) -> None:
    """Raise InputError unless an array of this type and shape can be fed to `info`. Nothing is cast."""
    if info.dtype is None:
        raise InputError(f"input '{info.name}' is of a type that NumPy arrays cannot feed")
    is_text = info.dtype == object and dtype.kind in "US"
    if dtype != info.dtype and not is_text:
        advice = f"convert it with .astype('{info.dtype}')"
        raise InputError(f"input '{info.name}' wants {info.dtype}, got {dtype}; {advice}")
    if info.shape is None:
        return
    fits = len(shape) == len(info.shape) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(info.shape, shape, strict=True)
    )
    if not fits:
        wanted, got = format_shape(info.shape), format_shape(shape)
        raise InputError(f"input '{info.name}' wants shape {wanted}, got {got}")


def format_shape(shape: Sequence[int | str | None]) -> str:
    """A shape for people: `[batch, 3, ?, ?]`."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


@contextlib.contextmanager
def _failing_clearly() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ORT's exceptions share no base class
        raise NotApplicableError(f"the model fails in ONNX Runtime: {_one_line(error)}") from error


_NOISE = (
    (r"\[ONNXRuntimeError\] : \d+ : \w+ : ", ""),
    (r"\S+\.(?:h|cc|cpp|cuh?):\d+ .*?\)(?: const)? ", ""),  # a C++ source line and the function's signature
    (
        r"Non-zero status code returned while running (\w+) node\. Name:('[^']*') Status Message: ",
        r"\1 node \2: ",
    ),
    (r"(\w+) node '': ", r"a nameless \1 node: "),
    (r"\s+", " "),
)


def _one_line(error: Exception) -> str:
    """ONNX Runtime's message without its error codes and C++ locations."""
    text = str(error)
    for pattern, replacement in _NOISE:
        text = re.sub(pattern, replacement, text)
    return text.strip().rstrip(".")
