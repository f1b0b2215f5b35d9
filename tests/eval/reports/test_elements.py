"""HTML from plain values: escaped unless it is markup already."""

from quantlab.eval.reports.elements import Markup, element, join


def test_text_and_attributes_are_escaped_and_markup_is_not() -> None:
    made = element("p", {"title": "\"'<&>"}, "a < b & c", element("b", None, "<i>"))
    assert made == '<p title="&quot;&#x27;&lt;&amp;&gt;">a &lt; b &amp; c<b>&lt;i&gt;</b></p>'


def test_a_string_made_from_markup_is_text_again() -> None:
    made = element("b", None, "x")
    assert not isinstance(made + "y", Markup) and not isinstance(made.replace("x", "y"), Markup)
    assert join(made + "<i>") == "&lt;b&gt;x&lt;/b&gt;&lt;i&gt;"


def test_attributes_may_be_absent_bare_and_numbers() -> None:
    assert element("line", {"x1": 1.25001, "y1": 2.0, "class": None, "a": False, "b": True, "n": 3}) == (
        '<line x1="1.25" y1="2" b n="3"/>'
    )
