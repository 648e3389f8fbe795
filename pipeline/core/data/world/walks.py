"""Branches: walks through a world from a start entity along a path of relations, each owned by one split.

A branch belongs to the one split that the hash of (start, path) names. Questions are made only of branches of
their own split, so no split asks what another asks, and nothing has to be remembered to keep it so.
"""

import hashlib
import random
from functools import cache
from typing import NamedTuple

from pipeline.core.data.split_names import Split
from pipeline.core.data.world.entities import Entity, World
from pipeline.core.data.world.relation import PERSON, Relation
from pipeline.core.data.world.schema import KINDS

Path = tuple[Relation, ...]

_SPLIT_SHARES: dict[Split, int] = {"train": 70, "dev": 12, "test": 18}
"""Percent of all branches."""

_PEER_ATTEMPTS = 60
_LITERAL_TWIN_ATTEMPTS = 30
_START_KINDS = tuple(KINDS)
_START_WEIGHTS = tuple(0.25 if kind.family == PERSON else 1.0 for kind in KINDS.values())


class Branch(NamedTuple):
    """`nodes[i]` is the subject of `path[i]`; `answer` is the object of the last relation."""

    nodes: tuple[Entity, ...]
    path: Path
    answer: str

    @property
    def key(self) -> str:
        return branch_key(self.nodes[0], self.path)


def branch_key(start: Entity, path: Path) -> str:
    """What identifies a branch within a world."""
    return ".".join((start.id, *(relation.name for relation in path)))


def split_of(key: str) -> Split:
    """The one split that may ask about the branch with this key."""
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 100
    for split, size in _SPLIT_SHARES.items():
        if share < size:
            return split
        share -= size
    raise AssertionError("split shares do not sum to 100")


@cache
def paths_from(kind: str, length: int) -> tuple[Path, ...]:
    """All sensible relation paths of a length that start at a kind."""
    relations = KINDS[kind].relations
    if length == 1:
        return tuple((relation,) for relation in relations)
    return tuple(
        (relation, *path)
        for relation in relations
        if relation.target
        for path in paths_from(kind if relation.target == PERSON else relation.target, length - 1)
        if _follows(relation, path[0])
    )


def _follows(relation: Relation, following: Relation) -> bool:
    """False for the spouse of a spouse and the like, and for the occupation of "the author of X"."""
    return following.name not in (relation.name, "occupation")


@cache
def _kinds_of_people_with(path: Path) -> tuple[str, ...]:
    return tuple(
        name for name, kind in KINDS.items() if kind.family == PERSON and path in paths_from(name, len(path))
    )


class Walker:
    """Draws branches of one split of a world."""

    def __init__(self, world: World, split: Split, rng: random.Random) -> None:
        self._world = world
        self._split = split
        self._rng = rng

    def draw(self, length: int) -> Branch | None:
        """A random branch of this length; None if the one drawn does not exist or is of another split."""
        kind = self._rng.choices(_START_KINDS, _START_WEIGHTS)[0]
        return self.walk(self._entity(kind), self._rng.choice(paths_from(kind, length)))

    def walk(self, start: Entity, path: Path) -> Branch | None:
        """The branch; None if it is of another split, lacks a fact, meets itself, or can be cut short."""
        if split_of(branch_key(start, path)) != self._split:
            return None
        nodes = [start]
        for relation in path[:-1]:
            target = self._world.target(nodes[-1], relation)
            if target is None or target in nodes:
                return None
            nodes.append(target)
        last = path[-1]
        if last.target and self._world.target(nodes[-1], last) in nodes:
            return None
        answer = self._world.value(nodes[-1], last)
        if answer is None or any(self._tells(node, answer) for node in nodes[:-1]):
            return None
        return Branch(tuple(nodes), path, answer)

    def peer(self, start: Entity, path: Path) -> Branch | None:
        """A random branch along `path` from an entity of the kind of `start`; a person may be of any kind."""
        kinds = _kinds_of_people_with(path) if KINDS[start.kind].family == PERSON else (start.kind,)
        for _ in range(_PEER_ATTEMPTS):
            branch = self.walk(self._entity(self._rng.choice(kinds)), path)
            if branch is not None:
                return branch
        return None

    def twin(self, branch: Branch) -> Branch | None:
        """Another branch along the same path with the same answer, found by walking backwards."""
        last_node, last = branch.nodes[-1], branch.path[-1]
        goal = self._world.target(last_node, last) if last.target else None
        if goal is not None:
            found = list(self._world.sources(last_node.kind, last, goal))
        else:
            drawn = (self._entity(last_node.kind) for _ in range(_LITERAL_TWIN_ATTEMPTS))
            found = [node for node in drawn if self._world.literal(node, last.name) == branch.answer]
        for node, relation in zip(branch.nodes[-2::-1], branch.path[-2::-1], strict=True):
            found = [start for middle in found for start in self._world.sources(node.kind, relation, middle)]
        found = [start for start in found if start != branch.nodes[0]]
        return self.walk(self._rng.choice(found), branch.path) if found else None

    def _entity(self, kind: str) -> Entity:
        return Entity(kind, self._rng.randrange(self._world.counts[kind]))

    def _tells(self, node: Entity, answer: str) -> bool:
        """True if the node's own passage holds the answer, so that the walk could stop there."""
        return any(self._world.value(node, relation) == answer for relation in KINDS[node.kind].relations)
