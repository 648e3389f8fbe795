"""The facts of a world: names and relations of every entity, each a pure function of (spec, kind, number).

Nothing is stored, so a world of millions of entities costs no memory. Relations can also be walked backwards
(`World.sources`), because many-to-one relations are keyed permutations followed by a division.
"""

import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from pipeline.core.data.world.names import PARTITIONS, Permutation, mix
from pipeline.core.data.world.naming import Naming
from pipeline.core.data.world.relation import PERSON, Relation
from pipeline.core.data.world.schema import KINDS
from pipeline.core.data.world.spec import WorldSpec

_CITIES_PER_COUNTRY = KINDS["city"].per_hundred
_REGIONS_PER_COUNTRY = KINDS["region"].per_hundred
_SPOUSE_DISTANCE = 8

_WORDS_OF_CHOICE: dict[str, tuple[str, ...]] = {
    "industry": ("cars", "shoes", "clocks", "glass", "paper", "ships", "tea", "tools", "soap", "bread"),
    "export": ("wheat", "wine", "salt", "silver", "timber", "cotton", "sugar", "copper", "wool", "rice"),
    "genre": ("folk music", "jazz", "rock music", "blues", "dance music", "choral music"),
    "sport": ("football", "rowing", "hockey", "tennis", "chess", "cricket"),
}
_YEAR_RELATIONS = frozenset({"birth_year", "death_year", "founded_year", "release_year", "year"})
_BIRTH_YEARS = {
    "mayor": (1945, 34),
    "professor": (1945, 34),
    "coach": (1945, 34),
    "entrepreneur": (1840, 44),
    "engineer": (1900, 44),
    "scientist": (1900, 44),
}
"""Kind -> (first year, span) where it is not the usual; companies are older than those who work for them."""
_LAST_YEAR = 2020
_KIND_SALTS = {name: number for number, name in enumerate(KINDS)}
_PURPOSES = ("place", "marriage", "couple", "year", "death", "size", "choice", "clauses", "order", "style")
_PURPOSE_SALTS = {purpose: mix(number) for number, purpose in enumerate(_PURPOSES)}


class Entity(NamedTuple):
    """One entity; its passage has the id `kind-number`."""

    kind: str
    number: int

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.number}"


