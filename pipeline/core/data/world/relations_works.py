"""What passages and questions say of organisations, films, novels and albums."""

from pipeline.core.data.world.relation import Relation

FOUNDER = Relation(
    "founder",
    clauses=("{s} was founded by {o}", "{p} founder was {o}", "{s} was set up by {o}"),
    asks=("Who founded {s}?", "Who was the founder of {s}?", "Who set up {s}?"),
    sub_query="Who founded {s}?",
    evidence="{s} was founded by {o}.",
    target="entrepreneur",
    link="one",
    phrases=("the founder of {s}", "the person who founded {s}", "the person who set up {s}"),
    head="founder",
)

HEADQUARTERS = Relation(
    "city",
    clauses=("{s} has its headquarters in {o}", "{s} is based in {o}", "{p} main office is in {o}"),
    asks=(
        "Where is {s} based?",
        "In which city are the headquarters of {s}?",
        "Where is the main office of {s}?",
    ),
    sub_query="Where is {s} based?",
    evidence="{s} is based in {o}.",
    target="city",
    phrases=("the home city of {s}", "the city where {s} is based", "the city with the headquarters of {s}"),
    head="home city",
    same=("Are {a} and {b} based in the same city?",),
)

INDUSTRY = Relation(
    "industry",
    clauses=("{s} makes {o}", "{s} sells {o}", "{p} main product is {o}"),
    asks=("What does {s} make?", "What does {s} sell?", "What is the main product of {s}?"),
    sub_query="What does {s} make?",
    evidence="{s} makes {o}.",
    same=("Do {a} and {b} make the same product?", "Do {a} and {b} sell the same thing?"),
)

RECTOR = Relation(
    "rector",
    clauses=("{p} rector is {o}", "{s} is headed by {o}", "{s} has {o} as its rector"),
    asks=("Who is the rector of {s}?", "Who heads {s}?", "Which rector heads {s}?"),
    sub_query="Who is the rector of {s}?",
    evidence="The rector of {s} is {o}.",
    target="professor",
    link="one",
    phrases=("the rector of {s}", "the person who heads {s}", "the head of {s}"),
    head="rector",
)

STUDENTS = Relation(
    "students",
    clauses=("{s} has {o} students", "{s} teaches {o} students", "{p} student body counts {o}"),
    asks=(
        "How many students does {s} have?",
        "How many students does {s} teach?",
        "What is the number of students of {s}?",
    ),
    sub_query="How many students does {s} have?",
    evidence="{s} has {o} students.",
    smaller=("has fewer students", "teaches fewer students"),
    larger=("has more students", "teaches more students"),
)

LEAD_SINGER = Relation(
    "lead_singer",
    clauses=("{p} lead singer was {o}", "{s} was fronted by {o}", "{s} had {o} as its singer"),
    asks=("Who was the lead singer of {s}?", "Who sang for {s}?", "Who fronted {s}?"),
    sub_query="Who was the lead singer of {s}?",
    evidence="The lead singer of {s} was {o}.",
    target="singer",
    link="one",
    phrases=("the lead singer of {s}", "the person who sang for {s}", "the person who fronted {s}"),
    head="lead singer",
)

ORIGIN = Relation(
    "city",
    clauses=("{s} came from {o}", "{s} started in {o}", "{p} home was {o}"),
    asks=("Where did {s} come from?", "In which city did {s} start?", "Which city was the home of {s}?"),
    sub_query="Where did {s} come from?",
    evidence="{s} came from {o}.",
    target="city",
    phrases=("the home city of {s}", "the city where {s} started", "the city that {s} came from"),
    head="home city",
    same=("Did {a} and {b} come from the same city?", "Did {a} and {b} start in the same city?"),
)

GENRE = Relation(
    "genre",
    clauses=("{s} played {o}", "{p} style was {o}", "{s} was known for {o}"),
    asks=("What kind of music did {s} play?", "What was the style of {s}?", "Which music was {s} known for?"),
    sub_query="What kind of music did {s} play?",
    evidence="{s} played {o}.",
    same=("Did {a} and {b} play the same kind of music?",),
)

SPORT = Relation(
    "sport",
    clauses=("{s} plays {o}", "{p} sport is {o}", "{s} is known for {o}"),
    asks=("Which sport does {s} play?", "What is the sport of {s}?", "Which sport is {s} known for?"),
    sub_query="Which sport does {s} play?",
    evidence="{s} plays {o}.",
    same=("Do {a} and {b} play the same sport?",),
)

COACH = Relation(
    "coach",
    clauses=("{p} coach is {o}", "{s} is coached by {o}", "{s} is trained by {o}"),
    asks=("Who coaches {s}?", "Who is the coach of {s}?", "Who trains {s}?"),
    sub_query="Who coaches {s}?",
    evidence="{s} is coached by {o}.",
    target="coach",
    link="one",
    phrases=("the coach of {s}", "the person who coaches {s}", "the person who trains {s}"),
    head="coach",
)

