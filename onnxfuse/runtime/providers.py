"""Execution providers, sessions made with them, and the cores they may use.

A provider that the wheel was built with need not be one that this machine can load: only a probe tells
(see `session`). Options that every session has are set here, in one place.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from onnxfuse.runtime.onnx_runtime import SILENT, TALKING, captured_output, ort

CPU_PROVIDER = "CPUExecutionProvider"
GPU_PROVIDERS = {"CUDAExecutionProvider", "TensorrtExecutionProvider"}


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


def short_name(provider: str) -> str:
    """The provider as users write it: "cuda" for CUDAExecutionProvider."""
    return provider.removesuffix("ExecutionProvider").lower()


@functools.cache
def probe_provider(provider: str, device_id: int) -> tuple[str, str]:
    """The provider that a session really gets when it asks for `provider`, and why if it is another."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    failure = ""
    with captured_output() as text:
        ort.set_default_logger_severity(TALKING)  # what the provider logs is the reason
        try:
            session = make_session(model.SerializeToString(), session_options(), provider, device_id)
            session.run(None, {"x": np.ones(1, np.float32)})
            got = session.get_providers()[0]
        except Exception as error:  # each provider fails in its own way, and any failure means "not here"
            got, failure = CPU_PROVIDER, str(error)
        finally:
            ort.set_default_logger_severity(SILENT)
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


def session_options() -> ort.SessionOptions:
    """The options of every session: silent, one operator at a time, no thread that spins while it is idle."""
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    # Idle threads that spin take the cores that NumPy needs between two runs: ResNet-32 with a matrix product
    # after each batch of 64 takes 1.4 times as long on 2 busy cores. Batches of one are no slower without.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def make_session(
    model: bytes, options: ort.SessionOptions, provider: str, device_id: int
) -> ort.InferenceSession:
    """A session with a provider, and the CPU behind it for operators that the provider lacks.

    Args:
        model: the bytes of a model.
        options: as `session_options` makes them.
        provider: its full name.
        device_id: which GPU.

    Raises:
        Exception: whatever ONNX Runtime raises.
    """
    device: dict[str, str] = {"device_id": str(device_id)} if provider in GPU_PROVIDERS else {}
    if provider == "CUDAExecutionProvider":
        # TensorFloat-32 keeps 10 bits of mantissa and is on by default: it would drown what a pass changed.
        device["use_tf32"] = "0"
    chain: list[Any] = [(provider, device)]
    if provider == "TensorrtExecutionProvider":
        chain.append(("CUDAExecutionProvider", {"device_id": str(device_id), "use_tf32": "0"}))
    if provider != CPU_PROVIDER:
        chain.append((CPU_PROVIDER, {}))
    session = ort.InferenceSession(model, options, providers=chain, enable_fallback=0)
    # The model's bytes are kept for a session made anew when a provider fails, which no fallback allows here.
    session._model_bytes = None
    return session
