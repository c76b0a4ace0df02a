"""Makes the figures of a search that answer to the pointer: Optuna's own, which plotly draws in the page.

They show the trials that reached their last epoch; the learning curves also show those that were stopped early. Of a
search with more than 200 trials they show the best 200 that reached it. Deep supervision alone is not in them: it is
another method.
"""

import base64
import gzip
from functools import cache
from typing import TYPE_CHECKING

import pandas as pd

from analysis.figures import BLUE, GREEN, ORANGE, OTHER_COLOURS
from analysis.trials import parameter_columns, rank
from byot.search_files import SearchRecord, is_inside
from search.space import make_distributions

if TYPE_CHECKING:  # importing it takes a second
    from optuna.study import Study

COLOURS = [BLUE, ORANGE, GREEN, *OTHER_COLOURS]
FEWEST_TRIALS, MOST_TRIALS = 4, 200  # at their last epoch; the data of contours grow with the square of the trials


def make_study(search: SearchRecord, trials: pd.DataFrame, curves: pd.DataFrame) -> "Study":
    """Make an Optuna study of the trials in the space, each with its id as a user attribute."""
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [name for name in parameter_columns(trials) if name in search.space]
    space = {name: search.space[name] for name in names}
    distributions = make_distributions(space)
    known = dict(list(curves.set_index("epoch").groupby("trial_id")[search.metric]))
    study = optuna.create_study(direction="maximize" if search.mode == "max" else "minimize")
    for trial in trials.to_dict("records"):
        params = {name: trial[name] for name in names}
        is_whole = trial["status"] == "completed" and pd.notna(trial[search.metric])
        if trial["role"] == "control" or not (is_whole or trial["status"] == "stopped"):
            continue
        if is_inside(space, params):
            curve = known.get(trial["trial_id"])
            added = create_trial(
                state=TrialState.COMPLETE if is_whole else TrialState.PRUNED,
                value=trial[search.metric] if is_whole else None,
                params=params,
                distributions=distributions,
                intermediate_values={} if curve is None else curve.dropna().to_dict(),
                user_attrs={"trial_id": trial["trial_id"]},
            )
            study.add_trial(added)
    return study


def draw_interactive(search: SearchRecord, trials: pd.DataFrame, curves: pd.DataFrame) -> dict[str, str]:
    """Draw each figure, as plotly's JSON, by its name; nothing where too few trials reached their last epoch."""
    from optuna import visualization
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.trial import TrialState

    metric = search.metric
    if len(trials) > MOST_TRIALS:
        trials = trials[trials["trial_id"].isin(rank(trials, metric)["trial_id"].head(MOST_TRIALS))]
    study = make_study(search, trials, curves)
    whole = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len(whole) < FEWEST_TRIALS or len({trial.value for trial in whole}) < 2:
        return {}
    varied = [name for name in whole[0].params if len({trial.params[name] for trial in whole}) > 1]
    figures = {}
    if varied:
        drawn = figures["parallel"] = visualization.plot_parallel_coordinate(study, varied, target_name=metric)
        drawn.update_traces(opacity=0.9, line_width=2, selector={"mode": "lines"})
        drawn.update_layout(plot_bgcolor="#e4e8ec")  # the worst trial is nearly white
    if len(varied) > 1:
        figures["contour"] = visualization.plot_contour(study, varied, target_name=metric)
        fanova = FanovaImportanceEvaluator(seed=0)  # Optuna's default is another
        drawn = figures["importances"] = visualization.plot_param_importances(study, fanova, varied, target_name=metric)
        drawn.update_traces(marker_color=BLUE)
    if any(trial.intermediate_values for trial in study.trials):
        lines = figures["lines"] = visualization.plot_intermediate_values(study)
        measured = [trial for trial in study.trials if trial.intermediate_values]
        for line, trial in zip(lines.data, measured, strict=True):
            line.name = trial.user_attrs["trial_id"]
        lines.update_layout(xaxis_title="epoch", yaxis_title=metric, showlegend=True)
    for figure in figures.values():
        figure.update_layout(title=None, template="plotly_white", colorway=COLOURS, margin={"t": 10, "l": 70, "r": 20})
        for update_axes in (figure.update_xaxes, figure.update_yaxes):
            update_axes({"dtick": 1, "exponentformat": "power"}, selector={"type": "log"})
    return {name: figure.to_json() for name, figure in figures.items()}


@cache
def packed_plotly() -> str:
    """Return plotly's script for browsers, compressed, as a text that a page can hold."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode("ascii")