DIRECTOR = Relation(
    "director",
    clauses=("{s} was directed by {o}", "{p} director was {o}", "{s} had {o} as its director"),
    asks=("Who directed {s}?", "Who was the director of {s}?", "Which person directed {s}?"),
    sub_query="Who directed {s}?",
    evidence="{s} was directed by {o}.",
    target="director",
    phrases=("the director of {s}", "the person who directed {s}", "the director who made {s}"),
    head="director",
    same=("Did {a} and {b} have the same director?", "Were {a} and {b} directed by the same person?"),
)

STAR = Relation(
    "star",
    clauses=("{p} star was {o}", "{s} starred {o}", "{s} had {o} in the main role"),
    asks=("Who starred in {s}?", "Who was the star of {s}?", "Who played the main role in {s}?"),
    sub_query="Who starred in {s}?",
    evidence="{s} starred {o}.",
    target="actor",
    phrases=("the star of {s}", "the actor who starred in {s}", "the actor with the main role in {s}"),
    head="star",
    same=("Did {a} and {b} have the same star?",),
)

BASED_ON = Relation(
    "based_on",
    clauses=(
        "{s} was based on the novel {o}",
        "{p} story came from the novel {o}",
        "{s} was adapted from the novel {o}",
    ),
    asks=(
        "Which novel was {s} based on?",
        "From which novel was {s} adapted?",
        "Which novel gave {s} its story?",
    ),
    sub_query="Which novel was {s} based on?",
    evidence="{s} was based on the novel {o}.",
    target="novel",
    link="one",
    phrases=(
        "the novel behind {s}",
        "the novel that {s} was based on",
        "the novel from which {s} was adapted",
    ),
    head="novel",
)


def released(verb: str) -> Relation:
    """When a work came out."""
    return Relation(
        "release_year",
        clauses=(f"{{s}} was {verb} in {{o}}", "{s} came out in {o}", f"{{s}} was first {verb} in {{o}}"),
        asks=(
            f"When was {{s}} {verb}?",
            f"In which year was {{s}} {verb}?",
            "In what year did {s} come out?",
        ),
        sub_query=f"When was {{s}} {verb}?",
        evidence=f"{{s}} was {verb} in {{o}}.",
        smaller=("came out first", f"was {verb} earlier"),
        larger=("came out later", f"was {verb} last"),
        same=("Did {a} and {b} come out in the same year?",),
    )


AUTHOR = Relation(
    "author",
    clauses=("{s} was written by {o}", "{p} author was {o}", "{s} was the work of {o}"),
    asks=("Who wrote {s}?", "Who was the author of {s}?", "Which writer was behind {s}?"),
    sub_query="Who wrote {s}?",
    evidence="{s} was written by {o}.",
    target="author",
    phrases=("the author of {s}", "the person who wrote {s}", "the writer of {s}"),
    head="author",
    same=("Did {a} and {b} have the same author?", "Were {a} and {b} written by the same person?"),
)

SETTING = Relation(
    "setting",
    clauses=("{s} was set in {o}", "{p} story took place in {o}", "{p} scene was {o}"),
    asks=(
        "Where was {s} set?",
        "In which city was {s} set?",
        "In which city did the story of {s} take place?",
    ),
    sub_query="Where was {s} set?",
    evidence="{s} was set in {o}.",
    target="city",
    phrases=(
        "the city where {s} was set",
        "the setting of {s}",
        "the city where the story of {s} took place",
    ),
    head="setting",
    same=("Were {a} and {b} set in the same city?",),
)

PERFORMER = Relation(
    "performer",
    clauses=("{s} was recorded by {o}", "{s} was performed by {o}", "{p} band was {o}"),
    asks=("Who recorded {s}?", "Which band performed {s}?", "Which band made {s}?"),
    sub_query="Who performed {s}?",
    evidence="{s} was performed by {o}.",
    target="band",
    phrases=("the band that recorded {s}", "the performer of {s}", "the band that made {s}"),
    head="band",
    same=("Were {a} and {b} recorded by the same band?", "Did the same band make {a} and {b}?"),
)

LABEL = Relation(
    "label",
    clauses=("{s} was sold by {o}", "{s} was brought out by {o}", "{p} publisher was {o}"),
    asks=("Which company sold {s}?", "Which company brought out {s}?", "Who was the publisher of {s}?"),
    sub_query="Which company brought out {s}?",
    evidence="{s} was brought out by {o}.",
    target="company",
    phrases=("the publisher of {s}", "the company that sold {s}", "the company that brought out {s}"),
    head="publisher",
    same=("Did {a} and {b} have the same publisher?",),
)
