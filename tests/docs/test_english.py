"""The pages keep to plain technical English: short sentences, and one word for one thing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from support.pages import ROOT, pages

PAGES = [*pages(), ROOT / "CHANGELOG.md", *sorted(ROOT.glob("examples/*/README.md"))]
IDS = [str(path.relative_to(ROOT)) for path in PAGES]
MOST_WORDS = 25

#: Words that the pages avoid, with the ones that they use instead.
AVOIDED = {
    r"ha(s|ve|d) not|hasn't": "not found in",
    r"(is|are|was) none": "not found, no ...",
    r"nobody|nobody's": "no user, no installed distribution",
    r"said by|as .{1,20} says?": "declared by, recorded in",
    r"told": "reported, declared, passed",
    r"meant": "selected, intended",
    r"who (names|gives|asks|keeps|says)": "without ..., with ...",
    r"strangers?": "third-party, untrusted",
    r"offer(s|ed|ing)?": "entry point, has, supports",
    r"audit(s|ed)?|survey(s|ed)?|integrity|usable": "verify, verified",
    r"vouch(es)?": "verify, record",
    r"mend(s|ed)?": "fix",
    r"in the midst": "during",
}
_SENTENCE = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(A-Z0-9])")


def texts(source: str) -> Iterator[tuple[int, bool, str]]:
    """Line, whether it is in a table, and text of each paragraph, heading, list item and cell; code is one word."""
    in_table, line = False, 0
    for token in MarkdownIt("commonmark").enable("table").parse(source):
        in_table = {"table_open": True, "table_close": False}.get(token.type, in_table)
        line = token.map[0] + 1 if token.map else line
        if token.type == "inline":
            yield line, in_table, "".join(_words(token.children or []))


def _words(children: list[Token]) -> Iterator[str]:
    for number, child in enumerate(children):
        if child.type == "text":
            yield child.content
        elif child.type == "code_inline":
            yield "Code"
        elif child.type in ("softbreak", "hardbreak"):
            yield " "
        elif child.type == "link_open" and children[number + 1].type == "link_close":
            yield "Page"  # Sphinx fills in the title


def sentences(text: str) -> list[str]:
    """A sentence ends where a capital letter, a digit, code or a link follows its mark."""
    return [part for part in _SENTENCE.split(text) if part.strip()]


def word_count(sentence: str) -> int:
    """What holds a letter or a digit; a dash between spaces is no word."""
    return sum(1 for word in sentence.split() if re.search(r"\w", word))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_sentences_are_short(page: Path) -> None:
    """No sentence outside code and tables has more than 25 words."""
    found = [
        f"{page.name}:{line}: {word_count(sentence)} words: {sentence}"
        for line, in_table, text in texts(page.read_text())
        if not in_table
        for sentence in sentences(text)
        if word_count(sentence) > MOST_WORDS
    ]
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_avoided_words_do_not_occur(page: Path) -> None:
    """Neither in text nor in tables; the rows of the reference are docstrings and do not belong to the page."""
    found = [
        f"{page.name}:{line}: {match[0]!r}; write: {instead}"
        for line, in_table, text in texts(page.read_text())
        if not (in_table and page.name == "reference.md")
        for words, instead in AVOIDED.items()
        for match in re.finditer(rf"\b({words})\b", text, re.IGNORECASE)
    ]
    assert found == []


def test_markdown_is_read_as_text() -> None:
    """Code, links and emphasis do not hide words, and code blocks, comments and pictures have none."""
    source = (
        "# A title\n\nOne *two* `a b. C d` [four\nfive](x.md). Six.\n\n<!-- no. -->\n![alt](p.png)\n\n"
        "```text\nnot read. Never\n```\n\n- seven [](y.md)\n- eight\n\n| nine |\n|---|\n| ten |\n"
    )
    assert list(texts(source)) == [
        (1, False, "A title"),
        (3, False, "One two Code four five. Six."),
        (7, False, ""),
        (13, False, "seven Page"),
        (14, False, "eight"),
        (16, True, "nine"),
        (18, True, "ten"),
    ]
    parts = ["One 1.5 Code e.g. two.", "Code three?", "Four: five.", '"Six"']
    assert sentences(" ".join(parts)) == parts
    assert word_count("one - two, 3 ‖ four") == 4
