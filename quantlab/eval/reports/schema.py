"""The JSON Schema of report.json, as published in docs/report.schema.json.

Knows nothing about any particular report.
"""

import json

from quantlab.eval.result import Report

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> str:
    """The schema's text, draft 2020-12."""
    return json.dumps({"$schema": DIALECT, **Report.model_json_schema()}, indent=1) + "\n"
