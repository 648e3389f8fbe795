"""The kinds of entity, how many there are of each, and the relations they have."""

from dataclasses import dataclass

from pipeline.core.data.world import relations_people as people
from pipeline.core.data.world import relations_places as places
from pipeline.core.data.world import relations_works as works
from pipeline.core.data.world.relation import PERSON, Relation, founded


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of entity."""

    name: str
    per_hundred: int
    """Entities of this kind per 100 passages."""
    noun: str
    relations: tuple[Relation, ...]
    family: str = ""


def _role(name: str, per_hundred: int, noun: str, *more: Relation) -> Kind:
    return Kind(name, per_hundred, noun, people.LIFE + more, PERSON)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        _role("mayor", 8, "politician"),
        _role("entrepreneur", 5, "trader"),
        _role("professor", 3, "professor"),
        _role("singer", 4, "singer"),
        _role("coach", 2, "coach"),
        _role("director", 5, "film director"),
        _role("author", 4, "writer"),
        _role("architect", 2, "architect"),
        _role("general", 2, "general", people.ARMY),
        _role("actor", 4, "actor"),
        _role("engineer", 4, "engineer", people.EMPLOYER),
        _role("scientist", 4, "chemist", people.EMPLOYER),
        Kind("country", 1, "country", (places.CAPITAL, places.POPULATION, places.EXPORT, founded("founded"))),
        Kind("region", 3, "region", (places.COUNTRY_OF_CITY, places.LARGEST_CITY, places.AREA)),
        Kind(
            "city", 8, "city", (places.COUNTRY_OF_CITY, places.MAYOR, places.POPULATION, founded("founded"))
        ),
        Kind(
            "company", 5, "company", (works.FOUNDER, works.HEADQUARTERS, works.INDUSTRY, founded("started"))
        ),
        Kind("university", 3, "university", (works.RECTOR, places.SITE, works.STUDENTS, founded("founded"))),
        Kind("band", 4, "band", (works.LEAD_SINGER, works.ORIGIN, works.GENRE, founded("formed"))),
        Kind("club", 2, "club", (works.COACH, works.HEADQUARTERS, works.SPORT, founded("founded"))),
        Kind("film", 8, "film", (works.DIRECTOR, works.STAR, works.BASED_ON, works.released("released"))),
        Kind("novel", 6, "novel", (works.AUTHOR, works.SETTING, works.LABEL, works.released("published"))),
        Kind("album", 5, "album", (works.PERFORMER, works.LABEL, works.released("released"))),
        Kind("building", 3, "building", (places.ARCHITECT, places.SITE, places.HEIGHT, founded("built"))),
        Kind(
            "battle",
            2,
            "battle",
            (places.COMMANDER, places.took_place("region", "fought"), places.event_year("fought")),
        ),
        Kind(
            "festival",
            2,
            "festival",
            (
                places.OPENING_BAND,
                places.took_place("city", "held"),
                founded("started"),
            ),
        ),
        Kind(
            "treaty",
            1,
            "treaty",
            (places.ENDED, places.took_place("city", "signed"), places.event_year("signed")),
        ),
    )
}
