"""What words of texts in many scripts are."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever_service.errors import RetrieverError
from retriever_service.index.bm25 import ABOUT_FILE, Bm25, build_bm25
from retriever_service.index.words import Analyser
from retriever_service.passages.corpus import Passage

MARKED = {
    "hindi": ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
    "tamil": ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
    "yoruba, an accent that no single character has": ("ẹ́kọ́ ilé", ["ẹ́kọ́", "ilé"]),
    "a number in a box of an emoji": ("1\ufe0f\u20e3 lion", ["1", "lion"]),
}
UNMARKED = {
    "arabic vowels": ("كِتَابٌ", "كتاب"),
    "arabic tatweel": ("كتـــاب", "كتاب"),
    "hebrew vowels": ("שָׁלוֹם", "שלום"),
    "persian joiner": ("می\u200cخواهم", "میخواهم"),  # noqa: RUF001
    "soft hyphen": ("laby\u00adrinth", "labyrinth"),
}
BIGRAMS = {
    "chinese": ("东京大学", ["东京", "京大", "大学"]),
    "chinese beyond 16 bits": ("𠮷野家", ["𠮷野", "野家"]),
    "chinese numbers": ("二〇二四", ["二〇", "〇二", "二四"]),
    "japanese": ("京のラーメン", ["京の", "のラ", "ラー", "ーメ", "メン"]),
    "half-width japanese": ("ｶﾞｷﾞｸﾞ", ["ガギ", "ギグ"]),
    "thai with tone marks": ("ที่นี่ดี", ["ที่นี่", "นี่ดี"]),
    "lao": ("ວຽງຈັນ", ["ວຽ", "ຽງ", "ງຈັ", "ຈັນ"]),
    "khmer": ("ភាសាខ្មែរ", ["ភាសា", "សាខ្", "ខ្មែ", "មែរ"]),
    "burmese": ("မြန်မာ", ["မြန်", "န်မာ"]),
    "thai words set apart by a zero-width space": ("ไทย\u200bดี", ["ไท", "ทย", "ดี"]),
    "a character that stands alone": ("猫 。", ["猫"]),
    "latin and chinese": ("GPU版本3.0版", ["gpu", "版本", "3", "0", "版"]),
    "chinese and korean": ("大韓民國은", ["大韓", "韓民", "民國", "은"]),
}


def in_composed_form(words: list[str]) -> list[str]:
    return [unicodedata.normalize("NFKC", word) for word in words]


@pytest.mark.parametrize(("text", "words"), MARKED.values(), ids=MARKED)
def test_combining_marks_belong_to_their_word(text: str, words: list[str]) -> None:
    for form in ("NFC", "NFD"):
        assert Analyser()(unicodedata.normalize(form, text)) == in_composed_form(words)


@pytest.mark.parametrize(("marked", "plain"), UNMARKED.values(), ids=UNMARKED)
def test_marks_that_ordinary_writing_leaves_out_make_no_other_word(marked: str, plain: str) -> None:
    assert Analyser()(marked) == Analyser()(plain)
    assert len(Analyser()(marked)) == 1


@pytest.mark.parametrize(("text", "words"), BIGRAMS.values(), ids=BIGRAMS)
def test_scripts_without_spaces_give_every_two_neighbouring_characters(text: str, words: list[str]) -> None:
    assert Analyser()(text) == in_composed_form(words)


def test_english_words_are_stemmed_and_stop_words_left_out() -> None:
    assert Analyser()("The snake_case: 3.5 LIONS, sleeping") == [
        "snake_cas",
        "3",
        "5",
        "lion",
        "sleep",
    ]


def test_korean_words_are_those_between_spaces() -> None:
    assert Analyser()("한국어 문장은") == ["한국어", "문장은"]


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_text_are_its_runs_of_letters_digits_and_underscores(text: str) -> None:
    analyse = Analyser()
    assert analyse(text) == analyse(" ".join(re.findall(r"\w+", text, re.ASCII)))
    assert len(analyse(text)) <= len(re.findall(r"\w+", text, re.ASCII))


@given(st.text())
def test_words_do_not_depend_on_the_form_of_composition(text: str) -> None:
    assert Analyser()(unicodedata.normalize("NFD", text)) == Analyser()(text)


@pytest.mark.parametrize(
    ("passage", "query"),
    [
        ("हिन्दी भारत की भाषा है", "भाषा"),
        ("ภาษาไทยเป็นภาษาราชการ", "ราชการ"),
        ("东京大学位于日本东京都文京区", "日本"),
        ("이 문장은 한국어 문장이다", "한국어"),
    ],
)
def test_passage_is_found_by_a_word_in_it(tmp_path: Path, passage: str, query: str) -> None:
    build_bm25([Passage("1", "", "lion"), Passage("2", "", passage)], tmp_path / "b")
    assert Bm25.open(tmp_path / "b").search([query], 2, None).rows.tolist() == [[1, -1]]


def test_word_index_of_the_earlier_analysis_is_refused(tmp_path: Path) -> None:
    build_bm25([Passage("1", "", "lion")], tmp_path / "b")
    about = tmp_path / "b" / ABOUT_FILE
    earlier = {"version": 1, "k1": 0.9, "b": 0.4, "stemmer": "porter", "stop_words": "lucene"}
    about.write_text(json.dumps(earlier))
    with pytest.raises(RetrieverError, match=r"words.*build the index again"):
        Bm25.open(tmp_path / "b")
