"""Passages from folders of texts: where they are cut, what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Passage, read_corpus

SENTENCE = "The harp of Orvane has thirty strings and a silver frame."  # 11 words


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def passages(folder: Path) -> list[Passage]:
    return list(read_corpus([folder]))


def test_a_text_is_called_after_its_file_and_its_passages_are_numbered_by_path(tmp_path: Path) -> None:
    write(tmp_path, harps_txt="A harp.", notes__makers_md="# The makers\n\nOrvane makes harps.")
    assert passages(tmp_path) == [
        Passage("harps.txt#1", "harps", "A harp."),
        Passage("notes/makers.md#1", "The makers", "Orvane makes harps."),
    ]


def test_a_short_first_line_is_the_title_and_a_short_paragraph_goes_with_the_next(tmp_path: Path) -> None:
    long = " ".join([SENTENCE] * 9)
    write(
        tmp_path,
        a_txt=f"The Silver Harp (1904)\n\n{long}\n\nA note.\n\n{long}",
        b_txt="A short text.\n\nMore.",
    )
    assert [(p.title, p.text) for p in passages(tmp_path)] == [
        ("The Silver Harp (1904)", long),
        ("The Silver Harp (1904)", f"A note.\n{long}"),
        ("b", "A short text.\nMore."),
    ]


def test_files_without_words_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, a_txt="A.", b_txt=" \n", c_md="# Only a title")
    assert len(passages(tmp_path)) == 1
    assert "2 of 3 files have no words, or none but a title" in caplog.text


def test_files_that_are_no_texts_are_counted_by_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", "manual.pdf", "more/other.PDF", "page.html", ".hidden.pdf", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Words.")
    assert len(passages(tmp_path)) == 1
    assert "3 files that are not .txt or .md are left out (2 .pdf, 1 .html)" in caplog.text


def test_short_paragraphs_share_a_passage_and_borders_are_between_paragraphs(tmp_path: Path) -> None:
    paragraph = " ".join([SENTENCE] * 4)
    write(tmp_path, harps_txt=f"{paragraph}\n\n{paragraph}\n\n{paragraph}\n")
    assert [p.text for p in passages(tmp_path)] == [f"{paragraph}\n{paragraph}", paragraph]


def test_lines_of_one_paragraph_belong_together(tmp_path: Path) -> None:
    write(tmp_path, harps_txt="The harp\r\nof  Orvane.\r\n\r\nAnother.")
    assert [p.text for p in passages(tmp_path)] == ["The harp of Orvane.\nAnother."]


def test_a_long_paragraph_is_cut_at_the_ends_of_sentences(tmp_path: Path) -> None:
    write(tmp_path, harps_txt=" ".join([SENTENCE] * 25))
    found = [p.text for p in passages(tmp_path)]
    assert len(found) == 3 and all(text.endswith("frame.") for text in found)
    assert all(len(text.split()) <= 100 for text in found)
    assert " ".join(found) == " ".join([SENTENCE] * 25)


def test_a_sentence_without_end_and_a_script_without_spaces_are_cut_too(tmp_path: Path) -> None:
    write(tmp_path, a_txt="word " * 1000, b_txt="竪琴は銀でできている。" * 200, c_txt="x" * 5000)
    found = passages(tmp_path)
    assert max(len(p.text) for p in found) <= 810
    assert "".join(p.text for p in found if p.title == "b") == "竪琴は銀でできている。" * 200
    assert "".join(p.text for p in found if p.title == "c") == "x" * 5000


def test_a_heading_begins_a_passage(tmp_path: Path) -> None:
    write(
        tmp_path,
        harps_md="# Harps\nIntro.\n## Strings\n### Number\nThirty.\n\n## Frame ##\nSilver.\n\n#no heading",
    )
    assert [(p.title, p.text) for p in passages(tmp_path)] == [
        ("Harps", "Intro."),
        ("Harps", "Strings\nNumber\nThirty."),
        ("Harps", "Frame\nSilver.\n#no heading"),
    ]


def test_hidden_files_other_files_and_empty_ones_give_no_passages(tmp_path: Path) -> None:
    write(tmp_path, a_txt="A.", b_txt="\n \n", c_pdf="x")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "d.txt").write_text("hidden")
    assert [p.id for p in passages(tmp_path)] == ["a.txt#1"]


def test_a_folder_without_words_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a_txt=" ")
    with pytest.raises(RetrieverError, match="there are no words in its"):
        passages(tmp_path)


def test_a_text_that_is_not_utf8_is_refused_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(RetrieverError, match=r"a\.txt:2: not valid UTF-8"):
        passages(tmp_path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(words=st.lists(st.sampled_from(["harp", "of.", "\n", "\n\n", "Orvane!", "#", "x" * 40]), max_size=600))
def test_no_word_is_lost_or_comes_twice(tmp_path: Path, words: list[str]) -> None:
    write(tmp_path, a_txt="begin " + " ".join(words))
    found = passages(tmp_path)
    title = "" if found[0].title == "a" else found[0].title
    assert " ".join([title, *(p.text for p in found)]).split() == ["begin", *" ".join(words).split()]
