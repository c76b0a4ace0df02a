"""The configuration a search chose: found among the searches on this machine, else the one shipped in results/."""

from pathlib import Path
from typing import Any, NamedTuple

from byot.config import TrainConfig
from byot.system.files import errors_in, read_json
from byot.system.paths import PROJECT_ROOT, absolute_path

CONFIRMATION = "confirmation.json"  # of a search whose best configurations were run again over fresh seeds
SHIPPED_FOLDER = PROJECT_ROOT / "results" / "best"


class SearchedChoice(NamedTuple):
    """Settings a search chose and one sentence on where they come from."""

    settings: dict[str, Any]
    source: str


def find_best(outputs: Path, search: str, model: str | None = None, dataset: str | None = None) -> SearchedChoice:
    """The configuration that the named search confirmed, else its best.

    If `search` is empty, of the newest finished one, for this model and data set where they are given, else the shipped
    one. Raises ValueError where there is none.
    """
    searches = outputs / "searches"
    if search:
        named, folder = absolute_path(search), absolute_path(searches / search)
        if (named / "best.json").is_file():
            folder = named
        if not (folder / "best.json").is_file():
            raise ValueError(f"the search {search} has no best.json: no trial of it has reached its last epoch yet")
        return find_choice(folder, f"the search {folder.name}")
    finished = []
    for record_path in searches.glob("*/search.json"):
        try:
            record = read_json(record_path)
        except ValueError:  # a damaged record is no finished search
            continue
        settings = record.get("config")
        if not isinstance(settings, dict) or record.get("status") != "finished":
            continue
        if not record_path.with_name("best.json").is_file():
            continue
        if all(asked in (None, settings.get(name)) for name, asked in (("model", model), ("dataset", dataset))):
            finished.append((str(record.get("finished_at")), record_path.parent))
    if finished:
        folder = max(finished)[1]
        return find_choice(folder, f"the newest finished search, {folder.name}")
    model, dataset = model or TrainConfig().model, dataset or TrainConfig().dataset
    shipped = SHIPPED_FOLDER / f"{model}-{dataset}.json"
    if shipped.is_file():
        return _read_choice(
            shipped, f"results/best, shipped with the project, as no search of {model} on {dataset} has finished here"
        )
    raise ValueError(
        f"no finished search of {model} on {dataset} is in {searches} and none is shipped: "
        f"run python search/tune.py --model {model} --dataset {dataset} first"
    )


def load_confirmation(folder: Path) -> dict[str, Any] | None:
    """What running the best of a search again over fresh seeds found, None where that was not done.

    Raises ValueError if its record is damaged.
    """
    path = folder / CONFIRMATION
    if not path.is_file():
        return None
    record = read_json(path)
    verdict, arms = record.get("verdict"), record.get("arms")
    if not isinstance(verdict, list) or not verdict or not all(isinstance(sentence, str) for sentence in verdict):
        raise ValueError(f"{path} has no verdict")
    if not isinstance(arms, list) or not all(map(_is_arm, arms)):
        raise ValueError(f"{path} has no arms as a search writes them")
    for name, kinds in (("status", str), ("metric", str), ("choice", str | None), ("num_rounds", int)):
        if not isinstance(record.get(name), kinds):
            raise ValueError(f"{path} has no {name} as a search writes it")
    return record


def _is_arm(arm: Any) -> bool:
    if not isinstance(arm, dict) or not all(isinstance(arm.get(name), str) for name in ("trial_id", "role")):
        return False
    values = arm.get("values")
    return isinstance(values, list) and all(value is None or type(value) in (int, float) for value in values)


def find_choice(folder: Path, source: str) -> SearchedChoice:
    """What was confirmed over fresh seeds, else the best single run."""
    confirmation = load_confirmation(folder)
    if confirmation is not None and confirmation["status"] == "finished" and confirmation.get("choice") is not None:
        how = "confirmed" if confirmation.get("resolved") is True else "not resolved"
        return _read_choice(folder / CONFIRMATION, f"{source}, {how} over {confirmation['num_rounds']} fresh seeds")
    return _read_choice(folder / "best.json", source)


def _read_choice(path: Path, source: str) -> SearchedChoice:
    record = read_json(path)
    settings = record.get("config")
    if not isinstance(settings, dict):
        raise ValueError(f"{path} has no configuration")
    with errors_in(path):
        TrainConfig.from_dict(settings)
    found = record.get("found_with")
    return SearchedChoice(settings, f"{source} ({found})" if found else source)
