"""Score predictions that somebody has made, in a data set's own format: no model, no search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core.config import Config
from pipeline.core.data.questions import read_questions
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.evaluation import evaluate_answers
from pipeline.core.records import Question
from pipeline.core.run import Json, write_json
from pipeline.core.scoring.files import read_predictions
from pipeline.core.scoring.prediction import Prediction
from pipeline.core.scoring.protocols import score_predictions, what_is_missing
from pipeline.methods import load


def evaluate_predictions(
    predictions: Path | None,
    gold: Sequence[Path],
    overrides: Sequence[str],
    *,
    of_a_model: Sequence[object],
    out: Path | None,
    display: Display,
) -> Json:
    """Scores of a file of predictions by `evaluation.protocol`, against files of questions.

    Args:
        of_a_model: what was given of a model as well; there must be nothing.

    Returns:
        `{"predictions": file, "gold": [file, ...], "all": scores of the answers, "protocol": its own scores}`.

    Raises:
        UserError, RetrieverError: one of both is not given, or bad input.
    """
    if predictions is None or not gold:
        raise UserError(
            "--predictions FILE and --gold FILE go together: what was answered, and the questions' own file"
        )
    if any(given is not None for given in of_a_model):
        raise UserError("--predictions are scored without a model: leave out --config, --run and --model")
    config = load(None, overrides)
    questions = read_questions(gold, with_evidence=True)
    rules = config.evaluation
    found = read_predictions(rules.protocol, predictions, questions)
    _say_how_many(questions, found, display)
    answers = {id_: one.answer for id_, one in found.items() if one.answer is not None}
    result = {
        "predictions": str(predictions),
        "gold": [str(path) for path in gold],
        "all": evaluate_answers(questions, answers, rules.bootstrap_samples, config.seed, rules.protocol),
        "protocol": protocol_scores(config, questions, found, display),
    }
    if out is not None:
        write_json(out, result)
    return result


def _say_how_many(questions: Sequence[Question], found: Mapping[str, Prediction], display: Display) -> None:
    asked = {question.id for question in questions}
    if without := len(asked - found.keys()):
        display.line(
            f"{len(asked) - without} of {len(asked)} questions have a prediction; the others count as wrong"
        )
    if others := len(found.keys() - asked):
        display.line(f"{others} predictions are of other questions, and are not looked at")


def protocol_scores(
    config: Config, questions: Sequence[Question], predictions: Mapping[str, Prediction], display: Display
) -> Json:
    """The scores of the configuration's protocol; says so where the questions lack what its script looks at."""
    protocol = config.evaluation.protocol
    if missing := what_is_missing(protocol, questions):
        display.line(
            f"{protocol}: no question has {missing}, which the official script looks at; the set's own files have it"
        )
    return score_predictions(
        protocol, questions, predictions, config.evaluation.bootstrap_samples, config.seed
    )
