"""Types bad command lines: each is one sentence that names what is wrong, exit code 2, and nothing is written.

A table has, by program, what is typed and a part of the sentence: one line for each kind of check, and one for each
flag that goes through a check of its own. What every setting may be is in tests/test_config.py and tests/test_space.py.
In the current folder lies what tests/faults/place.py puts there.
"""

import os
import shlex
from pathlib import Path

import pytest

import analysis.best
from tests.helpers import assert_one_sentence, picture_of, run_command

pytest_plugins = ["tests.faults.place"]

LONG = "n" * 300  # more than a file system takes for one name
HUGE = "9" * 400  # more than a float holds
NO_SECRET = "tune.py: --storage-path must have no secret in it: credentials come from the environment\n"  # and no more

LINES: dict[str, list[tuple[str, str]]] = {
    "train.py": [
        ("--model vgg16", "--model: invalid choice: 'vgg16'"),
        ("--width 1.5", "--width: invalid int value: '1.5'"),
        ("--lr 0,1", "--lr: invalid float value: '0,1'"),
        ("--precision", "--precision: expected one argument"),
        ("--mod resnet18", "unrecognized arguments: --mod resnet18: did you mean --model?"),  # no abbreviations
        ("--alhpa 3 --bteas=4 --xyzzy", "did you mean --alpha and --beta?\n"),
        ("'--sur\nprise'", r"unrecognized arguments: --sur\nprise"),
        ("'--\x1b[31m'", r"unrecognized arguments: --\x1b[31m"),  # nothing that a terminal obeys
        ("stray", "unrecognized arguments: stray"),
        ("--threads 0", "threads must lie between 1 and 1024, not 0"),
        ("--fresh=yes", "ignored explicit argument 'yes'"),
        (f"--epochs {HUGE}", "epochs must be at most 1000000"),
        (f"--lr {HUGE}", "lr must be a finite number above 0, not inf"),
        ("--teacher ensemble --loss-form plain", "teacher ensemble needs the shallow classifiers"),
        ("--branch lean --loss-form plain", "branch lean is of the shallow classifiers"),
        ("--dataset digits --val-fraction 1e-9", "images holds out none; give more"),
        ("--dataset digits --device cuda", "device cuda is not available here"),
        ("--dataset digits --device cpu --acceleration graph", "acceleration graph needs a CUDA device, not cpu"),
        ("", "cifar100 is not in"),  # no data, and no network to fetch it by
        ("--data-dir 'no\nwhère'", r"no\nwhère does not exist"),
        ("--data-dir file", "file is not a folder"),
        ("--data-dir folder", "neither train*.parquet files nor the folder cifar-100-python"),
        ("--data-dir ~nobody-of-that-name", "a user who is not known here"),
        (f"--data-dir {LONG}", "File name too long"),
        ("--data-dir \udcff", "a path cannot have"),
        ("--dataset digits --outputs file", "file is not a folder"),
        ("--dataset digits --outputs file/below", "file is not a folder"),
        ("--dataset digits --outputs /dev/null/a/b", "/dev/null is not a folder"),
        ("--dataset digits --name ../a", "a name is made of"),
        ("--dataset digits --name 'a\t'", r"not 'a\t'"),
        ("--data-dir nowhere --name mine --fresh", "nowhere does not exist"),  # and nothing is moved aside
        ("--dataset digits --device mps --name mine --fresh", "device mps is not available here"),
        ("--best nowhere", "there is no search nowhere in"),
        ("--best ../done", "there is no search ../done in"),
        ("--best done --alpha 2", "alpha must lie between 0 and 1, not 2"),
        ("--best --model resnet152", "no finished search of resnet152 on cifar100"),
        ("--best --resume folder", "not allowed with argument --best"),
        ("--resume nowhere", "there is no run or checkpoint at"),
        ("--resume folder", "holds no checkpoint that can be read"),
        ("--resume outputs/searches/done/best.json", "best.json is damaged, or was not written by this project"),
        ("--resume /dev/zero", "there is no run or checkpoint at"),
        ("--resume folder --fresh", "--fresh starts a run anew and --resume goes on with one"),
        ("--resume folder --name a", "--name is for a new run"),
        ("--resume checkpoint.pt --alpha 0.5", "alpha 0.1 (asked for: 0.5)"),
        ("--resume checkpoint.pt --model resnet34", "model resnet18 (asked for: resnet34)"),
        ("--resume checkpoint.pt --epochs 0", "epochs must be at least 1"),
    ],
    "evaluate.py": [
        ("", "the following arguments are required: run"),
        ("folder --device tpu", "--device: invalid choice: 'tpu'"),
        ("nowhere", "there is no run or checkpoint at"),
        ("outputs", "holds no checkpoint that can be read"),
        ("file", "file is damaged, or was not written by this project"),
        ("checkpoint.pt --device mps", "device mps is not available here"),
        ("cifar.pt --data-dir folder --device cpu", "neither test*.parquet"),
    ],
    "predict.py": [
        ("checkpoint.pt file nowhere", "there is no image or folder at nowhere"),
        ("checkpoint.pt folder", "folder has no image: no name in it ends in .png, .jpg, .jpeg, .webp"),
        ("nowhere file", "there is no run or checkpoint at"),
        ("checkpoint.pt file --top 0", "--top must lie between 1 and 10, not 0"),
        ("checkpoint.pt file --top 11", "--top must lie between 1 and 10, not 11"),
        ("checkpoint.pt file --device mps", "device mps is not available here"),
    ],
    "export.py": [
        ("checkpoint.pt", "the following arguments are required: --format"),
        ("nowhere --format torch", "there is no run or checkpoint at"),
        ("checkpoint.pt --format torch --stages --exit 1", "--exit: not allowed with argument --stages"),
        ("checkpoint.pt --format torch --exit 5", "--exit must be one of 1, 2, 3, 4, not 5"),
        ("checkpoint.pt --format torch --output file", "file is not a folder"),
        ("checkpoint.pt --format torch --output images", "images holds other files than an export"),
    ],
    "tune.py": [
        ("--alpha 0.5 --temperature 3 --beta 0", "alpha, temperature and beta are all fixed: that is one run of"),
        ("--alpha 0.5 --space space.toml", "alpha is fixed by --alpha and searched by"),
        ("--dataset digits --try alpha=2", "--try alpha=2: alpha is searched in 0 to 0.5"),
        ("--resume --name done --temperature 3", "can only go on so"),
        ("--batch-norm local", "unrecognized arguments: --batch-norm local"),
        ("--sampler grid", "--sampler: invalid choice: 'grid'"),
        ("--metric", "--metric: expected at least one argument"),
        ("--metric val_nll val_nll", "metric names val_nll twice"),
        ("--metric val_accuracy val_nll --scheduler asha", "asha stops trials by one metric"),
        ("", "could not be downloaded: give its folder with --data-dir"),
        ("--val-fraction 0", "val_fraction must be above 0 in a search"),
        ("--num-samples 0", "num_samples must be at least 1, not 0"),
        (f"--num-samples {HUGE}", "num_samples must be at most 1000000"),
        ("--confirm-seeds 1", "confirm_seeds must lie between 2 and 1000, not 1"),
        ("--time-budget 1w", "time_budget must be a time such as 90s"),
        (f"--time-budget {HUGE}d", "time_budget must be a time such as 90s"),
        ("--dataset digits --seed 4294967295 --seeds-per-trial 2", "seed must"),
        ("--dataset digits --seed 4294967000 --confirm 1", "seed must"),
        ("--gpus-per-trial 1.5", "gpus_per_trial must be a fraction of 1, a whole number or auto, not"),
        ("--dataset digits --gpus-per-trial 0.5", "0.5 GPUs each are asked for, but this machine has 0"),
        ("--dataset digits --cpus-per-trial 100000", "100000 CPU threads each are asked for"),
        ("--dataset digits --warm-start nowhere", "there is no search nowhere"),
        ("--address ' '", "--address must be"),
        ("--dataset digits --name ../a", "a name is made of"),
        ("--dataset digits --storage-path file", "file is not a folder"),
        ("--storage-path file:///tmp/a", "--storage-path must be a folder or the URL of an object store (s3, gs, gcs"),
        ("--storage-path s3:///a", "--storage-path s3:///a must be like s3://BUCKET/FOLDER"),
        ("--storage-path s3://[bucket/a", "--storage-path s3://[bucket/a is not a URL"),
        ("--storage-path s3://bucket/../x", "must be like s3://BUCKET/FOLDER"),
        ("--storage-path s3://bucket/x#y", "must be like s3://BUCKET/FOLDER"),
        ("--storage-path 's3://a b/x'", "Cannot parse URI"),
        ("--storage-path s3://name:word@bucket/a", NO_SECRET),
        ("--storage-path 's3://bucket/x?region=us-west-2&secret_key=xyzzy'", NO_SECRET),
        ("--storage-path s3://bucket/x?X-Amz-Security-Token=xyzzy", NO_SECRET),
        ("--storage-path s3://bucket/a?x=1", "Unexpected query parameter in S3 URI: 'x'"),
        ("--space nowhere.toml", "nowhere.toml cannot be read (No such file or directory)"),
        ("--space folder", "folder cannot be read (Is a directory)"),
        ("--resume --fresh", "argument --fresh: not allowed with argument --resume"),
        ("--resume --model resnet34", "no unfinished search is in"),
        ("--resume --name nowhere", "there is no search nowhere in"),
        ("--resume --name ../../folder", "a name is made of"),
        ("--resume --name done --epochs 7", "--epochs 6"),
        ("--resume --name done --sampler gp", "--sampler tpe"),
        ("--resume --name done --num-samples 7", "--num-samples 8, which can grow but not shrink to 7"),
        ("--resume --name done --data-dir nowhere", "nowhere does not exist"),
    ],
    "best.py": [
        ("'no\nwhère'", r"there is no search no\nwhère in"),
        ("nowhere", "there are done"),
        ("../done", "there is no search ../done in"),
        (LONG, "nnnnn"),
        ("a\0b", r"a\x00b"),
        ("--outputs folder", "run python search/tune.py first"),
        ("done --top 0", "--top must be at least 1, not 0"),
        ("done --csv folder", "folder is a folder"),
        ("done --csv file/below", "file is not a folder"),
    ],
    "report.py": [
        ("nowhere --output new/page", "there is no search nowhere in"),
        ("done --output folder/", "folder is a folder"),
        ("--outputs nowhere", "run python search/tune.py first"),
    ],
    "retrain.py": [
        ("nowhere", "there is no search nowhere in"),
        ("done --top 0", "--top must be at least 1, not 0"),
        ("done --seeds 4294967297", "--seeds must lie between 1 and 10000"),
        ("done --epochs 0", "--epochs must be at least 1, not 0"),
        ("done --gpus-per-run nan", "--gpus-per-run must be a fraction of 1 or a whole number, not nan"),
        ("done --gpus-per-run 2 --data-dir images", "2 GPUs each are asked for, but this machine has 0"),
        ("done --cpus-per-run 100000 --data-dir images", "100000 CPU threads each are asked for"),
        ("done", "cifar100 is not in"),
        ("done --data-dir folder", "folder has neither"),
    ],
    "compare.py": [
        ("done nowhere", "there is no finished run and no search nowhere in"),
        ("'no*where'", "there is no finished run and no search no*where in"),
        ("mine done", "runs are compared with runs, and searches with searches"),
        ("mine", "result.json: the settings must be a table"),
        ("file.json", "there is no finished run and no search file.json in"),
        ("outputs/searches/done/best.json", "best.json has no number as test_accuracy"),
    ],
    "byot list": [
        ("--format xml", "--format: invalid choice: 'xml'"),
    ],
    "byot clean": [
        ("--yes=all", "ignored explicit argument 'all'"),
        ("--outputs file/below", "file is not a folder"),
    ],
    "byot": [
        ("retain", "there is no command 'retain': did you mean retrain?"),
        ("'t\nune'", r"there is no command 't\nune'"),
        ("--best", "there is no command '--best'"),
        ("''", "there is no command ''; byot alone lists them"),
    ],
}
# Before the path that is typed: everything that goes through the check of paths.
PATHS: dict[str, list[str]] = {
    "train.py": ["--data-dir", "--resume", "--dataset digits --outputs"],
    "evaluate.py": ["", "checkpoint.pt --data-dir"],
    "predict.py": ["checkpoint.pt"],
    "export.py": ["checkpoint.pt --format torch --output"],
    "tune.py": ["--data-dir", "--space", "--dataset digits --outputs", "--dataset digits --storage-path"],
    "best.py": ["done --csv", "--outputs"],
    "report.py": ["done --output", "--outputs"],
    "retrain.py": ["done --data-dir", "--outputs"],
    "compare.py": ["", "done --outputs"],
    "byot list": ["--outputs"],
    "byot clean": ["--yes --outputs"],
}
ALL = [(program, *line) for program, lines in LINES.items() for line in lines]
for program, starts in PATHS.items():
    ALL += [
        (program, f"{start} {path}", words) for start in starts for path, words in (("''", "empty"), ("a\0b", "NUL"))
    ]


