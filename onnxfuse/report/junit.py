"""`verify --junit FILE`: the promises as test cases, in the XML that CI systems read.

The elements are those that Jenkins and the others agree on: `testsuites`, `testsuite` with its counts,
    `testcase`,
and in it `failure` (a broken promise) or `error` (a comparison that could not be made).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from onnxfuse.errors import InputError, OnnxfuseError
from onnxfuse.report.files import write_whole
from onnxfuse.results import VerifyResult
from onnxfuse.wording import printable

_SUITE = "onnxfuse verify"


def write_junit(path: Path, outcome: VerifyResult | OnnxfuseError) -> None:
    """Write what became of a verification; the file appears whole or not at all.

    Args:
        path: of the file; its folder is made where it is missing.
        outcome: the result, or the error that stood in its way.

    Raises:
        InputError: it can't be written.
    """
    suite = ET.Element("testsuite", name=_SUITE)
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if isinstance(outcome, VerifyResult):
        for promise in outcome.promises:
            _add_case(suite, promise.name, "failure", promise.reason, "broken promise")
            counts["tests"] += 1
            counts["failures"] += not promise.passed
    else:
        _add_case(suite, "comparison", "error", str(outcome), type(outcome).__name__)
        counts["tests"] = counts["errors"] = 1
    root = ET.Element("testsuites", name=_SUITE)
    for element in (suite, root):
        element.attrib.update({name: str(count) for name, count in counts.items()})
    root.append(suite)
    ET.indent(root)
    content = ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write '{path}': {reason}") from error


def _add_case(suite: ET.Element, name: str, element: str, reason: str | None, kind: str) -> None:
    case = ET.SubElement(suite, "testcase", classname="onnxfuse.verify", name=printable(name))
    if reason is not None:
        said = printable(reason)
        ET.SubElement(case, element, message=said, type=kind).text = said
