"""A verdict as JUnit XML, one test case for each of the gate's lines.

A missed line is a `failure`. An undecided one is a `failure` too when the gate as a whole does not pass, else
`skipped`: so the file is green exactly when the exit code is 0. What kept a verdict from being reached is an `error`.
Knows nothing about files.
"""

import re
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from quantlab.errors import QuantlabError
from quantlab.eval.reports.tables import duration, provenance
from quantlab.eval.reports.words import one_line, verdict_sentence, verdict_word
from quantlab.eval.result import GateLine, GateResult, Report

SUITE = "quantlab eval"
ZONE = re.compile(r"(Z|[+-]\d\d:\d\d)$")


def junit(report: Report) -> bytes:
    """The XML of a finished evaluation."""
    cases = _cases(report.gate) if report.gate else [_unjudged()]
    suite = _suite(cases, duration(report))
    suite.set("timestamp", ZONE.sub("", one_line(report.created)))  # readers of JUnit know no time zones
    properties = Element("properties")
    for what, value in provenance(report).rows:
        SubElement(properties, "property", name=what, value=value)
    suite.insert(0, properties)
    SubElement(suite, "system-out").text = f"{verdict_word(report)}: {verdict_sentence(report)}"
    return _document(suite)


def environment_error(error: QuantlabError) -> bytes:
    """The XML of an evaluation that came to no verdict, and why."""
    case = Element("testcase", classname="quantlab.eval", name="evaluate", time="0")
    told = SubElement(case, "error", type=error.code, message=one_line(error.message, 1000))
    told.text = error.one_line()
    return _document(_suite([case], 0.0))


def _cases(gate: GateResult) -> list[Element]:
    return [_case(line, gate) for line in gate.lines] + [_left_out(metric) for metric in gate.left_out]


def _case(line: GateLine, gate: GateResult) -> Element:
    name = f"{one_line(line.metric)}: {one_line(line.requirement)}"
    case = Element("testcase", classname="quantlab.gate", name=name, time="0")
    reason = one_line(line.reason, 1000)
    if line.verdict == "fail" or (line.verdict == "inconclusive" and gate.verdict != "pass"):
        kind = "threshold" if line.verdict == "fail" else "inconclusive"
        SubElement(case, "failure", type=kind, message=reason).text = _details(line)
    elif line.verdict == "inconclusive":
        SubElement(case, "skipped", message=f"inconclusive: {reason}")
    else:
        SubElement(case, "system-out").text = reason
    return case


def _left_out(metric: str) -> Element:
    case = Element("testcase", classname="quantlab.gate", name=one_line(metric), time="0")
    SubElement(case, "skipped", message="an optional line, not measured")
    return case


def _details(line: GateLine) -> str:
    facts = [f"metric: {line.metric}", f"requirement: {line.requirement}", f"measured: {line.measured}"]
    facts += [] if line.p_value is None else [f"p: {line.p_value:.3g}"]
    return "\n".join(one_line(fact, 400) for fact in [*facts, f"verdict: {line.verdict}"])


def _unjudged() -> Element:
    return Element("testcase", classname="quantlab.eval", name="measured without a gate", time="0")


def _suite(cases: list[Element], seconds: float) -> Element:
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    suite = Element("testsuite", name=SUITE, time=f"{seconds:.3f}")
    for key, count in counts.items():
        suite.set(key, str(count))
    suite.extend(cases)
    return suite


def _document(suite: Element) -> bytes:
    root = Element("testsuites")
    for key in ("name", "tests", "failures", "errors", "time"):  # all that Jenkins' schema allows here
        root.set(key, suite.get(key, ""))
    root.append(suite)
    indent(root)
    return tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"
