"""What passages and questions say of countries, regions, cities, buildings and events."""

from pipeline.core.data.world.relation import Relation

COUNTRY_OF_CITY = Relation(
    "country",
    clauses=("{s} lies in {o}", "{s} belongs to {o}", "{s} is part of {o}"),
    asks=("In which country is {s}?", "Which country does {s} belong to?", "In what country does {s} lie?"),
    sub_query="In which country is {s}?",
    evidence="{s} is in the country of {o}.",
    target="country",
    link="inside",
    phrases=("the country of {s}", "the country where {s} lies", "the country that {s} belongs to"),
    head="country",
    same=("Are {a} and {b} in the same country?", "Do {a} and {b} belong to the same country?"),
)

POPULATION = Relation(
    "population",
    clauses=("{s} has {o} people", "{p} population is {o}", "{s} is home to {o} people"),
    asks=(
        "What is the population of {s}?",
        "How many people live in {s}?",
        "How many people is {s} home to?",
    ),
    sub_query="What is the population of {s}?",
    evidence="{s} has a population of {o}.",
    smaller=("has fewer people", "has the smaller population"),
    larger=("has more people", "has the larger population"),
)

CAPITAL = Relation(
    "capital",
    clauses=("{p} capital is {o}", "{s} is ruled from its capital {o}", "{s} has {o} as its capital"),
    asks=(
        "What is the capital of {s}?",
        "Which city is the capital of {s}?",
        "From which city is {s} ruled?",
    ),
    sub_query="What is the capital of {s}?",
    evidence="The capital of {s} is {o}.",
    target="city",
    link="inside",
    phrases=("the capital of {s}", "the capital city of {s}", "the city from which {s} is ruled"),
    head="capital",
)

LARGEST_CITY = Relation(
    "largest_city",
    clauses=("{p} largest city is {o}", "{s} has {o} as its largest city", "{p} main city is {o}"),
    asks=(
        "What is the largest city of {s}?",
        "Which city is the largest in {s}?",
        "What is the main city of {s}?",
    ),
    sub_query="What is the largest city of {s}?",
    evidence="The largest city of {s} is {o}.",
    target="city",
    link="inside",
    phrases=("the largest city of {s}", "the main city of {s}", "the largest city in {s}"),
    head="largest city",
)

AREA = Relation(
    "area",
    clauses=("{s} covers {o} square miles", "{p} area is {o} square miles", "{s} spans {o} square miles"),
    asks=(
        "What is the area of {s}?",
        "How many square miles does {s} cover?",
        "How large is {s} in square miles?",
    ),
    sub_query="What is the area of {s}?",
    evidence="{s} has an area of {o} square miles.",
    smaller=("is smaller", "covers the smaller area"),
    larger=("is larger", "covers the larger area"),
)

EXPORT = Relation(
    "export",
    clauses=("{s} sells {o} to other countries", "{s} is known for its {o}", "{p} main product is {o}"),
    asks=(
        "What does {s} sell to other countries?",
        "What is {s} known for?",
        "What is the main product of {s}?",
    ),
    sub_query="What does {s} sell to other countries?",
    evidence="{s} sells {o} to other countries.",
    same=(
        "Do {a} and {b} sell the same thing to other countries?",
        "Do {a} and {b} have the same main product?",
    ),
)

MAYOR = Relation(
    "mayor",
    clauses=("{p} mayor is {o}", "{s} is led by mayor {o}", "{s} has {o} as its mayor"),
    asks=("Who is the mayor of {s}?", "Who leads {s} as mayor?", "Which mayor leads {s}?"),
    sub_query="Who is the mayor of {s}?",
    evidence="The mayor of {s} is {o}.",
    target="mayor",
    link="one",
    phrases=("the mayor of {s}", "the person who leads {s} as mayor", "the mayor who leads {s}"),
    head="mayor",
)

SITE = Relation(
    "city",
    clauses=("{s} is in {o}", "{s} stands in {o}", "{p} home is {o}"),
    asks=("Where is {s}?", "In which city is {s}?", "In which city does {s} stand?"),
    sub_query="In which city is {s}?",
    evidence="{s} is in the city of {o}.",
    target="city",
    phrases=("the city of {s}", "the city where {s} stands", "the home city of {s}"),
    head="home city",
    same=("Are {a} and {b} in the same city?", "Do {a} and {b} stand in the same city?"),
)

