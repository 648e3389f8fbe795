"""Passages: two to four short sentences per entity that state all its facts in varied words and order."""

from collections.abc import Iterator
from typing import Any

from pipeline.core.data.world.entities import Entity, World, world_of
from pipeline.core.data.world.relation import PERSON
from pipeline.core.data.world.schema import KINDS, Kind
from pipeline.core.data.world.spec import WorldSpec
from pipeline.core.errors import UserError


def generate_passages(spec: WorldSpec) -> Iterator[dict[str, str]]:
    """All passages of a world as {id, title, text}, in a fixed order, one at a time."""
    world = world_of(spec)
    for entity in world.entities():
        yield passage(world, entity)


def passage_of(spec: WorldSpec, passage_id: str) -> dict[str, str]:
    """The passage with this id, generated alone. Raises UserError for an id outside the world."""
    world = world_of(spec)
    kind, _, number = passage_id.rpartition("-")
    if kind not in KINDS or not number.isdecimal() or int(number) >= world.counts[kind]:
        raise UserError(f"no passage has the id {passage_id!r} in the world of {spec}")
    return passage(world, Entity(kind, int(number)))


def passage(world: World, entity: Entity) -> dict[str, str]:
    """The passage {id, title, text} of one entity."""
    return {"id": entity.id, "title": world.name(entity), "text": _text(world, entity)}


def _text(world: World, entity: Entity) -> str:
    kind = KINDS[entity.kind]
    roll = world.draw(entity, "clauses")
    clauses: list[tuple[str, str]] = []
    for relation in kind.relations:
        if relation.target:
            other = world.target(entity, relation)
            value = None if other is None else world.reference(other)
        else:
            value = world.literal(entity, relation.name)
        if value is not None and relation.clauses:
            clauses.append((relation.clauses[roll % len(relation.clauses)], value))
            roll //= len(relation.clauses)
    _shuffle(clauses, world.draw(entity, "order"))
    return _sentences(world.reference(entity), kind, clauses, world.draw(entity, "style"))


def _shuffle(items: list[Any], roll: int) -> None:
    for last in range(len(items) - 1, 0, -1):
        roll, chosen = divmod(roll, last + 1)
        items[last], items[chosen] = items[chosen], items[last]


def _sentences(reference: str, kind: Kind, clauses: list[tuple[str, str]], roll: int) -> str:
    """Join clauses into sentences: what it is comes alone, with the first clause, or after it."""
    pronoun, possessive = _pronouns(kind, roll & 1)
    verb = "was" if kind.family == PERSON else "is"
    article = "an" if kind.noun[0] in "aeio" else "a"
    what = f"{verb} {article} {kind.noun}"
    style = (roll >> 1) % 3
    first, second = _fill(clauses[0], reference, _genitive(reference)), _fill(clauses[0], pronoun, possessive)
    if style == 0:
        sentences, rest = [f"{reference} {what}"], clauses
    elif style == 1:
        sentences, rest = [f"{reference} {what}, and {second}"], clauses[1:]
    else:
        follow = f"{pronoun} {what}"
        if len(clauses) > 1:
            follow = f"{follow}, and {_fill(clauses[1], pronoun, possessive)}"
        sentences, rest = [first, follow], clauses[2:]
    for start in range(0, len(rest), 2):
        if (roll >> (4 + start)) & 1 and kind.family != PERSON:
            sentence = _fill(rest[start], f"the {kind.noun}", f"the {kind.noun}'s")
        else:
            sentence = _fill(rest[start], pronoun, possessive)
        if start + 1 < len(rest):
            sentence = f"{sentence}, and {_fill(rest[start + 1], pronoun, possessive)}"
        sentences.append(sentence)
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _pronouns(kind: Kind, gender: int) -> tuple[str, str]:
    if kind.family == PERSON:
        return ("he", "his") if gender else ("she", "her")
    return "it", "its"


def _genitive(reference: str) -> str:
    return f"{reference}'" if reference.endswith("s") else f"{reference}'s"


def _fill(clause: tuple[str, str], subject: str, possessive: str) -> str:
    template, value = clause
    return template.format(s=subject, p=possessive, o=value)
