"""What passages and questions say of people."""

from pipeline.core.data.world.relation import PERSON, Relation

BIRTH_PLACE = Relation(
    "birth_place",
    clauses=("{s} was born in {o}", "{s} came from {o}", "{p} birthplace was {o}"),
    asks=("Where was {s} born?", "In which city was {s} born?", "Which city did {s} come from?"),
    sub_query="Where was {s} born?",
    evidence="{s} was born in {o}.",
    target="city",
    phrases=("the birthplace of {s}", "the city where {s} was born", "the city that {s} came from"),
    head="birthplace",
    same=("Were {a} and {b} born in the same city?", "Did {a} and {b} come from the same city?"),
)

BIRTH_YEAR = Relation(
    "birth_year",
    clauses=("{s} was born in {o}", "{p} year of birth was {o}", "{p} birth was in {o}"),
    asks=("When was {s} born?", "In which year was {s} born?", "What is the birth year of {s}?"),
    sub_query="When was {s} born?",
    evidence="{s} was born in the year {o}.",
    smaller=("was born first", "was born earlier"),
    larger=("was born later", "was born last"),
    same=("Were {a} and {b} born in the same year?",),
)

DEATH_YEAR = Relation(
    "death_year",
    clauses=("{s} died in {o}", "{p} death came in {o}", "{s} lived until {o}"),
    asks=("When did {s} die?", "In which year did {s} die?", "Until which year did {s} live?"),
    sub_query="When did {s} die?",
    evidence="{s} died in {o}.",
    smaller=("died first", "died earlier"),
    larger=("died later", "lived until a later year"),
)

OCCUPATION = Relation(
    "occupation",
    clauses=(),
    asks=(
        "What was the occupation of {s}?",
        "What was the profession of {s}?",
        "What did {s} do for a living?",
    ),
    sub_query="What was the occupation of {s}?",
    evidence="{s} was a {o}.",
    same=("Did {a} and {b} have the same occupation?", "Did {a} and {b} share a profession?"),
)

EDUCATED_AT = Relation(
    "educated_at",
    clauses=("{s} studied at {o}", "{s} was a student at {o}", "{s} took a degree at {o}"),
    asks=(
        "Where did {s} study?",
        "Which school did {s} attend?",
        "At which university did {s} take a degree?",
    ),
    sub_query="Where did {s} study?",
    evidence="{s} studied at {o}.",
    target="university",
    phrases=(
        "the university where {s} studied",
        "the school that {s} attended",
        "the university attended by {s}",
    ),
    head="university",
    same=("Did {a} and {b} study at the same university?", "Did {a} and {b} attend the same school?"),
)

SPOUSE = Relation(
    "spouse",
    clauses=("{s} was married to {o}", "{s} married {o}", "{p} partner in marriage was {o}"),
    asks=("Who was {s} married to?", "Who was the spouse of {s}?", "Whom did {s} marry?"),
    sub_query="Who was the spouse of {s}?",
    evidence="{s} was married to {o}.",
    target=PERSON,
    link="inside",
    phrases=("the spouse of {s}", "the person married to {s}", "the partner of {s}"),
    head="spouse",
)

EMPLOYER = Relation(
    "employer",
    clauses=("{s} worked for {o}", "{p} employer was {o}", "{s} had a job at {o}"),
    asks=("Who did {s} work for?", "Which company employed {s}?", "What was the employer of {s}?"),
    sub_query="Who did {s} work for?",
    evidence="{s} worked for {o}.",
    target="company",
    phrases=("the employer of {s}", "the company that employed {s}", "the company where {s} had a job"),
    head="employer",
    same=("Did {a} and {b} work for the same company?", "Did {a} and {b} have the same employer?"),
)

ARMY = Relation(
    "army",
    clauses=("{s} served in the army of {o}", "{s} led troops for {o}", "{p} army was that of {o}"),
    asks=(
        "Which country did {s} serve?",
        "In the army of which country did {s} serve?",
        "For whom did {s} lead troops?",
    ),
    sub_query="Which country did {s} serve?",
    evidence="{s} served the country of {o}.",
    target="country",
    phrases=(
        "the country that {s} served",
        "the country for which {s} led troops",
        "the country served by {s}",
    ),
    head="country",
    same=("Did {a} and {b} serve the same country?",),
)

LIFE = (BIRTH_PLACE, BIRTH_YEAR, OCCUPATION, EDUCATED_AT, SPOUSE, DEATH_YEAR)
