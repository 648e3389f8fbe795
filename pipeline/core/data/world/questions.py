"""Multi-hop questions with one right answer, their sub-queries, evidence and gold passages.

Guarantees:
- Relations are functional, so every answer is unique. A question names its start entities and no others.
- `hops` is the number of sub-queries (searches) in the decomposition, and every one is needed: no earlier
  passage on a branch tells its answer.
- No question text and no (start entity, relation path) appears in two splits; see `walks`.
- The mix of types is exact in every hundred questions. Yes/no questions come in pairs, one of each, over the
  same relation path, so that the wording does not give the answer away.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Any

from pipeline.core.data.split_names import SPLITS, Split
from pipeline.core.data.world.entities import World, world_of
from pipeline.core.data.world.relation import PERSON
from pipeline.core.data.world.schema import KINDS, Kind
from pipeline.core.data.world.spec import WorldSpec
from pipeline.core.data.world.walks import Branch, Walker
from pipeline.core.errors import UserError

Record = dict[str, Any]

_MAX_ATTEMPTS = 20_000
_MIX: dict[tuple[str, int], int] = {
    ("bridge", 1): 15,
    ("bridge", 2): 38,
    ("bridge", 3): 15,
    ("bridge", 4): 5,
    ("comparison", 2): 10,
    ("bridge_comparison", 3): 2,
    ("bridge_comparison", 4): 3,
    ("yes_no", 2): 6,
    ("yes_no", 4): 6,
}
"""(type, hops) -> questions per hundred."""

_WHO_WINS = ("Who {wins}, {a} or {b}?", "Of {a} and {b}, who {wins}?", "{a} or {b}: who {wins}?")
_WHICH_WINS = (
    "Which {noun} {wins}, {a} or {b}?",
    "Of {a} and {b}, which {noun} {wins}?",
    "{a} or {b}: which {noun} {wins}?",
)
_WHOSE_WINS = (
    "Which {noun} has the {head} that {wins}, {a} or {b}?",
    "Of {a} and {b}, which {noun} has the {head} that {wins}?",
    "{a} or {b}: which {noun} has the {head} that {wins}?",
)


def generate_questions(spec: WorldSpec, split: Split, count: int | None = None) -> Iterator[Record]:
    """The questions of one split, one at a time: `count` of them, by default as many as the spec says.

    A record is {id, question, answers, type, hops, supporting_ids, decomposition}; the decomposition is a
    list of {question, answer, evidence, supporting_id} in an order in which each can be asked.

    Raises:
        UserError: the split is unknown, or the world is too small for so many different questions.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    maker = _QuestionMaker(world_of(spec), split)
    for number in range(spec.num_questions(split) if count is None else count):
        yield {"id": f"{split}-{number}", **maker.next_question(number)}


