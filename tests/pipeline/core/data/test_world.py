"""The generated encyclopedia as its users meet it: files, passages, questions and their gold steps.

The component test encodes one small world with all-MiniLM-L6-v2; everything else runs in seconds.
"""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.data.split_names import SPLITS
from pipeline.core.data.world.entities import Entity, world_of
from pipeline.core.data.world.names import PARTITIONS, NameForge, Permutation, partition_of
from pipeline.core.data.world.relation import Relation
from pipeline.core.data.world.schema import KINDS
from pipeline.core.data.world.spec import WorldSpec
from pipeline.core.data.world.writer import generate_passages, generate_questions, passage_of, write_world
from pipeline.core.errors import UserError
from retriever_service.encoding.encoder import Encoder, EncoderSpec
from retriever_service.passages.corpus import Passage

SMALL = WorldSpec(seed=0)
SEEDS = st.integers(min_value=0, max_value=2**31)


@pytest.fixture(scope="module")
def passages() -> dict[str, dict[str, str]]:
    return {passage["id"]: passage for passage in generate_passages(SMALL)}


@pytest.fixture(scope="module")
def questions() -> dict[str, list[dict[str, Any]]]:
    return {split: list(generate_questions(SMALL, split)) for split in SPLITS}


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("worlds") / "world"
    write_world(out, seed=0, size="small")
    return out


def branches(question: dict[str, Any]) -> list[list[dict[str, str]]]:
    """The decomposition cut where a step does not ask about the previous step's answer."""
    cut: list[list[dict[str, str]]] = []
    for step in question["decomposition"]:
        if cut and cut[-1][-1]["answer"] in step["question"]:
            cut[-1].append(step)
        else:
            cut.append([step])
    return cut


def number(text: str) -> int:
    return int(text.replace(",", ""))


# names


@given(key=st.integers(), word=st.integers(0, 999_999), partition=st.sampled_from(PARTITIONS))
def test_every_word_belongs_to_the_partition_it_was_made_for(key: int, word: int, partition: str) -> None:
    for num_words in (1_000, 1_000_000):
        assert partition_of(NameForge(key, partition, num_words).word(word % num_words)) == partition


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, other_seed=SEEDS)
def test_worlds_of_two_partitions_share_no_title(seed: int, other_seed: int) -> None:
    default = {p["title"] for p in generate_passages(WorldSpec(seed, 500))}
    pretrain = {p["title"] for p in generate_passages(WorldSpec(other_seed, 500, partition="pretrain"))}
    assert not default & pretrain


@given(size=st.integers(1, 10**7), key=st.integers(), index=st.integers(0, 10**7))
def test_permutation_can_be_inverted(size: int, key: int, index: int) -> None:
    order = Permutation(size, key)
    assert order.invert(order(index % size)) == index % size


@pytest.mark.parametrize("num_words", [2_000, 60_000])
def test_words_are_unique(num_words: int) -> None:
    forge = NameForge(7, "default", num_words)
    assert len({forge.word(index) for index in range(num_words)}) == num_words


# passages


def test_titles_are_unique_and_ids_tell_the_kind(passages: dict[str, dict[str, str]]) -> None:
    assert len(passages) == SMALL.num_passages
    assert len({passage["title"] for passage in passages.values()}) == SMALL.num_passages
    assert Counter(name.rpartition("-")[0] for name in passages) == {
        kind.name: kind.per_hundred * SMALL.units for kind in KINDS.values()
    }


def test_passages_are_short_and_varied(passages: dict[str, dict[str, str]]) -> None:
    for passage in passages.values():
        assert 2 <= passage["text"].count(".") <= 4, passage
        assert 20 <= len(passage["text"].split()) <= 50, passage
    shapes = Counter(
        re.sub(r"[A-Z]\w+|[\d,]+", "*", passage["text"])
        for name, passage in passages.items()
        if name.startswith("film-")
    )
    assert shapes.most_common(1)[0][1] < 10


def test_look_alikes_share_part_of_their_name(passages: dict[str, dict[str, str]]) -> None:
    surnames = Counter(passages[f"mayor-{i}"]["title"].split()[1] for i in range(160))
    assert max(surnames.values()) > 1


def test_a_passage_can_be_had_alone(passages: dict[str, dict[str, str]]) -> None:
    for name in ("film-0", "city-159", "treaty-19"):
        assert passage_of(SMALL, name) == passages[name]
    large = WorldSpec.of_size(3, "large")
    assert passage_of(large, "film-159999")["text"]


