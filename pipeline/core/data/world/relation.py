"""What a relation is: its object, and every fixed phrase in which passages and questions speak of it.

In templates `{s}` is the subject, `{p}` its possessive ("its", "Mara Velin's") and `{o}` the object.
`sub_query` and `evidence` are the one canonical wording of a relation; `clauses` (passages), `asks`
(questions) and `phrases` (nested parts of questions: "the director of X") vary.
"""

from dataclasses import dataclass

PERSON = "person"
"""The family of all kinds of people; as a target, "a person of the subject's own kind"."""


@dataclass(frozen=True, slots=True, eq=False)
class Relation:
    """One functional relation: a subject has at most one object. Compared by identity."""

    name: str
    clauses: tuple[str, ...]
    asks: tuple[str, ...]
    sub_query: str
    evidence: str
    target: str = ""
    """Kind of the object; empty if the object is a literal."""
    link: str = "many"
    """How subjects map to objects: "one" (equal index), "many" (keyed, even), "inside" (see `World`)."""
    phrases: tuple[str, ...] = ()
    """Noun phrases for the object; entity relations only."""
    head: str = ""
    """The bare noun for the object ("director")."""
    smaller: tuple[str, ...] = ()
    """Comparison predicates won by the smaller number ("was founded first"); numeric relations only."""
    larger: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    """Yes/no templates over `{a}` and `{b}`: do they share the object?"""


def founded(verb: str) -> Relation:
    """When something began to exist."""
    return Relation(
        "founded_year",
        clauses=(f"{{s}} was {verb} in {{o}}", "{s} dates from {o}", "{p} first year was {o}"),
        asks=(
            f"When was {{s}} {verb}?",
            f"In which year was {{s}} {verb}?",
            "What year saw the start of {s}?",
        ),
        sub_query=f"When was {{s}} {verb}?",
        evidence=f"{{s}} was {verb} in {{o}}.",
        smaller=(f"was {verb} first", "is older"),
        larger=(f"was {verb} later", "is younger"),
        same=(f"Were {{a}} and {{b}} {verb} in the same year?",),
    )
