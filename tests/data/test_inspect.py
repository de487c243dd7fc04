"""The page of task=inspect in a browser, with text that looks like HTML."""

from pathlib import Path

import pytest

from llama_pretrain.data.inspect import (
    Inspection,
    ShownSequence,
    SourceFacts,
    Token,
    render_inspection,
)
from llama_pretrain.data.meta import HELDOUT, TRAIN, Split, TokensMeta
from tests.browser import DESK, PHONE, OpenPageFunction
from tests.machines import plan_for_cluster

META = TokensMeta(
    format=3, data_hash="a", tokenizer_hash="b", vocab_size=9, eos_id=0, dtype="uint16", files=[],
    sequence_tokens=None,
    splits={
        TRAIN: Split(extents=[], tokens=1000, documents=10, bytes=4000),
        HELDOUT: Split(extents=[], tokens=100, documents=None, bytes=None),
    },
    notes={"blank_documents": 2, "cut_documents": 0},
)  # fmt: skip
NAME = "<b>web</b>"
TOKENS = [
    Token(text="<script>alert(1)</script>", ends_document=False, has_target=True),
    Token(text="</s>\n", ends_document=True, has_target=False),
    Token(text="x" * 300, ends_document=False, has_target=True),
]
FACTS = SourceFacts(
    name=NAME, meta=META, share=0.25, documents_per_sequence=1.5, targets=0.5,
    lengths=[(2**exponent, exponent) for exponent in range(12)],
)  # fmt: skip
SHOWN = ShownSequence(source=NAME, number=7, documents=2, targets=2, tokens=TOKENS)
INSPECTION = Inspection(sequences=[SHOWN], sources=[FACTS], tokenizer="c" * 64)


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page(open_page: OpenPageFunction, tmp_path: Path, width: int) -> None:
    page = tmp_path / "data.html"
    page.write_text(render_inspection(plan_for_cluster(), INSPECTION))
    opened = open_page(page, width=width)
    assert (opened.errors, opened.requests, opened.beyond()) == ([], [], [])
    outline = opened.outline()
    assert f'- heading "{NAME}, sequence 7" [level=3]' in outline
    assert f'- img "{NAME} (documents) against tokens, up to"' in outline
    cells = opened.page.locator("tbody td").all_inner_texts()
    assert cells == ["25.0%", "10", "1,000", "100", "4.00", "1.5", "50.0%", "2 blank documents"]
    text = opened.page.locator("pre").inner_text()
    assert text == "".join(token.text for token in TOKENS)
    assert opened.page.locator("pre .eos").inner_text() == "</s>\n"
    heights = opened.page.locator("rect").evaluate_all("r => r.map(x => +x.getAttribute('height'))")
    assert len(heights) == 12
    assert heights == sorted(heights)
