"""The trials that have ended as an Optuna journal that optuna-dashboard opens. Nothing is ever read back from it."""

import json
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from search.records import Row, SearchRecords
from search.space import Space
from search.study import study_directions, to_optuna

JOURNAL = "optuna.log"


class OptunaMirror:
    """Adds each trial that ends to the journal, once."""

    def __init__(self, records: SearchRecords, space: Space) -> None:
        """Opens the journal, or makes it anew from the records where it is damaged or disagrees with them."""
        self._records = records
        self._space = space
        path = records.folder / JOURNAL
        path.with_name(f"{JOURNAL}.lock").unlink(missing_ok=True)  # of a process that was killed; the folder is ours
        try:
            repair_tail(path)
            self._study = self._open()
            known = {trial.user_attrs["trial_id"]: trial.user_attrs["status"] for trial in self._study.trials}
            consistent = len(known) == len(self._study.trials) and all(
                i in records.rows and records.rows[i]["status"] == status for i, status in known.items()
            )
        except (ValueError, KeyError, TypeError, AssertionError):
            consistent = False
        if not consistent:
            path.unlink(missing_ok=True)
            self._study = self._open()
            known = {}
        for row in records.ended:
            if row["trial_id"] not in known:
                self.add(row)

    def _open(self) -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(self._records.folder / JOURNAL)))
        names = optuna.get_all_study_names(storage)  # a search that was renamed keeps the study it has
        return optuna.create_study(
            study_name=names[0] if names else self._records.folder.name,
            storage=storage,
            directions=study_directions(self._records),
            load_if_exists=True,
        )

    def add(self, row: Row) -> None:
        self._study.add_trial(to_optuna(row, self._records, self._space))


def repair_tail(path: Path) -> None:
    """Cut a journal off before its first line that a kill has torn: Optuna would append to it and lose both lines."""
    if not path.exists():
        return
    content, whole = path.read_bytes(), 0
    for line in content.splitlines(keepends=True):
        try:
            json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        whole += len(line)
    if whole < len(content):
        with open(path, "r+b") as file:
            file.truncate(whole)
