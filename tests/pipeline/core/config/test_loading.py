"""From a YAML file and overrides to a configuration, and what a person is told who made a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.config import Config
from pipeline.core.config.loading import all_keys, load_config
from pipeline.core.errors import UserError


def load(*overrides: str) -> Config:
    return load_config(None, overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides)
    return str(caught.value)


def written(directory: Path, text: str) -> Path:
    path = directory / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_file_and_overrides_come_the_defaults() -> None:
    assert load() == Config()


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    path = written(tmp_path, "rollout: {samples: 2, workers: 3}\nseed: 5\n")
    config = load_config(path, ["rollout.samples=8", "seed=1", "seed=2"])
    assert (config.rollout.samples, config.rollout.workers, config.seed) == (8, 3, 2)


def several(directory: Path, *texts: str) -> list[Path]:
    paths = [directory / f"{number}.yaml" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_of_several_files_the_later_ones_win_key_by_key(tmp_path: Path) -> None:
    paths = several(
        tmp_path,
        "rollout: {samples: 2, workers: 3}\nlearner: {lora: {rank: 4, dropout: 0.1}}\nseed: 5",
        "rollout: {samples: 8}\nlearner: {lora: {rank: 2}}\ndata: {train: [a.jsonl, b.jsonl]}",
        "# nothing yet\nrollout:\ndata: {train: c.jsonl}",
    )
    config = load_config(paths, ["seed=6"])
    assert (config.rollout.samples, config.rollout.workers, config.seed) == (8, 3, 6)
    assert config.learner.lora is not None
    assert (config.learner.lora.rank, config.learner.lora.dropout) == (2, 0.1)
    assert config.data.train == ("c.jsonl",)
    assert load_config([]) == Config()
    assert load_config(paths[:1]) == load_config(paths[0])


def test_a_later_file_can_switch_off_what_an_earlier_one_sets(tmp_path: Path) -> None:
    paths = several(tmp_path, "learner: {lora: {rank: 4}}", "learner: {lora: null}")
    assert load_config(paths).learner.lora is None


def test_the_short_form_of_the_weighting_is_one_key_of_its_section(tmp_path: Path) -> None:
    paths = several(
        tmp_path, "weighting: {max_weight: 0.5}", "weighting: posterior", "weighting: {temperature: 2}"
    )
    weighting = load_config(paths).weighting
    assert (weighting.method, weighting.max_weight, weighting.temperature) == ("posterior", 0.5, 2)


@pytest.mark.parametrize("bad", [0, 1])
def test_of_several_files_the_one_with_an_unknown_key_is_named(tmp_path: Path, bad: int) -> None:
    texts = ["rollout: {samples: 2}", "learner: {epochs: 2}"]
    texts[bad] += "\nroolout: {workers: 2}"
    paths = several(tmp_path, *texts)
    with pytest.raises(UserError) as caught:
        load_config(paths)
    assert str(caught.value) == f"{paths[bad]}: unknown configuration key roolout; did you mean rollout?"


def test_an_unknown_key_without_a_value_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown configuration key roolout"):
        load_config(written(tmp_path, "roolout:"))


def test_override_values_are_yaml() -> None:
    config = load(
        "data.train=[a.jsonl, b.jsonl]",
        "data.dev=c.jsonl",
        "em.patience=null",
        "agent.think=false",
        "learner.learning_rate=1e-5",
        "retriever.query_prefix='query: '",
        "agent.tags.think=['[S]', '[/S]']",
    )
    assert config.data.train == ("a.jsonl", "b.jsonl")
    assert config.data.dev == ("c.jsonl",)
    assert config.em.patience is None
    assert config.agent.think is False
    assert config.learner.learning_rate == 1e-5
    assert config.retriever.query_prefix == "query: "
    assert config.agent.tags.think == ("[S]", "[/S]")


def test_values_may_contain_equals_signs_and_dots() -> None:
    assert load("data.root=/data/a=b/v1.2").data.root == "/data/a=b/v1.2"


def test_an_override_without_a_value_is_the_empty_string() -> None:
    assert load("data.root=").data.root == ""


@pytest.mark.parametrize("word", ["yes", "no", "auto"])
def test_words_that_yaml_takes_for_truth_values_can_be_typed_plainly(word: str, tmp_path: Path) -> None:
    assert load(f"cluster.colocate={word}").cluster.colocate == word
    assert load_config(written(tmp_path, f"cluster: {{colocate: {word}}}")).cluster.colocate == word


@pytest.mark.parametrize("override", ["rollout.samples", "=3", " =3", ""])
def test_an_override_that_is_no_assignment_is_refused_with_an_example(override: str) -> None:
    message = refusal(override)
    assert repr(override) in message
    assert "key=value" in message
    assert "rollout.samples=8" in message


def test_an_override_that_is_not_yaml_is_named() -> None:
    message = refusal("data.train=[a, b")
    assert "data.train=[a, b" in message
    assert "not valid YAML" in message


@pytest.mark.parametrize("override", ["seed.value=3", "rollout.samples.most=4", "data.train.first=a"])
def test_a_key_below_a_single_value_is_refused(override: str) -> None:
    assert f"configuration key {override.rsplit('.', 1)[0]}: " in refusal(override)


def test_a_key_below_a_value_that_the_file_gives_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "rollout: {samples: 2}")
    with pytest.raises(UserError, match="samples is a single value here"):
        load_config(path, ["rollout.samples.most=4"])


@pytest.mark.parametrize("key", [key for key in all_keys(Config) if "." in key])
def test_every_mistyped_key_is_refused_with_the_right_one(key: str) -> None:
    section, _, name = key.rpartition(".")
    mistyped = f"{section}.{name}{name[-1]}"
    message = refusal(f"{mistyped}=1")
    assert f"unknown configuration key {mistyped}; did you mean {section}." in message


def test_a_mistyped_section_is_refused_with_the_right_one() -> None:
    assert refusal("roolout.samples=2") == "unknown configuration key roolout; did you mean rollout?"


def test_a_key_that_lives_in_another_section_is_found_there() -> None:
    assert "did you mean rollout.samples?" in refusal("samples=4")
    assert "did you mean learner.zero_stage?" in refusal("em.zero_stage=3")
    message = refusal("learning_rate=1e-4")
    assert "learner.learning_rate" in message
    assert "cold_start.learning_rate" in message


@pytest.mark.parametrize(("initials", "key"), [("learner.lr", "learning_rate"), ("learner.bs", "batch_size")])
def test_initials_are_understood(initials: str, key: str) -> None:
    assert refusal(f"{initials}=1").endswith(f"did you mean learner.{key}?")


def test_a_key_like_no_other_is_refused_with_the_known_ones() -> None:
    message = refusal("tracking.xyzzy=1")
    assert "unknown configuration key tracking.xyzzy" in message
    for known in ("tensorboard", "wandb_project", "mlflow_experiment"):
        assert known in message


@pytest.mark.parametrize(
    "text",
    [
        "learner: {lora: {ranks: 4}}",
        "agent: {tags: {thinks: [a, b]}}",
        "rollouts: {}",
        "3: x",
        "rollout: {samples: 2}\nem: {iteration: 1}",
    ],
)
def test_unknown_keys_in_a_file_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="unknown configuration key"):
        load_config(written(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.samples=many", "not 'many'"),
        ("rollout.samples=0", "greater than or equal to 1, not 0"),
        ("learner.learning_rate=-1", "greater than 0, not -1"),
        ("learner.zero_stage=4", "not 4"),
        ("weighting.method=best", "'likelihood', 'posterior', 'length_normalised', 'reward' or 'uniform'"),
        ("agent.think=perhaps", "not 'perhaps'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_key_and_value(override: str, expected: str) -> None:
    message = refusal(override)
    assert message.startswith(f"configuration key {override.split('=')[0]}: ")
    assert expected in message


def test_all_wrong_values_are_reported_at_once() -> None:
    message = refusal("rollout.samples=0", "seed=-1")
    assert "configuration key rollout.samples" in message
    assert "configuration key seed" in message


def test_settings_that_do_not_go_together_are_refused_with_their_keys_and_the_way_out() -> None:
    message = refusal("rollout.samples=1", "weighting=posterior")
    assert message.startswith("weighting.method: posterior")
    assert "raise rollout.samples" in message
    message = refusal("learner.offload_parameters=true")
    assert message == "configuration key learner: offload_parameters needs zero_stage: 3"


@pytest.mark.parametrize("overrides", [("weighting=uniform",), ("weighting.method=uniform",)])
def test_a_bare_weighting_is_short_for_its_method(overrides: tuple[str, ...]) -> None:
    assert load(*overrides) == Config.model_validate({"weighting": {"method": "uniform"}})


@pytest.mark.parametrize(
    "overrides",
    [
        ("weighting=posterior", "weighting.temperature=2"),
        ("weighting.temperature=2", "weighting=posterior"),
        ("weighting=uniform", "weighting.temperature=2", "weighting=posterior"),
    ],
)
def test_a_bare_weighting_goes_with_overrides_of_single_keys_in_any_order(overrides: tuple[str, ...]) -> None:
    weighting = load(*overrides).weighting
    assert (weighting.method, weighting.temperature) == ("posterior", 2.0)


def test_a_bare_weighting_in_the_file_goes_with_overrides(tmp_path: Path) -> None:
    weighting = load_config(written(tmp_path, "weighting: posterior"), ["weighting.floor=0.5"]).weighting
    assert (weighting.method, weighting.floor) == ("posterior", 0.5)


def test_a_bare_weighting_keeps_what_the_file_says_about_the_rest(tmp_path: Path) -> None:
    path = written(tmp_path, "weighting: {method: likelihood, max_weight: 0.5}")
    weighting = load_config(path, ["weighting=posterior"]).weighting
    assert (weighting.method, weighting.max_weight) == ("posterior", 0.5)


def test_keys_below_an_optional_section_can_be_set_where_it_was_null(tmp_path: Path) -> None:
    # A run's resolved configuration spells out `lora: null`.
    path = written(tmp_path, "learner: {lora: null}")
    lora = load_config(path, ["learner.lora.rank=4"]).learner.lora
    assert lora is not None
    assert lora.rank == 4
    assert load("learner.lora={}", "learner.lora=null").learner.lora is None


def test_a_section_without_keys_is_the_default_section(tmp_path: Path) -> None:
    path = written(tmp_path, "learner:\n  # epochs: 2\nem: {iterations: 2}\n")
    assert load_config(path) == load("em.iterations=2")
    assert load_config(path, ["learner.epochs=3"]).learner.epochs == 3


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "# nothing yet\n")) == Config()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no configuration file .*missing\.yaml; the shipped ones are in .*configs"
    ):
        load_config(tmp_path / "missing.yaml")


def test_a_shipped_file_that_is_looked_for_elsewhere_is_found_by_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"no configuration file configs/demo\.yaml; there is (/.+)"
    ) as refused:
        load_config(Path("configs/demo.yaml"))
    assert load_config(Path(str(refused.value).rsplit(" ", 1)[-1])).em.iterations == 3


def test_a_file_that_is_not_yaml_is_refused_with_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)config\.yaml is not valid YAML.*line 2"):
        load_config(written(tmp_path, "seed: 1\n  samples: [\n"))


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"seed: 1 # caf\xe9\n")
    with pytest.raises(UserError, match=r"config\.yaml is not UTF-8"):
        load_config(path)


@pytest.mark.parametrize(("text", "found"), [("- a\n- b\n", "list"), ("just words", "str"), ("3", "int")])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(UserError, match=f"must hold sections .* not a {found}"):
        load_config(written(tmp_path, text))


def test_a_path_may_begin_at_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = load_config(
        None,
        [
            "data.root=~/data",
            "data.corpus=[~/wiki.jsonl, hf:some/wiki]",
            "data.train=~/train.jsonl",
            "model.path=~/model",
            "retriever.index=~/index",
        ],
    )
    assert config.data.root == "/home/ada/data"
    assert config.data.corpus == ("/home/ada/wiki.jsonl", "hf:some/wiki")
    assert config.data.train == ("/home/ada/train.jsonl",)
    assert config.model.path == "/home/ada/model"
    assert config.retriever.index == "/home/ada/index"