@pytest.mark.parametrize("unknown", ["film-160", "film--1", "film", "dragon-1", ""])
def test_an_unknown_passage_id_is_the_callers_mistake(unknown: str) -> None:
    with pytest.raises(UserError, match="no passage has the id"):
        passage_of(SMALL, unknown)


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_histories_make_sense(seed: int) -> None:
    """Nobody dies before 60, couples are of one generation, and films follow their novels."""
    world = world_of(WorldSpec(seed, 500))
    relations = {relation.name: relation for kind in KINDS.values() for relation in kind.relations}
    for entity in world.entities():
        born = world.quantity(entity, "birth_year") if "birth_year" in _names(entity) else None
        if born is not None:
            died = world.quantity(entity, "death_year")
            assert died is None or born + 60 <= died <= 2020
            spouse = world.target(entity, relations["spouse"])
            assert spouse is None or abs(born - (world.quantity(spouse, "birth_year") or 0)) < 8
        if entity.kind == "film":
            novel = world.target(entity, relations["based_on"])
            year = world.quantity(entity, "release_year") or 0
            assert novel is None or year > (world.quantity(novel, "release_year") or 0)
            assert year <= 2020


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_relations_walked_backwards_give_exactly_their_subjects(seed: int) -> None:
    world = world_of(WorldSpec(seed, 300))
    for kind in KINDS.values():
        subjects = [Entity(kind.name, i) for i in range(world.counts[kind.name])]
        for relation in filter(lambda relation: relation.target, kind.relations):
            found = [(subject, world.target(subject, relation)) for subject in subjects]
            for target in {target for _, target in found if target is not None}:
                expected = {subject for subject, other in found if other == target}
                assert set(world.sources(kind.name, relation, target)) == expected


def _names(entity: Entity) -> set[str]:
    return {relation.name for relation in KINDS[entity.kind].relations}


# questions


def test_every_step_is_answered_by_its_passage(
    passages: dict[str, dict[str, str]], questions: dict[str, list[dict[str, Any]]]
) -> None:
    for question in itertools.chain(*questions.values()):
        steps = question["decomposition"]
        assert question["hops"] == len(steps)
        assert question["supporting_ids"] == [step["supporting_id"] for step in steps]
        for step in steps:
            passage = passages[step["supporting_id"]]
            assert passage["title"] in step["question"]
            assert step["answer"] in passage["text"]
            assert step["answer"] in step["evidence"]
            assert passage["title"] in step["evidence"]


def test_only_start_entities_stand_in_the_question(questions: dict[str, list[dict[str, Any]]]) -> None:
    for question in itertools.chain(*questions.values()):
        for branch in branches(question):
            for step in branch[:-1]:
                assert not re.search(rf"\b{step['answer']}\b", question["question"]), question


def test_answers_follow_from_the_last_steps(questions: dict[str, list[dict[str, Any]]]) -> None:
    wins = _predicates()
    for question in itertools.chain(*questions.values()):
        ends = [branch[-1] for branch in branches(question)]
        (answer,) = question["answers"]
        if question["type"] == "bridge":
            assert answer == ends[0]["answer"]
            assert answer not in question["question"]
        elif question["type"] == "yes_no":
            assert (answer == "yes") == (ends[0]["answer"] == ends[1]["answer"])
        else:
            (best,) = {pick for phrase, pick in wins.items() if phrase in question["question"]}
            winner = best(branches(question), key=lambda branch: number(branch[-1]["answer"]))
            assert answer in winner[0]["question"] + winner[-1]["question"]


def _predicates() -> dict[str, Any]:
    relations: set[Relation] = {relation for kind in KINDS.values() for relation in kind.relations}
    return {
        **{phrase: min for relation in relations for phrase in relation.smaller},
        **{phrase: max for relation in relations for phrase in relation.larger},
    }


def test_a_sub_query_has_one_answer(questions: dict[str, list[dict[str, Any]]]) -> None:
    answers: dict[str, set[tuple[str, str]]] = {}
    for question in itertools.chain(*questions.values()):
        for step in question["decomposition"]:
            answers.setdefault(step["question"], set()).add((step["answer"], step["supporting_id"]))
    assert all(len(found) == 1 for found in answers.values())


def test_mix_of_types_is_as_promised_and_yes_balances_no(questions: dict[str, list[dict[str, Any]]]) -> None:
    train = questions["train"]
    shares = Counter((question["type"], question["hops"]) for question in train)
    assert shares == {
        ("bridge", 1): 300,
        ("bridge", 2): 760,
        ("bridge", 3): 300,
        ("bridge", 4): 100,
        ("comparison", 2): 200,
        ("bridge_comparison", 3): 40,
        ("bridge_comparison", 4): 60,
        ("yes_no", 2): 120,
        ("yes_no", 4): 120,
    }
    assert Counter(q["answers"][0] for q in train if q["type"] == "yes_no") == {"yes": 120, "no": 120}


