"""Question files: every dialect that is read, and every mistake that is refused."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.data.decompositions import relation_query
from pipeline.core.data.questions import check_splits_disjoint, read_questions
from pipeline.core.errors import UserError
from pipeline.core.records import Hop, Question

ROW = {"id": "1", "question": "Who founded Orvane?", "answers": ["Mara Velin"]}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read_one(tmp_path: Path, **fields: Any) -> Question:
    (question,) = read_questions([write(tmp_path / "q.jsonl", {**ROW, **fields})])
    return question


def test_the_least_that_a_question_needs(tmp_path: Path) -> None:
    assert read_one(tmp_path) == Question(id="1", text="Who founded Orvane?", answers=("Mara Velin",))


@pytest.mark.parametrize(
    "fields",
    [{"answer": "Ada"}, {"answers": ["Ada"]}, {"golden_answers": ["Ada", "Ada "]}, {"answers": "Ada"}],
)
def test_answers_come_under_the_usual_names(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = write(tmp_path / "q.jsonl", {"id": 7, "question": "Who?", **fields})
    assert read_questions([path]) == [Question(id="7", text="Who?", answers=("Ada",))]


def test_the_aliases_of_musique_are_accepted_answers_behind_the_canonical_one(tmp_path: Path) -> None:
    question = read_one(tmp_path, answers=None, answer="US", answer_aliases=["United States", "US"])
    assert question.answers == ("US", "United States")


def test_musique_in_its_original_form_names_hops_type_and_decomposition(tmp_path: Path) -> None:
    row = {
        "id": "2hop__482757_12019",
        "paragraphs": [
            {"idx": 0, "title": "T", "paragraph_text": "x", "is_supporting": True},
        ],
        "question": "When was the maker of the Silver Harp founded?",
        "question_decomposition": [
            {"id": 1, "question": "Silver Harp >> maker", "answer": "Orvane", "paragraph_support_idx": 0},
            {"id": 2, "question": "When was #1 founded?", "answer": "1984", "paragraph_support_idx": None},
        ],
        "answer": "1984",
        "answer_aliases": [],
        "answerable": True,
    }
    (question,) = read_questions([write(tmp_path / "q.jsonl", row)])
    assert (question.type, question.hops, question.answers) == ("2hop", 2, ("1984",))
    assert [hop.question for hop in question.decomposition] == [
        "maker of Silver Harp",
        "When was Orvane founded?",
    ]


TRIVIA = {"value": "Sunset Blvd", "aliases": ["Sunset Strip", "Sunset Blvd"], "normalized_aliases": ["x"]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"question_id": "tc_1", "question": "Who?", "answer": TRIVIA | {"type": "WikipediaEntity"}},
            Question("tc_1", "Who?", ("Sunset Blvd", "Sunset Strip")),
        ),
        (
            {"QuestionId": "tc_1", "Question": "Who?", "Answer": {"Value": "Ada", "Aliases": ["A. L."]}},
            Question("tc_1", "Who?", ("Ada", "A. L.")),
        ),
        (
            {
                "id": "k",
                "input": "Who?",
                "output": [
                    {"answer": "Ada", "provenance": [{"wikipedia_id": "7"}]},
                    {"provenance": [{"wikipedia_id": "8"}]},
                    {"answer": "A. L."},
                ],
            },
            Question("k", "Who?", ("Ada", "A. L.")),
        ),
        (
            {
                "id": "train_0",
                "question": "Who?",
                "golden_answers": ["Ada", "A. L."],
                "metadata": {"type": "bridge", "supporting_facts": {"title": ["T"], "sent_id": [0]}},
            },
            Question("train_0", "Who?", ("Ada", "A. L."), "bridge"),
        ),
        (
            {
                "_id": "h",
                "question": "Who?",
                "answer": "Ada",
                "type": "bridge",
                "level": "hard",
                "supporting_facts": [["T", 0]],
                "context": [["T", ["x"]]],
            },
            Question("h", "Who?", ("Ada",), "bridge"),
        ),
        (
            {"id": 4222362, "question": "Who?", "possible_answers": '["Ada", "A. L."]', "obj": "Ada"},
            Question("4222362", "Who?", ("Ada", "A. L.")),
        ),
    ],
    ids=["TriviaQA", "TriviaQA's own file", "KILT", "FlashRAG", "HotpotQA", "PopQA"],
)
def test_rows_of_the_usual_sets_are_read_with_the_canonical_answer_first(
    tmp_path: Path, row: dict[str, Any], expected: Question
) -> None:
    assert read_questions([write(tmp_path / "q.jsonl", row)]) == [expected]


def test_tables_are_read_with_lists_in_their_cells(tmp_path: Path) -> None:
    (tmp_path / "popqa.tsv").write_text(
        'id\tquestion\tpossible_answers\thops\n7\tWho?\t"[""Ada"", ""A. L.""]"\t1\n8\tWhere?\t[Trel]\t\n'
    )
    assert read_questions([tmp_path / "popqa.tsv"]) == [
        Question("7", "Who?", ("Ada", "A. L."), hops=1),
        Question("8", "Where?", ("[Trel]",)),
    ]
    (tmp_path / "bamboogle.csv").write_text('Question,Answer\n"Who, then?",Ada\n')
    (question,) = read_questions([tmp_path / "bamboogle.csv"])
    assert (question.text, question.answers) == ("Who, then?", ("Ada",))


def test_a_question_without_an_id_has_one_of_its_words_in_whatever_file_it_is(tmp_path: Path) -> None:
    rows = [{"question": "Who?", "answer": ["Ada"]}, {"question": "Where?", "answer": ["Trel"]}]
    first = read_questions([write(tmp_path / "a.jsonl", *rows)])
    again = read_questions([write(tmp_path / "b.jsonl", *reversed(rows))])
    assert [q.id for q in first] == [q.id for q in reversed(again)]
    with pytest.raises(UserError, match=r"already used at .*a\.jsonl:2"):
        read_questions([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def test_only_the_first_answers_are_scored_and_all_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", ROW | {"answers": ["Ada", "A. L.", "Countess"]})
    (question,) = read_questions([path], max_answers=2)
    assert question.distinct_answers == ("Ada", "A. L.")
    assert question.answers == ("Ada", "A. L.", "Countess")
    assert read_questions([path])[0].distinct_answers == question.answers


def test_whole_numbers_are_ids_too(tmp_path: Path) -> None:
    step = {"question": "Who?", "answer": "Ada", "supporting_id": 7}
    question = read_one(tmp_path, supporting_ids=[7, "8"], decomposition=[step])
    assert question.supporting_ids == ("7", "8")
    assert question.decomposition[0].supporting_id == "7"
    with pytest.raises(UserError, match="id '5' was already used"):
        read_questions([write(tmp_path / "q.jsonl", ROW | {"id": "5"}, ROW | {"id": 5})])


def test_questions_may_be_a_list_compressed_and_named_from_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "q.json.gz").write_bytes(gzip.compress(json.dumps([ROW]).encode()))
    assert len(read_questions(["~/q.json.gz"], root="/nowhere")) == 1
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode())
    assert len(read_questions([tmp_path / "bom.jsonl"])) == 1


def test_hops_come_from_the_field_else_the_type_else_the_decomposition(tmp_path: Path) -> None:
    steps = [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": "d"}]
    assert read_one(tmp_path, hops=4, type="2hop", decomposition=steps).hops == 4
    assert read_one(tmp_path, type="3hop1", decomposition=steps).hops == 3
    assert read_one(tmp_path, type="bridge", decomposition=steps).hops == 2
    assert read_one(tmp_path, type="bridge").hops is None


def test_musique_decompositions_come_out_resolved(tmp_path: Path) -> None:
    question = read_one(
        tmp_path,
        decomposition=[
            {"question": "Hello Love >> performer", "answer": "Hank Snow"},
            {"question": "What state did #1 live in when #1 died ?", "answer": "Tennessee"},
            {"question": "#2 >> shares border with", "answer": "Kentucky"},
            {"question": "Is #9 a typo in #3 ?", "answer": "yes"},
        ],
    )
    assert [hop.question for hop in question.decomposition] == [
        "performer of Hello Love",
        "What state did Hank Snow live in when Hank Snow died?",
        "Tennessee shares border with",
        "Is #9 a typo in Kentucky?",
    ]
    assert [hop.answer for hop in question.decomposition] == ["Hank Snow", "Tennessee", "Kentucky", "yes"]


def test_a_number_sign_in_a_first_hop_is_text(tmp_path: Path) -> None:
    (hop,) = read_one(
        tmp_path, decomposition=[{"question": "Who sang the #1 hit?", "answer": "Ada"}]
    ).decomposition
    assert hop.question == "Who sang the #1 hit?"


def test_explicit_decompositions_keep_evidence_and_passage(tmp_path: Path) -> None:
    step = {"question": "Who?", "answer": "Ada", "evidence": "It was Ada.", "supporting_id": "p1"}
    question = read_one(tmp_path, decomposition=[step], supporting_ids=["p1", "p1"])
    assert question.decomposition == (Hop("Who?", "Ada", "It was Ada.", "p1"),)
    assert question.supporting_ids == ("p1",)


def test_2wiki_triples_become_hops_and_several_objects_one_hop(tmp_path: Path) -> None:
    question = read_one(
        tmp_path,
        evidences=[
            ["The Garrison", "director", "Eduard Tisse"],
            ["The Garrison", "director", "Zakhar Agranenko"],
            ["Eduard Tisse", "educated at", "Riga"],
        ],
    )
    assert question.decomposition == (
        Hop(
            "director of The Garrison",
            "Eduard Tisse, Zakhar Agranenko",
            "The director of The Garrison is Eduard Tisse, Zakhar Agranenko.",
        ),
        Hop("Eduard Tisse educated at", "Riga", "Eduard Tisse educated at Riga."),
    )
    assert question.hops == 2


@pytest.mark.parametrize(
    ("relation", "query"),
    [
        ("date of death", "date of death of X"),
        ("spouse", "spouse of X"),
        ("member of sports team", "member of sports team of X"),
        ("part of", "X part of"),
        (
            "located in the administrative territorial entity",
            "X located in the administrative territorial entity",
        ),
    ],
)
def test_relations_become_search_queries(relation: str, query: str) -> None:
    assert relation_query("X", relation) == query


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ({"id": None, "question": "Who?", "answers": ["a"]}, "id must be"),
        ({"id": " ", "question": "Who?", "answers": ["a"]}, "id must be"),
        ({"id": True, "question": "Who?", "answers": ["a"]}, "id must be"),
        ({"id": "2", "answers": ["a"]}, r"no field question \(fields: answers, id\)"),
        ({"id": "2", "question": " ", "answers": ["a"]}, "question must be"),
        ({"id": "2", "question": "Who?"}, "no answers"),
        ({"id": "2", "question": "Who?", "answers": []}, "no answer or an empty one"),
        ({"id": "2", "question": "Who?", "answers": ["a", " "]}, "no answer or an empty one"),
        ({"id": "2", "question": "Who?", "answer": 1984}, "put numbers in quotes"),
        ({"id": "2", "question": "Who?", "answers": [1984]}, "put numbers in quotes"),
        ({"id": "2", "question": "Who?", "answers": ["a"], "hops": "two"}, "hops must be"),
        ({"id": "2", "question": "Who?", "answers": ["a"], "supporting_ids": "p"}, "supporting_ids must be"),
        ({"id": "2", "question": "Who?", "answers": ["a"], "evidences": [["s", "r"]]}, "triples"),
        ({"id": "2", "question": "Who?", "answers": ["a"], "decomposition": ["x"]}, "decomposition must be"),
        (
            {"id": "2", "question": "Who?", "answers": ["a"], "decomposition": [{"question": "q"}]},
            "no field answer",
        ),
        ({"id": "2", "question": "Who?", "answer": {"aliases": []}}, "no answer or an empty one"),
        ({"id": "2", "question": "Who?", "answer": "a", "answer_aliases": [1]}, "answer must be strings"),
        ({"id": "2", "question": "Who?", "output": ["a"]}, "output must be a list of objects"),
        ({"id": "2", "question": "Who?", "output": [{"provenance": []}]}, "no answer or an empty one"),
        ('{"id": "2", "question": "Who?", "answer": "\\udc00"}', "not valid Unicode"),
        ('{"id": "\\udc00", "question": "Who?", "answer": "a"}', "not valid Unicode"),
        ('{"id": "2", "question": "\\udc00", "answer": "a"}', "not valid Unicode"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(tmp_path: Path, line: Any, complaint: str) -> None:
    path = write(tmp_path / "bad.jsonl", ROW, "", line)
    with pytest.raises(UserError, match=complaint) as error:
        read_questions([path])
    assert f"{path}:3" in str(error.value)


def test_an_id_that_comes_twice_is_refused_with_both_lines_across_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ROW), write(tmp_path / "b.jsonl", {**ROW, "id": "2"}, ROW)
    with pytest.raises(UserError) as error:
        read_questions([first, second])
    assert f"{second}:2" in str(error.value)
    assert f"{first}:1" in str(error.value)


def test_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROW)
    with pytest.raises(UserError, match="no questions in it"):
        read_questions([write(tmp_path / "empty.jsonl", "")])
    with pytest.raises(UserError, match=r"there are empty\.jsonl, train\.jsonl"):
        read_questions([tmp_path / "trian.jsonl"])
    with pytest.raises(UserError, match=r"name a file in it; there are .*train\.jsonl"):
        read_questions([tmp_path])
    with pytest.raises(UserError, match=r"data\.root"):
        read_questions(["nowhere/train.jsonl"], root=tmp_path)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + b'{"id": "\xe9"}\n')
    with pytest.raises(UserError, match=f"{path}:2: not valid UTF-8"):
        read_questions([path])


def test_relative_paths_start_at_the_root(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROW)
    assert len(read_questions(["train.jsonl"], root=tmp_path)) == 1
    assert len(read_questions([tmp_path / "train.jsonl"], root="/nowhere")) == 1


def test_a_sample_depends_on_seed_and_ids_and_keeps_the_files_order(tmp_path: Path) -> None:
    rows = [{**ROW, "id": str(i)} for i in range(300)]
    ordered = write(tmp_path / "ordered.jsonl", *rows)
    shuffled = write(tmp_path / "shuffled.jsonl", *random.Random(0).sample(rows, len(rows)))

    def ids(path: Path, limit: int, seed: int = 0) -> list[str]:
        return [q.id for q in read_questions([path], limit=limit, seed=seed)]

    sample = ids(ordered, 50)
    assert len(sample) == 50
    assert sample == sorted(sample, key=int)
    assert set(sample) == set(ids(shuffled, 50))
    assert set(sample) < set(ids(ordered, 60))
    assert set(sample) != set(ids(ordered, 50, seed=1))
    # From the whole file, not its beginning: the mean of 50 of 0..299 is 149.5 +- 11.
    assert 100 < sum(map(int, sample)) / 50 < 200
    assert len(ids(ordered, 1000)) == 300


def test_training_on_dev_or_test_questions_is_refused() -> None:
    a, b, c = (Question(id=i, text="?", answers=("x",)) for i in "abc")
    check_splits_disjoint([a], [b], [c])
    with pytest.raises(UserError, match=r"1 questions of data\.dev.*\(a\)"):
        check_splits_disjoint([a], [b, a], [c])
    with pytest.raises(UserError, match=r"data\.test"):
        check_splits_disjoint([a, c], [b], [c])
