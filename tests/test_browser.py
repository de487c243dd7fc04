"""The browser fixture sees what it is there to see."""

from pathlib import Path

from tests.browser import PHONE, OpenPageFunction

PAGE = '<!doctype html><html lang="en"><title>t</title><body style="margin:0">'


def write_page(folder: Path, body: str) -> Path:
    path = folder / "page.html"
    path.write_text(PAGE + body)
    return path


def test_a_quiet_page_is_quiet(open_page: OpenPageFunction, tmp_path: Path) -> None:
    opened = open_page(write_page(tmp_path, "<h1>Hello</h1>"), width=PHONE)
    assert (opened.errors, opened.requests, opened.beyond()) == ([], [], [])
    assert opened.outline() == '- heading "Hello" [level=1]'


def test_errors_requests_and_wide_elements_are_seen(
    open_page: OpenPageFunction, tmp_path: Path
) -> None:
    body = """<img src="http://127.0.0.1:9/x.png"><script>throw new Error("boom")</script>
<div style="overflow-x:auto"><p style="width:900px">held</p></div>
<p id="out" style="width:900px">sticks out</p>"""
    opened = open_page(write_page(tmp_path, body), width=PHONE)
    assert any("boom" in error for error in opened.errors)
    assert opened.requests == ["http://127.0.0.1:9/x.png"]
    assert [text[:11] for text in opened.beyond()] == ['<p id="out"', "the page sc"]