class _QuestionMaker:
    """Makes the questions of one split in turn; remembers which it has made."""

    def __init__(self, world: World, split: Split) -> None:
        self._world = world
        self._split = split
        spec = world.spec
        self._rng = random.Random(f"{spec.seed}/{spec.partition}/{spec.num_passages}/{split}")
        self._walker = Walker(world, split, self._rng)
        self._seen: set[bytes] = set()
        self._schedule: list[tuple[str, int]] = []
        self._waiting_no: dict[int, Record] = {}

    def next_question(self, number: int) -> Record:
        if not self._schedule:
            self._schedule = [entry for entry, count in _MIX.items() for _ in range(count)]
            self._rng.shuffle(self._schedule)
        kind, hops = self._schedule.pop()
        attempt = {
            "bridge": self._bridge,
            "comparison": self._comparison,
            "bridge_comparison": self._bridge_comparison,
            "yes_no": self._yes_no,
        }[kind]
        for _ in range(_MAX_ATTEMPTS):
            record = attempt(hops)
            if record is not None:
                return record
        raise UserError(
            f"the world of {self._world.spec} has no further {kind} question with {hops} searches for the "
            f"{self._split} split after {number} questions; ask for fewer questions or for more passages"
        )

    def _bridge(self, hops: int) -> Record | None:
        branch = self._walker.draw(hops)
        if branch is None:
            return None
        text = self._rng.choice(branch.path[-1].asks).format(s=self._phrase(branch, hops - 1))
        return None if branch.answer in text else self._record("bridge", text, branch.answer, [branch])

    def _comparison(self, hops: int) -> Record | None:
        """Which of two named entities has the smaller or larger number."""
        first = self._walker.draw(hops // 2)
        if first is None or not first.path[0].smaller:
            return None
        second = self._walker.peer(first.nodes[0], first.path)
        return None if second is None else self._who_wins("comparison", first, second)

    def _bridge_comparison(self, hops: int) -> Record | None:
        """The same for the objects of two things (4 searches), or one such object and a named entity (3)."""
        first = self._walker.draw(2)
        if first is None or not first.path[1].smaller:
            return None
        if hops == 3:
            second = self._walker.peer(first.nodes[1], first.path[1:])
            return None if second is None else self._who_wins("bridge_comparison", first, second)
        second = self._walker.peer(first.nodes[0], first.path)
        winner = None if second is None else self._winner(first, second)
        if second is None or winner is None:
            return None
        wins, best = winner
        a, b = (self._phrase(branch, 0) for branch in (first, second))
        noun, head = KINDS[first.nodes[0].kind].noun, first.path[0].head
        text = self._rng.choice(_WHOSE_WINS).format(a=a, b=b, wins=wins, noun=noun, head=head)
        return self._record("bridge_comparison", text, self._world.name(best.nodes[0]), [first, second])

    def _who_wins(self, kind: str, first: Branch, second: Branch) -> Record | None:
        winner = self._winner(first, second)
        if winner is None:
            return None
        wins, best = winner
        compared: Kind = KINDS[first.nodes[-1].kind]
        forms = _WHO_WINS if compared.family == PERSON else _WHICH_WINS
        a, b = (self._phrase(branch, len(branch.path) - 1) for branch in (first, second))
        text = self._rng.choice(forms).format(a=a, b=b, wins=wins, noun=compared.noun)
        return self._record(kind, text, self._world.name(best.nodes[-1]), [first, second])

    def _winner(self, first: Branch, second: Branch) -> tuple[str, Branch] | None:
        """A comparison predicate and the branch that wins it; None if they tie."""
        relation = first.path[-1]
        a = self._world.quantity(first.nodes[-1], relation.name)
        b = self._world.quantity(second.nodes[-1], relation.name)
        if a is None or b is None or a == b:
            return None
        if self._rng.random() < 0.5:
            return self._rng.choice(relation.smaller), first if a < b else second
        return self._rng.choice(relation.larger), first if a > b else second

    def _yes_no(self, hops: int) -> Record | None:
        """A yes question and, next time, the no question over the same path."""
        if hops in self._waiting_no:
            return self._waiting_no.pop(hops)
        first = self._walker.draw(hops // 2)
        if first is None or not first.path[-1].same:
            return None
        second = self._walker.twin(first)
        if second is None:
            return None
        third, fourth = (self._walker.peer(first.nodes[0], first.path) for _ in range(2))
        if third is None or fourth is None or third.answer == fourth.answer:
            return None
        yes = self._do_they_share("yes", first, second)
        no = None if yes is None else self._do_they_share("no", third, fourth)
        if yes is None or no is None:
            return None
        self._waiting_no[hops] = no
        return yes

    def _do_they_share(self, answer: str, first: Branch, second: Branch) -> Record | None:
        a, b = (self._phrase(branch, len(branch.path) - 1) for branch in (first, second))
        text = self._rng.choice(first.path[-1].same).format(a=a, b=b)
        return self._record("yes_no", text, answer, [first, second])

    def _phrase(self, branch: Branch, steps: int) -> str:
        """A noun phrase for the entity so many steps along the branch: "the director of X"."""
        text = self._world.reference(branch.nodes[0])
        for relation in branch.path[:steps]:
            text = self._rng.choice(relation.phrases).format(s=text)
        return text

    def _record(self, kind: str, text: str, answer: str, branches: list[Branch]) -> Record | None:
        """The finished record; None if the branches share an entity or have been asked about in this way."""
        nodes = [node for branch in branches for node in branch.nodes]
        key = "|".join([kind, *sorted(branch.key for branch in branches)])
        digest = hashlib.blake2b(key.encode(), digest_size=12).digest()
        if len(set(nodes)) < len(nodes) or digest in self._seen:
            return None
        self._seen.add(digest)
        steps = [step for branch in branches for step in self._decompose(branch)]
        return {
            "question": text[0].upper() + text[1:],
            "answers": [answer],
            "type": kind,
            "hops": len(steps),
            "supporting_ids": [step["supporting_id"] for step in steps],
            "decomposition": steps,
        }

    def _decompose(self, branch: Branch) -> Iterator[dict[str, str]]:
        """The canonical sub-query, answer and evidence of every step."""
        for node, relation in zip(branch.nodes, branch.path, strict=True):
            subject = self._world.reference(node)
            target = self._world.target(node, relation) if relation.target else None
            shown = branch.answer if target is None else self._world.reference(target)
            evidence = relation.evidence.format(s=subject, o=shown)
            yield {
                "question": relation.sub_query.format(s=subject),
                "answer": shown.removeprefix("the "),
                "evidence": evidence[0].upper() + evidence[1:],
                "supporting_id": node.id,
            }
