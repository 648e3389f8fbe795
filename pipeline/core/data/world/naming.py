"""Which name each entity bears: unique in its world, with look-alikes on purpose.

Four people share a surname and many a first name; three works share a title word; companies, universities and
other things told apart by a second word ("Velmar Tower", "Velmar Motors") share their first.
"""

from pipeline.core.data.world.names import NameForge, Permutation, mix
from pipeline.core.data.world.relation import PERSON
from pipeline.core.data.world.schema import KINDS
from pipeline.core.data.world.spec import WorldSpec

_SHARED_SURNAME = 4
_SHARED_TITLE_WORD = 3
_SHARED_FIRST_WORD = 2
_MAX_FIRST_NAMES = 2_000
_PERSON_KINDS = tuple(kind.name for kind in KINDS.values() if kind.family == PERSON)
_WORK_KINDS = ("film", "novel", "album")
_TITLE_NOUNS = (
    "Crown", "Garden", "Harp", "House", "Island", "Lamp", "Letter", "Mirror", "Moon", "Night", "Road",
    "River", "Rose", "Season", "Shadow", "Song", "Stone", "Storm", "Summer", "Sword", "Window", "Winter",
)  # fmt: skip
_TITLES = tuple(form.replace("*", noun) for form in ("* of {}", "{} *") for noun in _TITLE_NOUNS)
_FORMS: dict[str, tuple[str, ...]] = {
    "country": ("{}",),
    "city": ("{}",),
    "region": ("{} Valley", "{} Hills", "{} Coast", "{} Plain"),
    "company": ("{} Motors", "{} Foods", "{} Steel", "{} Works", "{} Trading", "{} Brothers"),
    "university": ("the University of {}", "{} College", "{} Academy"),
    "band": ("{} Owls", "{} Wolves", "{} Ravens", "{} Quartet", "{} Echo"),
    "club": ("{} United", "{} Rovers", "{} Athletic"),
    "building": ("{} Tower", "{} Hall", "{} Palace", "{} Library"),
    "battle": ("the Battle of {}", "the Siege of {}"),
    "festival": ("{} Festival", "{} Fair"),
    "treaty": ("the Treaty of {}", "the Peace of {}"),
}


class Naming:
    """Names of all entities of one world, by kind and number."""

    def __init__(self, spec: WorldSpec, key: int) -> None:
        self._key = key
        counts = {name: kind.per_hundred * spec.units for name, kind in KINDS.items()}
        self._person_offset, num_people = _stack(_PERSON_KINDS, counts)
        self._work_offset, num_works = _stack(_WORK_KINDS, counts)
        self._person_order = Permutation(num_people, mix(key ^ 1))
        self._work_order = Permutation(num_works, mix(key ^ 2))
        self._orders = {
            kind: Permutation(counts[kind], mix(key ^ (3 + place))) for place, kind in enumerate(_FORMS)
        }
        self._num_first_names = min(_MAX_FIRST_NAMES, max(2 * _SHARED_SURNAME, num_people // 8))
        widest = max(counts[kind] for kind, forms in _FORMS.items() if len(forms) > 1)
        word_ranges = {
            "surname": num_people // _SHARED_SURNAME + 1,
            "first name": self._num_first_names,
            "city": counts["city"],
            "country": counts["country"],
            "work": num_works // _SHARED_TITLE_WORD + 1,
            "other": widest // _SHARED_FIRST_WORD + 1,
        }
        self._first_word, num_words = _stack(tuple(word_ranges), word_ranges)
        self._word = NameForge(key, spec.partition, num_words).word

    def reference(self, kind: str, number: int) -> str:
        """The name as it stands in a sentence, with an article where English wants one."""
        if kind in self._person_offset:
            return self._person(self._person_offset[kind] + number)
        if kind in self._work_offset:
            slot = self._work_order(self._work_offset[kind] + number)
            return self._with_second_word("work", _TITLES, slot, _SHARED_TITLE_WORD)
        forms = _FORMS[kind]
        slot = self._orders[kind](number)
        if len(forms) == 1:
            return self._word(self._first_word[kind] + slot)
        return self._with_second_word("other", forms, slot, _SHARED_FIRST_WORD)

    def _with_second_word(self, family: str, forms: tuple[str, ...], slot: int, share: int) -> str:
        block, member = divmod(slot, share)
        form = forms[(mix(self._key ^ block) + member) % len(forms)]
        return form.format(self._word(self._first_word[family] + block))

    def _person(self, person: int) -> str:
        block, member = divmod(self._person_order(person), _SHARED_SURNAME)
        stride = self._num_first_names // _SHARED_SURNAME
        first = (mix(self._key ^ block) + member * stride) % self._num_first_names
        first_name = self._word(self._first_word["first name"] + first)
        return f"{first_name} {self._word(self._first_word['surname'] + block)}"


def _stack(names: tuple[str, ...], sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Consecutive ranges of these sizes: where each begins, and where the last ends."""
    offsets: dict[str, int] = {}
    total = 0
    for name in names:
        offsets[name] = total
        total += sizes[name]
    return offsets, total
