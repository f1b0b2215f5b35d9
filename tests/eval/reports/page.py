"""A page taken apart by the standard library's parser: its elements with their attributes, and its text."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "hr"}
Attributes = dict[str, str | None]


@dataclass
class Element:
    """One element: its tag, attributes, the tags it stands in, and the text directly in it."""

    tag: str
    attributes: Attributes
    above: tuple[str, ...]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """The elements of a page in order; an end that fits no beginning is an error."""

    source: str
    elements: list[Element] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[Element] = []
        self.feed(self.source)
        self.close()
        assert not self.open, [each.tag for each in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append(Element(tag, dict(attrs), tuple(each.tag for each in self.open)))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1].tag == tag, (tag, [each.tag for each in self.open])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1].text += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def all(self, tag: str, kind: str | None = None) -> list[Element]:
        """Elements of a tag, and of a class if given."""
        found = [each for each in self.elements if each.tag == tag]
        return [each for each in found if kind is None or kind in (each.attributes.get("class") or "").split()]
