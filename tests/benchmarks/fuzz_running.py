"""One file of `bench_fuzz.py` through all steps."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import onnx
from forking import Began
from fuzz_making import made
from fuzz_seeds import DATA, DATA_FILE

import onnxfuse
from onnxfuse.cli.app import main as program
from onnxfuse.errors import OnnxfuseError

STEPS = ("inspect", "compress", "verify", "to_torch")
MODEL, RESULT = "model.onnx", "result.onnx"
_HERE = ("--provider", "cpu", "--threads", "1")


@dataclass
class Outcome:
    """What became of a file.

    Attributes:
        number: of the file.
        net: what it was made from.
        damages: by name.
        codes: exit codes by step.
        seconds, peak: processor seconds and bytes on top of the process, by step.
        broken: what no step may do; a line each, which begins with the step.
        said: what the broken steps printed.
    """

    number: int
    net: str
    damages: list[str]
    codes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @property
    def broken_steps(self) -> set[str]:
        return {line.split(":")[0] for line in self.broken}


# --- one file -----------------------------------------------------------------------------------------------


def run_one(seed: int, number: int, memory: int, began: Began) -> Outcome:
    """All steps on file `number`, in this process.

    Args:
        seed, number: tell the file.
        memory: bytes that a step may take on top of what the process has.
        began: hears of each step before it begins.
    """
    net, data, damages = made(seed, number)
    outcome = Outcome(number, net, damages)
    draw = Random(f"{seed}/{number}/commands")
    with tempfile.TemporaryDirectory() as name, _inside(name), _memory(memory):
        Path(MODEL).write_bytes(data)
        Path(DATA_FILE).write_bytes(DATA)
        for step in STEPS:
            if step == "to_torch" and outcome.codes["inspect"] != 0:
                continue
            began(step)
            if step == "to_torch":
                said = _measured(step, outcome, lambda: _imported(outcome))
            else:
                said = _measured(step, outcome, lambda step=step: _commanded(outcome, step, draw))
            _check_files(step, outcome, data)
            if step in outcome.broken_steps:
                outcome.said.append(said)
    return outcome


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _measured(step: str, outcome: Outcome, action: Callable[[], str]) -> str:
    base, start = _memory_used("VmRSS"), time.process_time()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    said = action()
    outcome.seconds[step] = time.process_time() - start
    outcome.peak[step] = max(_memory_used("VmHWM") - base, 0)
    return said


def _memory_used(key: str) -> int:
    """Bytes of this process by /proc: VmRSS, VmHWM (the peak), VmSize; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


@contextlib.contextmanager
def _memory(more: int) -> Iterator[None]:
    """No address space but that of now and so much more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if size := _memory_used("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _commanded(outcome: Outcome, step: str, draw: Random) -> str:
    """Run a command and check its code and what it prints, which is returned."""
    json_wanted = draw.random() < 0.3
    if step == "inspect":
        # Other criteria take 20 s on the largest network.
        alike = ("--similarity", "--criterion", "euclidean")
        more = draw.choice(((), (), (), (), ("--channels",), ("--grow",), alike))
        arguments = [step, MODEL, "--no-latency", *more]
    elif step == "compress":
        arguments = [step, MODEL, "--passes", "fold", "-o", RESULT, *(() if json_wanted else ("-q",))]
    else:
        arguments = [
            step,
            MODEL,
            RESULT if Path(RESULT).exists() else MODEL,
            *(() if json_wanted else ("-q",)),
        ]
    arguments += [*_HERE, *(("--json",) if json_wanted else ())]
    with _captured() as printed:
        try:
            code = program(arguments)
        except BaseException:
            traceback.print_exc()
            code = 70
    out, err, native = printed
    outcome.codes[step] = code
    said = f"$ onnxfuse {' '.join(arguments)}\n{out}{err}{native}"
    for problem in (
        _code_problem(code, out, err),
        _lines_problem(code, err) if code < 4 else "",
        "what C++ prints is on the screen" if native else "",
        _json_problem(out) if json_wanted else "",
        "the result of fold is not what it was made from" if code == 1 and arguments[2] == RESULT else "",
        "a file is not itself" if code == 1 and arguments[1] == arguments[2] else "",
    ):
        if problem:
            outcome.broken.append(f"{step}: {problem}")
    return said


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Keep what is printed; the list gets stdout, stderr and, in processes of our own, what C++ prints."""
    found: list[str] = []
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryFile() as spool, contextlib.ExitStack() as stack:
        for descriptor in (1, 2):
            saved = os.dup(descriptor)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, descriptor)
            os.dup2(spool.fileno(), descriptor)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield found
        spool.seek(0)
        found += [out.getvalue(), err.getvalue(), spool.read().decode(errors="replace")]


def _code_problem(code: int, out: str, err: str) -> str:
    if "Traceback" not in err and code in (0, 1, 2, 3):
        return ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        err = json.loads(out)["traceback"]
    return f"exit code {code}, {_culprit(err)}"


def _culprit(text: str) -> str:
    """The error of a traceback and the last place of ours in it."""
    lines = text.splitlines()
    places = [line.strip() for line in lines if line.lstrip().startswith("File ") and "onnxfuse" in line]
    errors = [line for line in lines if line and not line.startswith((" ", "Traceback", "onnxfuse: "))]
    place = places[-1].split("onnxfuse/")[-1].replace('"', "") if places else "?"
    return f"{errors[-1][:150] if errors else '?'} [{place}]"


def _lines_problem(code: int, err: str) -> str:
    lines = err.splitlines()
    if "Traceback" in err:
        return ""  # told already
    if other := [line for line in lines if not line.startswith("onnxfuse: ")]:
        return f"an odd line on stderr: {other[0][:80]!r}"
    errors = sum(line.startswith("onnxfuse: error: ") for line in lines)
    return (
        f"{errors} lines of error with exit code {code}" if errors != (code == 2) and code in (0, 2) else ""
    )


def _json_problem(out: str) -> str:
    try:
        json.loads(out, parse_constant=_refuse)
    except ValueError as error:
        return f"--json prints no JSON ({error})"
    return ""


def _refuse(text: str) -> None:
    """NaN and infinities, which Python would take."""
    raise ValueError(f"{text} is no JSON")


def _imported(outcome: Outcome) -> str:
    with _captured() as printed:
        try:
            onnxfuse.to_torch(MODEL)
            code = 0
        except OnnxfuseError as error:
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
            code = 70
    outcome.codes["to_torch"] = code
    if code == 70:
        outcome.broken.append(f"to_torch: {_culprit(printed[1])}")
    return "".join(printed)


def _check_files(step: str, outcome: Outcome, data: bytes) -> None:
    """Input untouched; the result there if, and only if, compress is done, and whole; nothing else left."""
    problems = []
    if Path(MODEL).read_bytes() != data or Path(DATA_FILE).read_bytes() != DATA:
        problems.append("the input is changed")
    left = {str(path) for path in Path().rglob("*")} - {MODEL, DATA_FILE}
    expected = {RESULT} if outcome.codes.get("compress") == 0 else set()
    if left - {f"{RESULT}.data"} != expected or (left and not expected):
        problems.append(f"files are left: {sorted(left)}, not {sorted(expected)}")
    if step == "compress" and expected and not problems:
        try:
            onnx.load(RESULT)
        except Exception as error:
            problems.append(f"the result can't be read: {type(error).__name__}: {error}")
    outcome.broken += [f"{step}: {problem}" for problem in problems]
