"""JUnit XML: what a CI system reads of it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from onnxfuse.data.calibration import Samples
from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.report.junit import write_junit
from onnxfuse.results import VerifyResult
from onnxfuse.verification.promises import Promise
from onnxfuse.verification.records import Comparison


def result(*reasons: str | None) -> VerifyResult:
    promises = tuple(Promise(f"promise <{number}>", "", reason) for number, reason in enumerate(reasons))
    samples = Samples("some", False, 0, 10, None, 10**9, 10)
    return VerifyResult(promises, Comparison((), 8.0, 10, ()), None, None, None, None, samples, ())


def test_one_case_a_promise(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "junit.xml"
    write_junit(path, result(None, "output '\x1b[31m\0ä' & more", None))
    root = ET.parse(path).getroot()
    (suite,) = root
    counts = {"tests": "3", "failures": "1", "errors": "0", "skipped": "0"}
    assert {name: suite.attrib[name] for name in counts} == counts
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    assert [case.attrib["name"] for case in suite] == ["promise <0>", "promise <1>", "promise <2>"]
    assert [len(case) for case in suite] == [0, 1, 0]
    (failure,) = suite[1]
    assert (failure.tag, failure.attrib["message"]) == ("failure", r"output '\x1b[31m\x00ä' & more")
    assert failure.text == failure.attrib["message"]


def test_an_error_is_no_failure(tmp_path: Path) -> None:
    write_junit(tmp_path / "junit.xml", NotApplicableError("can't be run"))
    (suite,) = ET.parse(tmp_path / "junit.xml").getroot()
    assert (suite.attrib["errors"], suite.attrib["failures"]) == ("1", "0")
    error = suite.find("testcase/error")
    assert error is not None
    assert (error.attrib["type"], error.text) == ("NotApplicableError", "can't be run")


def test_a_place_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_junit(tmp_path / "file" / "junit.xml", result(None))