@pytest.mark.parametrize(("program", "line", "words"), ALL, ids=[f"{program} {line[:60]}" for program, line, _ in ALL])
def test_a_bad_command_line_is_one_sentence(refuse, program, line, words):
    refuse(program, tuple(shlex.split(line)), words)


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("train.py", "--dataset digits --name a"),
        ("tune.py", "--dataset digits"),
        ("retrain.py", "outputs/searches/done --data-dir images"),
        ("report.py", "outputs/searches/done"),
    ],
)
def test_a_file_where_a_folder_is_to_be_is_told(refuse, place, program, line):
    for name in ("runs", "searches", "reports"):
        (place / "folder" / name).write_text("in the way")
    refuse(program, (*shlex.split(line), "--outputs", "folder"), "nothing can be written to", str(place / "folder"))


def test_a_bad_folder_in_the_environment(refuse, place, works, monkeypatch):
    """It is told, and hinders nobody who names another."""
    monkeypatch.setenv("BYOT_OUTPUTS", "file")
    for program in LINES.keys() - {"evaluate.py", "predict.py", "export.py", "compare.py", "byot"}:
        refuse(program, (), "file is not a folder")
    out = works(analysis.best, "done", "--outputs", "outputs")
    assert f"--best done --outputs {place / 'outputs'}" in out