def test_no_question_or_branch_is_in_two_splits(questions: dict[str, list[dict[str, Any]]]) -> None:
    texts = {split: {question["question"] for question in found} for split, found in questions.items()}
    asked = {
        split: {
            (branch[0]["supporting_id"], tuple(_wording(step) for step in branch))
            for question in found
            for branch in branches(question)
        }
        for split, found in questions.items()
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not texts[one] & texts[other]
        assert not asked[one] & asked[other]
    assert all(len(texts[split]) == len(questions[split]) for split in SPLITS)


def _wording(step: dict[str, str]) -> str:
    """A sub-query without its subject, which tells the relation."""
    return re.sub(r"(?<!^)\b[A-Z]\w*", "*", step["question"])


def test_a_world_too_small_for_so_many_questions_says_so() -> None:
    with pytest.raises(UserError, match="ask for fewer questions or for more passages"):
        list(generate_questions(WorldSpec(0, 100), "dev", 5_000))


def test_a_shorter_run_of_questions_is_a_prefix(questions: dict[str, list[dict[str, Any]]]) -> None:
    assert list(generate_questions(SMALL, "train", 50)) == questions["train"][:50]


# files


def test_the_same_seed_gives_identical_files(world_dir: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "again", seed=0, size="small")
    names = sorted(path.name for path in world_dir.iterdir())
    assert names == ["corpus.jsonl", "dev.jsonl", "test.jsonl", "train.jsonl", "world.json"]
    for name in names:
        assert (world_dir / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_files_hold_what_the_generators_give(
    world_dir: Path, passages: dict[str, dict[str, str]], questions: dict[str, list[dict[str, Any]]]
) -> None:
    corpus = [json.loads(line) for line in (world_dir / "corpus.jsonl").read_text().splitlines()]
    assert corpus == list(passages.values())
    for split in SPLITS:
        lines = (world_dir / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == questions[split]
    manifest = json.loads((world_dir / "world.json").read_text())
    assert (manifest["seed"], manifest["size"], manifest["partition"]) == (0, "small", "default")
    assert (manifest["num_passages"], manifest["num_test"]) == (2_000, 500)


def test_another_seed_gives_another_world(passages: dict[str, dict[str, str]]) -> None:
    other = {passage["title"] for passage in generate_passages(WorldSpec(seed=1))}
    shared = other & {passage["title"] for passage in passages.values()}
    assert len(shared) < 0.02 * SMALL.num_passages


def test_writing_the_same_world_again_changes_nothing(world_dir: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in world_dir.iterdir()}
    summary = write_world(world_dir, seed=0, size="small")
    assert summary.num_passages == 2_000
    assert before == {path.name: path.stat().st_mtime_ns for path in world_dir.iterdir()}


def test_a_directory_with_another_world_or_other_files_is_refused(world_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another world"):
        write_world(world_dir, seed=1, size="small")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write_world(tmp_path, seed=0, size="small")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path / "world", seed=0, size="small", on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_world(tmp_path / "world", seed=0, size="small", on_progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (4_800, 4_800)
    assert seen == sorted(seen)


def test_wrong_arguments_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="partition 'mars' is unknown"):
        WorldSpec(0, partition="mars")
    with pytest.raises(UserError, match="multiple of 100"):
        WorldSpec(0, 150)
    with pytest.raises(UserError, match="size 'huge' is unknown"):
        write_world(tmp_path / "world", seed=0, size="huge")  # type: ignore[arg-type]


# how hard the questions are for a dense retriever


@pytest.mark.component
def test_one_search_is_seldom_enough_but_each_sub_query_finds_its_passage(
    passages: dict[str, dict[str, str]], questions: dict[str, list[dict[str, Any]]]
) -> None:
    encoder = Encoder.load(EncoderSpec("minilm"))
    ids = list(passages)
    all_passages = (Passage(id_, passages[id_]["title"], passages[id_]["text"]) for id_ in ids)
    passage_vectors = np.concatenate(list(encoder.encode_passages(all_passages)))

    def top(queries: list[str], k: int) -> list[set[str]]:
        order = (-(encoder.encode_queries(queries) @ passage_vectors.T)).argsort(axis=1)[:, :k]
        return [{ids[index] for index in row} for row in order]

    hard = [question for question in questions["test"] if question["hops"] > 1]
    at_once = top([question["question"] for question in hard], 5)
    solved = sum(set(q["supporting_ids"]) <= found for q, found in zip(hard, at_once, strict=True))
    assert solved <= 0.30 * len(hard)

    steps = [step for question in questions["test"] for step in question["decomposition"]]
    by_step = top([step["question"] for step in steps], 3)
    recalled = sum(step["supporting_id"] in found for step, found in zip(steps, by_step, strict=True))
    assert recalled >= 0.90 * len(steps)
