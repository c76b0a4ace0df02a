"""The search space: what is tried first, and what a file may change."""

from pathlib import Path

import pytest

from byot.config import TrainConfig
from byot.search_files import Range, settings_of, space_from_dict, space_to_dict
from search.settings import SearchSettings, expected_work, grace_epochs
from search.space import DEFAULT_SPACE, choose_space, first_points, read_point, read_space


def write(folder: Path, text: str) -> Path:
    path = folder / "space.toml"
    path.write_text(text)
    return path


def test_reference_first_then_deep_supervision_as_a_control():
    space = {**DEFAULT_SPACE, "lr": Range(0.01, 0.5, log=True)}
    reference, control = first_points(space, TrainConfig(lr=0.05))
    assert reference == ("reference", {"alpha": 0.1, "temperature": 3.0, "beta": 1e-6, "lr": 0.05})
    assert control == ("control", {"alpha": 0.0, "temperature": 3.0, "beta": 0.0, "lr": 0.05})


def test_file_changes_one_range_adds_another_and_leaves_the_rest(tmp_path):
    path = write(tmp_path, "[alpha]\nlow = 0.2\nhigh = 0.6\n[lr]\nlow = 0.01\nhigh = 1\nlog = true\n")
    space = choose_space(path, fixed=["width"])
    assert space == {**DEFAULT_SPACE, "alpha": Range(0.2, 0.6), "lr": Range(0.01, 1.0, log=True)}
    assert space_from_dict(space_to_dict(space)) == space
    assert list(choose_space(path, fixed=["temperature", "lr"])) == ["alpha", "beta", "lr"], "lr alone starts there"


def test_what_is_fixed_is_fixed_for_all_but_the_controls():
    """The reference's setting and deep supervision alone stay what they are called."""
    base = TrainConfig(alpha=0.7, temperature=5.0)
    space = choose_space(None, fixed=["alpha", "temperature"])
    reference, control = first_points(space, base)
    assert (reference.params, control.params) == ({"beta": 1e-6}, {"beta": 0.0})
    assert settings_of(base, "sampled", {"beta": 1e-4}) == {"alpha": 0.7, "temperature": 5.0, "beta": 1e-4}
    assert settings_of(base, *reference) == {"alpha": 0.1, "temperature": 3.0, "beta": 1e-6}
    assert settings_of(base, *control) == {"alpha": 0.0, "temperature": 3.0, "beta": 0.0}


def test_a_value_outside_its_range_is_placed_at_the_nearer_end():
    bounds = Range(1e-8, 1e-3, log=True)
    assert [bounds.place(value) for value in (0.0, 1e-8, 1e-3, 1.0)] == [0, 0, 1, 1]
    assert bounds.place(bounds.at(0.3)) == pytest.approx(0.3)


def test_a_setting_to_try_has_the_references_values_where_it_says_nothing():
    space = {**DEFAULT_SPACE, "lr": Range(0.01, 0.5, log=True)}
    tried = read_point("alpha=0.3,beta=1e-4", space, TrainConfig(lr=0.05))
    assert tried == ("sampled", {"alpha": 0.3, "temperature": 3.0, "beta": 1e-4, "lr": 0.05})
    for text, words in (
        ("alpha=x", "alpha must be a number, not 'x'"),
        ("weight_decay=0", "'weight_decay' is not searched; alpha, temperature, beta, lr are"),
        ("", "'' is not searched"),
    ):
        with pytest.raises(ValueError, match=f"^--try {text}: {words}"):
            read_point(text, space, TrainConfig())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[width]\nlow = 1\nhigh = 2", "'width'"),
        ("alpha = 3", "alpha"),
        ("[alpha]\nlow = 0", "alpha"),
        ("[alpha]\nlow = 0\nhigh = 1\nstep = 1", "alpha"),
        ("[alpha]\nlow = 0.5\nhigh = 0.5", "below"),
        ("[alpha]\nlow = -1\nhigh = 0.5", "between 0 and 1"),
        ("[temperature]\nlow = 0\nhigh = 2", "above 0"),
        ("[beta]\nlow = 0\nhigh = 1e-3\nlog = true", "above 0"),
        ("[beta]\nlow = 'a'\nhigh = 1", "low must be a number"),
        ("[beta]\nlow = true\nhigh = 1", "low must be a number"),
        ("[beta]\nlow = 1e-8\nhigh = 1\nlog = 'yes'", "log"),
        ("[lr]\nlow = 0\nhigh = 1", "lr"),
        ("[teacher]\nlow = 0\nhigh = 1", "teacher must be one of deepest, ensemble"),
        ("[teacher]\nchoices = ['deepest']", "two values or more"),
        ("[teacher]\nchoices = ['deepest', 'me']", "teacher must be one of deepest, ensemble"),
        ("[label_smoothing]\nchoices = [0.1, 0.1]", "name one value twice"),
        ("[label_smoothing]\nchoices = [0, 1]", "below 1"),
    ],
)
def test_bad_files_are_told_in_one_sentence(tmp_path, text, word):
    with pytest.raises(ValueError, match=word) as caught:
        read_space(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_time_budgets_and_modes():
    times = [SearchSettings(time_budget=t).time_budget_s() for t in (None, "90", "90s", "1.5m", "2h", "1d")]
    assert times == [None, 90, 90, 90, 7200, 86400]
    assert SearchSettings().mode == "max"
    assert SearchSettings(metric=("val_nll",)).mode == "min"


def test_epochs_expected_of_asha():
    assert [grace_epochs(e) for e in (1, 2, 6, 20, 30, 200)] == [1, 2, 2, 2, 3, 20]
    assert [grace_epochs(e, 75 / 200) for e in (1, 2, 6, 27, 200)] == [1, 2, 4, 12, 76]
    assert expected_work(1, 6, 2) == 6
    assert expected_work(5, 6, 6) == 30, "none is stopped"