class World:
    """Names and facts of the world that a spec describes."""

    def __init__(self, spec: WorldSpec) -> None:
        self.spec = spec
        units = spec.units
        self.counts = {name: kind.per_hundred * units for name, kind in KINDS.items()}
        self._key = mix(mix(spec.seed) ^ PARTITIONS.index(spec.partition))
        self._person_offset: dict[str, int] = {}
        self._num_people = 0
        for kind in KINDS.values():
            if kind.family == PERSON:
                self._person_offset[kind.name] = self._num_people
                self._num_people += self.counts[kind.name]
        self._orders: dict[tuple[str, str], Permutation] = {}
        self._naming = Naming(spec, self._key)

    def _order(self, kind: str, relation: Relation) -> Permutation:
        family = PERSON if kind in self._person_offset else kind
        order = self._orders.get((family, relation.name))
        if order is None:
            size, _ = self._subjects(Entity(kind, 0))
            salt = zlib.crc32(f"{family}/{relation.name}".encode())
            order = self._orders[(family, relation.name)] = Permutation(size, mix(self._key ^ salt))
        return order

    def draw(self, entity: Entity, purpose: str) -> int:
        """A 64-bit pseudo-random integer for one purpose in one entity."""
        kind, number = entity
        return mix(self._key ^ mix(number * len(KINDS) + _KIND_SALTS[kind]) ^ _PURPOSE_SALTS[purpose])

    def entities(self) -> Iterator[Entity]:
        """All entities, kind by kind."""
        for kind, count in self.counts.items():
            for index in range(count):
                yield Entity(kind, index)

    def name(self, entity: Entity) -> str:
        """The unique full name, which is also the title of the passage."""
        return self.reference(entity).removeprefix("the ")

    def reference(self, entity: Entity) -> str:
        """The name as it stands in a sentence, with an article where English wants one."""
        return self._naming.reference(*entity)

    def target(self, entity: Entity, relation: Relation) -> Entity | None:
        """The object of an entity relation, or None if this subject has none."""
        if relation.link == "inside":
            return self._inside(entity, relation.name)
        if relation.link == "one":
            exists = entity.number < self.counts[relation.target]
            return Entity(relation.target, entity.number) if exists else None
        subjects, position = self._subjects(entity)
        slot = self._order(entity.kind, relation)(position)
        return Entity(relation.target, slot * self.counts[relation.target] // subjects)

    def sources(self, kind: str, relation: Relation, target: Entity) -> Iterator[Entity]:
        """All subjects of one kind that have `target` as object."""
        if relation.link == "one":
            if target.number < self.counts[kind]:
                yield Entity(kind, target.number)
        elif relation.link == "inside":
            candidates = self._inside_sources(kind, relation.name, target)
            yield from (source for source in candidates if self._inside(source, relation.name) == target)
        else:
            subjects, _ = self._subjects(Entity(kind, 0))
            objects = self.counts[relation.target]
            order = self._order(kind, relation)
            first, end = (-(-(target.number + step) * subjects // objects) for step in (0, 1))
            for slot in range(first, end):
                position = order.invert(slot) - self._person_offset.get(kind, 0)
                if 0 <= position < self.counts[kind]:
                    yield Entity(kind, position)

    def _subjects(self, entity: Entity) -> tuple[int, int]:
        """How many subjects a "many" relation spreads over its objects, and this one's place among them."""
        offset = self._person_offset.get(entity.kind)
        if offset is None:
            return self.counts[entity.kind], entity.number
        return self._num_people, offset + entity.number

    def _inside(self, entity: Entity, relation: str) -> Entity | None:
        kind, number = entity
        if relation == "country":
            return Entity("country", number // KINDS[kind].per_hundred)
        if relation == "capital":
            return Entity(
                "city", number * _CITIES_PER_COUNTRY + self.draw(entity, "place") % _CITIES_PER_COUNTRY
            )
        if relation == "largest_city":
            country, place = divmod(number, _REGIONS_PER_COUNTRY)
            share = _CITIES_PER_COUNTRY // _REGIONS_PER_COUNTRY
            first = country * _CITIES_PER_COUNTRY + place * share
            return Entity("city", first + self.draw(entity, "place") % share)
        return self._spouse(entity)

    def _inside_sources(self, kind: str, relation: str, target: Entity) -> Iterator[Entity]:
        """Every entity that may have `target` as object of an "inside" relation."""
        country = target.number if target.kind == "country" else target.number // _CITIES_PER_COUNTRY
        if relation == "capital":
            yield Entity(kind, country)
        elif relation == "spouse":
            if target.number >= _SPOUSE_DISTANCE:
                yield Entity(kind, target.number - _SPOUSE_DISTANCE)
        else:
            per_country = KINDS[kind].per_hundred
            yield from (Entity(kind, country * per_country + place) for place in range(per_country))

    def _spouse(self, entity: Entity) -> Entity | None:
        """Most pairs (i, i + 8) of one kind are couples; only the first one's passage mentions it."""
        kind, number = entity
        partner = number + _SPOUSE_DISTANCE
        if (
            number & _SPOUSE_DISTANCE
            or partner >= self.counts[kind]
            or self.draw(entity, "marriage") % 4 == 0
        ):
            return None
        return Entity(kind, partner)

    def quantity(self, entity: Entity, relation: str) -> int | None:
        """The value of a numeric relation; None if it is not numeric, or unknown for this subject."""
        if relation == "birth_year":
            return self._birth_year(entity)
        if relation == "death_year":
            return self._death_year(entity)
        if relation in _YEAR_RELATIONS:
            return self._year(entity)
        roll = self.draw(entity, "size")
        if relation == "population":
            return (100 + roll % 9_900) * (10_000 if entity.kind == "country" else 100)
        if relation == "area":
            return (100 + roll % 9_900) * 10
        if relation == "students":
            return (10 + roll % 490) * 100
        if relation == "height":
            return 40 + roll % 900
        return None

    def _birth_year(self, entity: Entity) -> int:
        """Spouses are born within eight years of each other."""
        kind, number = entity
        first, span = _BIRTH_YEARS.get(kind, (1870, 74))
        couple = self.draw(Entity(kind, number & ~_SPOUSE_DISTANCE), "couple")
        return first + couple % span + self.draw(entity, "year") % 8

    def _death_year(self, entity: Entity) -> int | None:
        roll = self.draw(entity, "death")
        year = self._birth_year(entity) + 62 + roll // 2 % 33
        return None if roll % 2 or year > _LAST_YEAR else year

    def _year(self, entity: Entity) -> int:
        """A year that fits the people and works this entity depends on: a film follows its novel."""
        kind = entity.kind
        roll = self.draw(entity, "year")
        if kind in ("country", "city"):
            return 900 + roll % 800
        if kind == "university":
            return 1200 + roll % 650
        if kind == "club":
            return 1850 + roll % 80
        after, gap, spread = _DEPENDS_ON[kind]
        year = 0
        for relation in KINDS[kind].relations:
            if relation.name in after:
                other = self.target(entity, relation)
                if other is not None:
                    year = max(year, self._first_year(other) + gap)
        return year + roll % spread

    def _first_year(self, entity: Entity) -> int:
        """Year from which an entity can have effects: 24 years after a birth, else its own year."""
        if KINDS[entity.kind].family == PERSON:
            return self._birth_year(entity) + 24
        return self._year(entity)

    def literal(self, entity: Entity, relation: str) -> str | None:
        """The text of a literal fact, as written everywhere; None if unknown for this subject."""
        if relation == "occupation":
            return KINDS[entity.kind].noun
        choices = _WORDS_OF_CHOICE.get(relation)
        if choices is not None:
            return choices[self.draw(entity, "choice") % len(choices)]
        number = self.quantity(entity, relation)
        if number is None:
            return None
        return str(number) if relation in _YEAR_RELATIONS else f"{number:,}"

    def value(self, entity: Entity, relation: Relation) -> str | None:
        """The object of a relation as an answer: a name or a literal."""
        if not relation.target:
            return self.literal(entity, relation.name)
        other = self.target(entity, relation)
        return None if other is None else self.name(other)


_DEPENDS_ON: dict[str, tuple[tuple[str, ...], int, int]] = {
    "company": (("founder",), 2, 25),
    "band": (("lead_singer",), -4, 12),
    "film": (("director", "based_on"), 1, 12),
    "novel": (("author", "label"), 0, 24),
    "album": (("performer", "label"), 1, 15),
    "building": (("architect",), 4, 25),
    "battle": (("commander",), 6, 25),
    "festival": (("opening_band",), 1, 15),
    "treaty": (("ended",), 0, 3),
}
"""Kind -> (relations whose objects come first, least years after them, spread in years)."""


@lru_cache(maxsize=4)
def world_of(spec: WorldSpec) -> World:
    """The world of a spec, shared by all who ask."""
    return World(spec)
