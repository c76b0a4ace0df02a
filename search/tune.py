"""Search alpha, temperature and beta of self distillation with Optuna on Ray Tune.

  python search/tune.py --model resnet18                    on CIFAR-100, on every GPU there is
  python search/tune.py --model resnet18 --dataset digits --width 16 --epochs 20
  python search/tune.py --model resnet18 --resume           go on after a stop or a crash

The search sees the training images only: a tenth of them, stratified, is held out to compare trials. The setting of
the reference implementation is always tried first and deep supervision alone (alpha = beta = 0) second.
Everything is left in outputs/searches/NAME.
"""

import argparse
from datetime import datetime
from pathlib import Path

from byot.config import TrainConfig, absolute_path, check_name, check_writable, outputs_folder
from byot.files import read_json
from byot.flags import Parser, add_settings, flag_name, given_settings, one_sentence_errors
from search.settings import SearchSettings
from search.space import DEFAULT_SPACE, Space, read_space, space_from_dict, space_to_dict

SEARCHED = ("alpha", "temperature", "beta")
VAL_FRACTION = 0.1


def build_parser() -> Parser:
    parser = Parser(prog="tune.py", description=__doc__)
    parser.add_argument("--name", help="folder of the search (default: made from model, data set and time)")
    parser.add_argument("--resume", action="store_true", help="go on with the named search, else the newest unfinished")
    parser.add_argument(
        "--space",
        type=Path,
        metavar="FILE",
        help="TOML file: a table with low, high and log for each of alpha, temperature, beta, lr, weight_decay",
    )
    parser.add_argument("--address", help="address of a running Ray cluster, or auto (default: this machine alone)")
    parser.add_argument("--outputs", metavar="DIR", help="where runs and searches are kept (default: outputs/)")
    parser.add_argument("--storage-path", metavar="DIR", help="where this search is kept (default: OUTPUTS/searches)")
    add_settings(parser, SearchSettings)
    add_settings(parser, TrainConfig, omit=SEARCHED, defaults={"val_fraction": VAL_FRACTION})
    return parser


def plan_new(arguments: argparse.Namespace, searches: Path) -> tuple[Path, TrainConfig, SearchSettings, Space]:
    """The folder, the trials' settings, the search's settings and the space of a search that is to start."""
    given = given_settings(arguments, TrainConfig)
    base = TrainConfig(**{"val_fraction": VAL_FRACTION, **given})
    if base.val_fraction == 0:
        raise ValueError("val_fraction must be above 0 in a search: trials are compared on the images held out")
    if base.data_dir:
        base = base.with_settings(data_dir=str(absolute_path(base.data_dir)))
    settings = SearchSettings(**given_settings(arguments, SearchSettings))
    space = read_space(absolute_path(arguments.space)) if arguments.space else DEFAULT_SPACE
    default_name = f"{base.model}-w{base.width}-{base.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = searches / check_name(arguments.name or default_name)
    if folder.exists():
        raise ValueError(f"{folder} exists already: go on with it by --resume, or choose another --name")
    return folder, base, settings, space


def plan_resumed(arguments: argparse.Namespace, searches: Path) -> tuple[Path, TrainConfig, SearchSettings, Space]:
    """The same of a search that is to go on: as recorded, and no flag may say otherwise but where it runs."""
    given = given_settings(arguments, TrainConfig)
    folder = _find_unfinished(searches, arguments.name, given)
    search = read_json(folder / "search.json")
    base = TrainConfig.from_dict(search["config"])
    recorded = {**base.to_dict(), **search["settings"], "space": search["space"]}
    asked = {**given, **given_settings(arguments, SearchSettings)}
    if arguments.space:
        asked["space"] = space_to_dict(read_space(absolute_path(arguments.space)))
    free = ("data_dir", "device", "time_budget")
    changed = [name for name, value in asked.items() if name not in free and value != recorded[name]]
    if changed:
        said = ", ".join(f"{flag_name(name)} {recorded[name]}" for name in changed)
        raise ValueError(f"the search {folder.name} was started with {said} and can only go on so")
    if "data_dir" in given:
        base = base.with_settings(data_dir=str(absolute_path(given["data_dir"])))
    settings = SearchSettings(**{**search["settings"], "time_budget": asked.get("time_budget")})
    return folder, base, settings, space_from_dict(search["space"])


def _find_unfinished(searches: Path, name: str | None, given: dict[str, object]) -> Path:
    if name is not None:
        if not (searches / name / "search.json").is_file():
            raise ValueError(f"there is no search {name} in {searches}")
        return searches / name
    found = []
    for path in searches.glob("*/search.json"):
        search = read_json(path)
        same = all(search["config"][k] == given[k] for k in ("model", "dataset") if k in given)
        if search["status"] != "finished" and same:
            found.append((search["started_at"], path.parent))
    if not found:
        raise ValueError(f"no unfinished search is in {searches}; name one with --name, or start one without --resume")
    return max(found)[1]


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("tune.py"):
        if arguments.storage_path and "://" in arguments.storage_path:
            raise ValueError("--storage-path must be a folder (on a cluster one that every node shares), not a URL")
        searches = outputs_folder(arguments.outputs) / "searches"
        if arguments.storage_path:
            searches = check_writable(Path(arguments.storage_path))
        plan = plan_resumed if arguments.resume else plan_new
        folder, base, settings, space = plan(arguments, searches)

        from search.cluster import Share, share_machine
        from search.driver import load_search_data, run_search

        # A cluster's resources are known only once Ray has connected to it.
        asked = Share(settings.cpus_per_trial, settings.gpus_per_trial, settings.max_concurrent)
        slots = share_machine(asked, base.device) if arguments.address is None else None
        data = load_search_data(base)
    raise SystemExit(
        run_search(
            folder, base, settings, space, data, slots or asked, address=arguments.address, resume=arguments.resume
        )
    )


if __name__ == "__main__":
    main()