@pytest.mark.parametrize("program", ["train.py", "tune.py"])
def test_a_folder_that_must_not_be_written_to_is_told(refuse, monkeypatch, program):
    """Told of by the system, as the tests may be run by root, who may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    refuse(program, ("--dataset", "digits", "--outputs", "folder/new"), "nothing can be written to", "folder/new")
    refuse(program, ("--dataset", "digits"), "nothing can be written to")  # of BYOT_OUTPUTS


@pytest.mark.parametrize(
    ("script", "line", "words"),
    [
        ("byot/train.py", "--surprise 'new\nline'", r"unrecognized arguments: --surprise new\nline"),
        ("byot/evaluate.py", "file", "file is damaged, or was not written by this project"),
        ("search/tune.py", "--dataset digits --cpus-per-trial 100000", "100000 CPU threads each"),
        ("analysis/best.py", "nowhere", "there is no search nowhere in"),
        ("analysis/retrain.py", "done --data-dir nowhere", "nowhere does not exist"),
        ("analysis/report.py", "done --output folder", "folder is a folder"),
        ("analysis/compare.py", "nowhere", "no finished run and no search nowhere"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_command_line_from_a_shell(place, script, line, words):
    """In a process of its own no warning and no banner comes from anywhere either."""
    before = picture_of(place)
    done = run_command(shlex.split(line), cwd=place, script=script, code=2, BYOT_OUTPUTS=str(place / "outputs"))
    assert done.stdout == ""
    assert_one_sentence(done.stderr, f"{Path(script).name}: ", words)
    assert picture_of(place) == before, "something was written"