ARCHITECT = Relation(
    "architect",
    clauses=("{s} was designed by {o}", "{p} architect was {o}", "{s} was drawn by {o}"),
    asks=("Who designed {s}?", "Who was the architect of {s}?", "Which architect drew {s}?"),
    sub_query="Who designed {s}?",
    evidence="{s} was designed by {o}.",
    target="architect",
    phrases=("the architect of {s}", "the person who designed {s}", "the architect who drew {s}"),
    head="architect",
    same=("Did {a} and {b} have the same architect?",),
)

HEIGHT = Relation(
    "height",
    clauses=("{s} is {o} feet high", "{p} height is {o} feet", "{s} rises to {o} feet"),
    asks=("How high is {s}?", "What is the height of {s}?", "How many feet does {s} rise?"),
    sub_query="How high is {s}?",
    evidence="{s} is {o} feet high.",
    smaller=("is lower", "has the smaller height"),
    larger=("is higher", "has the larger height"),
)


def took_place(noun: str, past: str) -> Relation:
    """Where an event took place: a city or a region."""
    return Relation(
        "place",
        clauses=(f"{{s}} was {past} in {{o}}", "{s} took place in {o}", "{p} place was {o}"),
        asks=(
            f"Where was {{s}} {past}?",
            f"In which {noun} did {{s}} take place?",
            f"In which {noun} was {{s}} {past}?",
        ),
        sub_query=f"Where was {{s}} {past}?",
        evidence=f"{{s}} was {past} in {{o}}.",
        target=noun,
        phrases=(
            "the place of {s}",
            f"the {noun} where {{s}} took place",
            f"the {noun} where {{s}} was {past}",
        ),
        head=noun,
        same=(
            f"Were {{a}} and {{b}} {past} in the same {noun}?",
            f"Did {{a}} and {{b}} take place in the same {noun}?",
        ),
    )


def event_year(past: str) -> Relation:
    """When an event took place."""
    return Relation(
        "year",
        clauses=(f"{{s}} was {past} in {{o}}", "{p} year was {o}", "{s} took place in the year {o}"),
        asks=(f"When was {{s}} {past}?", "In which year did {s} take place?", "What was the year of {s}?"),
        sub_query=f"When was {{s}} {past}?",
        evidence=f"{{s}} was {past} in the year {{o}}.",
        smaller=(f"was {past} first", "took place earlier"),
        larger=(f"was {past} last", "took place later"),
        same=("Did {a} and {b} take place in the same year?",),
    )


COMMANDER = Relation(
    "commander",
    clauses=("{s} was won by {o}", "{p} winner was {o}", "{s} was a victory of {o}"),
    asks=("Who won {s}?", "Who was the winner of {s}?", "Which commander was victorious in {s}?"),
    sub_query="Who won {s}?",
    evidence="{s} was won by {o}.",
    target="general",
    link="one",
    phrases=("the winner of {s}", "the commander who won {s}", "the victor of {s}"),
    head="winner",
)

OPENING_BAND = Relation(
    "opening_band",
    clauses=("{s} was first opened by {o}", "{p} first guest was {o}", "{p} first show was played by {o}"),
    asks=(
        "Which band first opened {s}?",
        "Which band was the first guest of {s}?",
        "Who played the first show of {s}?",
    ),
    sub_query="Which band first opened {s}?",
    evidence="{s} was first opened by {o}.",
    target="band",
    phrases=(
        "the band that first opened {s}",
        "the first guest of {s}",
        "the band with the first show of {s}",
    ),
    head="opening band",
)

ENDED = Relation(
    "ended",
    clauses=("{s} was the result of {o}", "{s} followed {o}", "{s} came after {o}"),
    asks=("Which battle led to {s}?", "Which battle did {s} follow?", "After which battle did {s} come?"),
    sub_query="Which battle did {s} follow?",
    evidence="{s} followed {o}.",
    target="battle",
    phrases=("the battle before {s}", "the battle that {s} followed", "the battle that led to {s}"),
    head="battle",
)
