"""Writing a page from records, and checks which every page passes."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from flopwise.report import write_report


def written(folder: Path, records: list[dict[str, Any]]) -> str:
    source, target = folder / "records.jsonl", folder / "site" / "index.html"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    write_report(source, target)
    return target.read_text(encoding="utf-8")


def headings(text: str, levels: str = "2") -> list[str]:
    return re.findall(rf"<h[{levels}]>(.*?)</h[{levels}]>", text)


class Balance(HTMLParser):
    """Raises on a tag which is closed in the wrong place, and collects what a page refers to."""

    VOID = ("meta", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            raise ValueError(f"</{tag}> at {self.getpos()} closes nothing")


def check(text: str) -> Balance:
    """Well-formed, and without a request to anywhere."""
    balance = Balance()
    balance.feed(text)
    balance.close()
    assert balance.open == [] and balance.seen.count("h1") == 1
    assert balance.seen.count("caption") == balance.seen.count("table")
    assert all(re.match("data:image/(png|jpeg);base64,|#s[0-9]+$", source) for source in balance.sources)
    assert all(f'id="{source[1:]}"' in text for source in balance.sources if source.startswith("#"))
    assert "http" not in text and "url(" not in text and "@import" not in text
    words = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"\b(nan|None|inf)\b", words)
    return balance
