"""Data sets from every layout into our files, cut off and gone on with, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.data.fetch import fetching
from pipeline.core.data.fetch.fetching import fetch
from pipeline.core.data.questions import read_questions
from pipeline.core.errors import UserError
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import read_corpus
from tests.pipeline.core.data.fetch import layouts


def fetched(tmp_path: Path, name: str, lay_out: Callable[[Path], None]) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    lay_out(copy)
    fetch(name, tmp_path / "out", str(copy))
    return tmp_path / "out"


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("lay_out", layouts.HOTPOT_LAYOUTS.values(), ids=layouts.HOTPOT_LAYOUTS)
def test_hotpotqa_is_the_same_from_every_layout(tmp_path: Path, lay_out: Callable[[Path], None]) -> None:
    out = fetched(tmp_path, "hotpotqa", lay_out)
    assert names_in(out) == {"train.jsonl", "dev.jsonl", "corpus.jsonl", "manifest.json", ".lock"}
    passages = {passage.title: passage for passage in read_corpus([out / "corpus.jsonl"])}
    assert list(passages) == ["Trel", "Harp 1", "Maker 1", "Harp 2", "Maker 2", "Harp 3", "Maker 3"]
    assert passages["Trel"].text == "Trel is a town. It has harps."
    train, (dev,) = (read_questions([out / f"{s}.jsonl"], with_evidence=True) for s in ("train", "dev"))
    assert [q.id for q in train] == ["5a1", "5a2"]
    assert (dev.text, dev.answers, dev.type) == ("Who founded the maker of harp 3?", ("Ada 3",), "bridge")
    assert dev.supporting_ids == (passages["Harp 3"].id, passages["Maker 3"].id)
    assert dev.evidence is not None
    assert dev.evidence.supporting_facts == (("Harp 3", 1), ("Maker 3", 0))
    assert dev.evidence.supporting_paragraphs == (1, 2)
    assert [p.id for p in dev.evidence.context] == [passages[t].id for t in ("Trel", "Harp 3", "Maker 3")]
    assert dev.evidence.context[1].sentences == ("A harp.", " Maker 3 made harp 3.")


def test_the_manifest_has_source_licence_counts_checksums_and_coverage(tmp_path: Path) -> None:
    out = fetched(tmp_path, "hotpotqa", layouts.hotpot_originals)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["licence"] == "CC BY-SA 4.0"
    assert manifest["settings"]["from"]["folder"] == str(tmp_path / "copy")
    assert manifest["splits"]["train"] == {"questions": 2, "paragraphs": 6, "skipped": {}}
    assert manifest["passages"] == 7
    assert manifest["check"]["coverage"]["dev"]["percent"] == 100.0
    assert manifest["files"].keys() == {"train.jsonl", "dev.jsonl", "corpus.jsonl"}


def test_musique_keeps_aliases_and_its_steps_name_their_passages(tmp_path: Path) -> None:
    out = fetched(tmp_path, "musique", layouts.musique_originals)
    (dev,) = read_questions([out / "dev.jsonl"])
    title_of = {passage.id: passage.title for passage in read_corpus([out / "corpus.jsonl"])}
    assert dev.answers == ("Ada 3", "A. 3")
    assert (dev.type, dev.hops) == ("2hop", 2)
    assert [title_of[hop.supporting_id] for hop in dev.decomposition] == ["T3-0", "T3-2"]
    assert [title_of[id_] for id_ in dev.supporting_ids] == ["T3-0", "T3-2"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["splits"]["train"]["skipped"] == {"marked as not answerable": 1}


def test_2wiki_has_other_names_of_answers_and_entities(tmp_path: Path) -> None:
    out = fetched(tmp_path, "2wikimultihopqa", layouts.two_wiki_originals)
    (dev,) = read_questions([out / "dev.jsonl"], with_evidence=True)
    assert dev.answers == ("George", "Lord George")
    assert dev.evidence is not None
    assert dev.evidence.aliases == {"Ada": ("A. L.",), "George": ("Lord George",)}
    assert dev.evidence.triples[1] == ("Ada", "father", "George")
    assert dev.evidence.context[0].text == "Orvane was founded by Ada. It is a maker."
    assert not (out / "test.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "lay_out", "expected"),
    [
        ("nq", layouts.nq_hub, {"train": ("Ada", "A. L."), "dev": ("Ada", "A. L.")}),
        ("nq", layouts.nq_flashrag, {"train": ("Ada",), "dev": ("Ada",), "test": ("Ada",)}),
        ("triviaqa", layouts.trivia_originals, {"train": ("Ada", "A. L."), "dev": ("Ada", "A. L.")}),
        ("triviaqa", layouts.trivia_hub, {"train": ("Ada", "A. L.")}),
        ("popqa", layouts.popqa_hub, {"test": ("poet", "bard")}),
        ("bamboogle", layouts.bamboogle_originals, {"test": ("Ada",)}),
    ],
)
def test_sets_without_passages_are_questions_alone(
    tmp_path: Path, name: str, lay_out: Callable[[Path], None], expected: dict[str, tuple[str, ...]]
) -> None:
    out = fetched(tmp_path, name, lay_out)
    assert names_in(out) == {f"{split}.jsonl" for split in expected} | {"manifest.json", ".lock"}
    for split, answers in expected.items():
        (question,) = read_questions([out / f"{split}.jsonl"])
        assert question.answers == answers
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["passages"], manifest["note"][:19]) == (0, "The questions alone")


def test_popqa_has_its_relation_for_a_type(tmp_path: Path) -> None:
    out = fetched(tmp_path, "popqa", layouts.popqa_hub)
    assert read_questions([out / "test.jsonl"])[0].type == "occupation"


def test_records_that_are_no_question_of_their_own_are_counted(tmp_path: Path) -> None:
    out = fetched(tmp_path, "nq", layouts.nq_hub)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["splits"]["dev"] == {
        "questions": 1,
        "paragraphs": 0,
        "skipped": {"the same id as one before": 1},
    }


class Killed(BaseException):
    """Ends a fetch where it stands, as a signal does."""


def test_a_fetch_that_was_killed_goes_on_behind_its_whole_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fetched(tmp_path, "hotpotqa", layouts.hotpot_originals)
    out, convert = tmp_path / "killed", fetching.convert

    def killed_in_dev(record: Any, place: str, split: Any, names: Any) -> Any:
        if split == "dev":
            raise Killed
        return convert(record, place, split, names)

    monkeypatch.setattr(fetching, "convert", killed_in_dev)
    with pytest.raises(Killed):
        fetch("hotpotqa", out, str(tmp_path / "copy"))
    assert not (out / "manifest.json").exists()
    (out / ".dev.jsonl.1.tmp").write_text("half a l")
    converted: list[str] = []

    def counted(record: Any, place: str, split: Any, names: Any) -> Any:
        converted.append(split)
        return convert(record, place, split, names)

    monkeypatch.setattr(fetching, "convert", counted)
    fetch("hotpotqa", out, str(tmp_path / "copy"))
    assert converted == ["dev"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def test_a_finished_fetch_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = fetched(tmp_path, "hotpotqa", layouts.hotpot_originals)
    monkeypatch.setattr(fetching, "convert", None)
    assert fetch("hotpotqa", out, str(tmp_path / "copy")) == json.loads((out / "manifest.json").read_text())


def test_a_file_that_was_changed_since_is_refused(tmp_path: Path) -> None:
    out = fetched(tmp_path, "hotpotqa", layouts.hotpot_originals)
    text = (out / "dev.jsonl").read_text()
    (out / "dev.jsonl").write_text(text.replace("Ada", "Eve"))
    with pytest.raises(RetrieverError, match=r"dev\.jsonl was changed since it was written"):
        fetch("hotpotqa", out, str(tmp_path / "copy"))


def test_another_source_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    out = fetched(tmp_path, "hotpotqa", layouts.hotpot_originals)
    other = tmp_path / "other"
    other.mkdir()
    layouts.hotpot_flashrag(other)
    with pytest.raises(UserError, match="was fetched from something else"):
        fetch("hotpotqa", out, str(other))
    with pytest.raises(UserError, match="was fetched from something else"):
        fetch("hotpotqa", out, None)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    layouts.hotpot_originals(tmp_path)
    with pytest.raises(UserError, match="holds something else; name a new or an empty folder"):
        fetch("hotpotqa", tmp_path, str(tmp_path))


def test_several_copies_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        layouts.trivia_originals(tmp_path / name)
    with pytest.raises(UserError, match="holds several copies of triviaqa's train"):
        fetch("triviaqa", tmp_path / "out", str(tmp_path))


def test_a_copy_that_names_passages_of_its_own_keeps_their_ids(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    row = {
        "id": "1",
        "question": "Who?",
        "answers": ["Ada"],
        "supporting_ids": ["p1"],
        "context_ids": ["p0", "p1"],
    }
    layouts.write_lines(tmp_path / "copy" / "dev.jsonl", [row])
    fetch("musique", tmp_path / "out", str(tmp_path / "copy"))
    assert rows(tmp_path / "out" / "dev.jsonl") == [row]


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("squad", None, "there is no data set squad to fetch; there are hotpotqa, 2wikimultihopqa"),
        ("musique", "copy", r"holds no copy of musique .*musique_ans_v\*_train.*there are hotpot_dev"),
        ("musique", "nowhere", "which is no folder"),
    ],
)
def test_nothing_to_fetch_is_refused_with_what_was_looked_for(
    tmp_path: Path, name: str, source: str | None, message: str
) -> None:
    (tmp_path / "copy").mkdir()
    layouts.hotpot_originals(tmp_path / "copy")
    with pytest.raises(UserError, match=message):
        fetch(name, tmp_path / "out", str(tmp_path / source) if source else None)
    assert not (tmp_path / "out").exists()


def test_a_record_that_is_no_question_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    layouts.write_lines(tmp_path / "copy" / "train.jsonl", [{"id": "1", "question": "", "answer": "Ada"}])
    with pytest.raises(UserError, match=r"train\.jsonl:1: question must be a string"):
        fetch("nq", tmp_path / "out", str(tmp_path / "copy"))


def test_a_hub_that_does_not_answer_is_one_error_with_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"hf:hotpotqa/hotpot_qa:distractor:train: cannot be opened: Couldn't.*--from FOLDER"
    ):
        fetch("hotpotqa", tmp_path / "out", None)


def test_the_hub_is_asked_for_repository_configuration_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[Any] = []

    def answer(name: str, config: str | None, *, split: str, streaming: bool) -> list[Any]:
        asked.append((name, config, split))
        return [{"id": f"{split}_0", "question": f"Who in {split}?", "golden_answers": ["Ada"]}]

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["test", "dev"])
    fetch("nq", tmp_path / "out", None)
    fetch("popqa", tmp_path / "other", "hf:some/copy:popqa")
    assert asked == [
        ("google-research-datasets/nq_open", None, "train"),
        ("google-research-datasets/nq_open", None, "validation"),
        ("some/copy", "popqa", "dev"),
        ("some/copy", "popqa", "test"),
    ]
