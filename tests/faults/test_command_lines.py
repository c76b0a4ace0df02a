"""Bad command lines: each is one sentence that names what is wrong, exit code 2, and nothing is written.

The tables hold what was typed and a part of the sentence. In the current folder lie `folder`, empty, `file`, a text,
`images`, a data set, `checkpoint.pt` of a run on digits of 2 epochs, `cifar.pt` of one on CIFAR-100, and outputs/ with
the finished search `done`.
"""

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Refuse, assert_one_sentence, call_main, picture_of, run_command

pytest_plugins = ["tests.faults.place"]

LONG = "n" * 300  # more than a file system takes for one name
HUGE = "9" * 400  # more than a float holds
Line = tuple[str, str]

NAMES: list[Line] = [
    *(
        (f"--name {name}", "a name is made of")
        for name in (
            "''",
            "' '",
            "a/b",
            "/tmp/a",
            "..",
            "../a",
            ".",
            ".hidden",
            "~",
            "a\\ b",
            "a*",
            "é",
            "a\0b",
            "\udcff",
        )
    ),
    ("--name 'a\tb'", r"not 'a\tb'"),
    ("--name 'a\n'", r"not 'a\n'"),
    ("--name=-a", "a name is made of"),
    (f"--name {LONG}", "at most 128"),
    ("--name", "--name: expected one argument"),
]

# Flags of byot/train.py and of search/tune.py alike: the settings of a run.
SETTINGS: list[Line] = [
    ("--model vgg16", "--model: invalid choice: 'vgg16'"),
    ("--model ''", "--model: invalid choice: ''"),
    ("--model ResNet18", "--model: invalid choice"),
    ("--model", "--model: expected one argument"),
    ("--width much", "--width: invalid int value: 'much'"),
    ("--width 1.5", "--width: invalid int value"),
    ("--width ''", "--width: invalid int value: ''"),
    ("--width nan", "--width: invalid int value"),
    ("--width 0", "width must lie between 1 and 1024, not 0"),
    ("--width -3", "width must lie between 1 and 1024, not -3"),
    ("--width 1025", "width must lie between 1 and 1024, not 1025"),
    ("--dataset mnist", "--dataset: invalid choice: 'mnist'"),
    ("--dataset ''", "--dataset: invalid choice"),
    ("--dataset ../cifar100", "--dataset: invalid choice"),
    ("--data-dir ''", "empty"),
    ("--data-dir nowhere", "nowhere does not exist"),
    ("--data-dir nowhere --dataset cifar10", "nowhere does not exist"),
    ("--data-dir file", "file is not a folder"),
    ("--data-dir folder", "neither train*.parquet files nor the folder cifar-100-python"),
    ("--data-dir folder --dataset cifar10", "neither train*.parquet files nor the folder cifar-10-batches-py"),
    ("--data-dir ~nobody-of-that-name", "a user who is not known here"),
    (f"--data-dir {LONG}", "File name too long"),
    ("--data-dir a\0b", "a path cannot have"),
    ("--data-dir \udcff", "a path cannot have"),
    ("--data-dir 'no\nwhere'", r"no\nwhere does not exist"),
    ("--data-dir nowhère", "nowhère does not exist"),
    ("--data-dir", "--data-dir: expected one argument"),
    ("--recipe best", "--recipe: invalid choice: 'best'"),
    ("--recipe ''", "--recipe: invalid choice"),
    ("--recipe strong", "--recipe: invalid choice: 'strong'"),
    ("--epochs many", "--epochs: invalid int value: 'many'"),
    ("--epochs 1e3", "--epochs: invalid int value: '1e3'"),
    ("--epochs inf", "--epochs: invalid int value"),
    ("--epochs 0", "epochs must be at least 1, not 0"),
    ("--epochs -1", "epochs must be at least 1, not -1"),
    (f"--epochs {HUGE}", "epochs must be at most 1000000"),
    ("--batch-size x", "--batch-size: invalid int value: 'x'"),
    ("--batch-size 1", "batch_size must be at least 2"),
    ("--batch-size 0", "batch_size must be at least 2"),
    ("--batch-size -128", "batch_size must be at least 2"),
    (f"--batch-size {HUGE}", "batch_size must be at most 1000000"),
    ("--lr fast", "--lr: invalid float value: 'fast'"),
    ("--lr ''", "--lr: invalid float value: ''"),
    ("--lr 0,1", "--lr: invalid float value: '0,1'"),
    ("--lr 0", "lr must be a finite number above 0, not 0"),
    ("--lr=-0.1", "lr must be a finite number above 0, not -0.1"),
    ("--lr nan", "lr must be a finite number above 0, not nan"),
    ("--lr inf", "lr must be a finite number above 0, not inf"),
    (f"--lr {HUGE}", "lr must be a finite number above 0, not inf"),
    ("--momentum x", "--momentum: invalid float value"),
    ("--momentum 1", "momentum must be at least 0 and below 1, not 1"),
    ("--momentum -0.1", "momentum must be at least 0 and below 1, not -0.1"),
    ("--momentum nan", "momentum must be at least 0 and below 1, not nan"),
    ("--weight-decay x", "--weight-decay: invalid float value"),
    ("--weight-decay -1", "weight_decay must be a finite number of at least 0, not -1"),
    ("--weight-decay nan", "weight_decay must be a finite number of at least 0, not nan"),
    ("--weight-decay inf", "weight_decay must be a finite number of at least 0, not inf"),
    ("--loss-form mine", "--loss-form: invalid choice: 'mine'"),
    ("--label-smoothing x", "--label-smoothing: invalid float value: 'x'"),
    ("--label-smoothing 1", "label_smoothing must be at least 0 and below 1, not 1"),
    ("--label-smoothing -0.1", "label_smoothing must be at least 0 and below 1, not -0.1"),
    ("--label-smoothing nan", "label_smoothing must be at least 0 and below 1, not nan"),
    ("--teacher best", "--teacher: invalid choice: 'best'"),
    ("--teacher ensemble --loss-form plain", "teacher ensemble needs the shallow classifiers"),
    ("--seed x", "--seed: invalid int value: 'x'"),
    ("--seed 0x10", "--seed: invalid int value: '0x10'"),
    ("--seed -1", "seed must lie between 0 and 4294967295, not -1"),
    ("--seed 4294967296", "seed must lie between 0 and 4294967295, not 4294967296"),
    ("--val-fraction half", "--val-fraction: invalid float value: 'half'"),
    ("--val-fraction -0.1", "val_fraction must lie between 0 and 0.5, not -0.1"),
    ("--val-fraction 0.6", "val_fraction must lie between 0 and 0.5, not 0.6"),
    ("--val-fraction nan", "val_fraction must lie between 0 and 0.5, not nan"),
    ("--val-fraction 10%", "--val-fraction: invalid float value: '10%'"),
    ("--dataset digits --val-fraction 1e-9", "images holds out none; give more"),
    ("--split-seed x", "--split-seed: invalid int value"),
    ("--split-seed -1", "split_seed must lie between 0 and 4294967295, not -1"),
    ("--device tpu", "--device: invalid choice: 'tpu'"),
    ("--device cuda:0", "--device: invalid choice: 'cuda:0'"),
    ("--dataset digits --device mps", "device mps is not available here"),
    ("--dataset digits --device cuda", "device cuda is not available here"),
    ("--acceleration fast", "--acceleration: invalid choice: 'fast'"),
    ("--dataset digits --device cpu --acceleration graph", "acceleration graph needs a CUDA device, not cpu"),
    ("--placement cloud", "--placement: invalid choice: 'cloud'"),
    ("--precision fp16", "--precision: invalid choice: 'fp16'"),
    ("--precision", "--precision: expected one argument"),
    ("", "cifar100 is not in"),  # no data, and no network to fetch it by
    ("--mod resnet18", "unrecognized arguments: --mod resnet18"),  # no abbreviations
    ("--batch_size 4", "unrecognized arguments: --batch_size 4"),
    ("--surprise", "unrecognized arguments: --surprise"),
    ("-x", "unrecognized arguments: -x"),
    ("--überraschung", "unrecognized arguments: --überraschung"),
    ("'--sur\nprise'", r"unrecognized arguments: --sur\nprise"),
    ("'--\x1b[31m'", r"unrecognized arguments: --\x1b[31m"),
    ("stray", "unrecognized arguments: stray"),
]

OUTPUTS: list[Line] = [
    ("--outputs ''", "empty"),
    ("--outputs file", "file is not a folder"),
    ("--outputs file/below", "file is not a folder"),
    ("--outputs /dev/null", "/dev/null is not a folder"),
    ("--outputs /dev/null/a/b", "/dev/null is not a folder"),
    ("--outputs ~nobody-of-that-name/a", "a user who is not known here"),
    (f"--outputs {LONG}", "File name too long"),
    ("--outputs a\0b", "a path cannot have"),
    ("--outputs \udcff", "a path cannot have"),
    ("--outputs", "--outputs: expected one argument"),
]

TRAIN: list[Line] = [
    *((f"--dataset digits {line}", part) for line, part in OUTPUTS + NAMES),
    ("--alpha much", "--alpha: invalid float value: 'much'"),
    ("--batch-norm group", "--batch-norm: invalid choice: 'group'"),
    ("--alpha ''", "--alpha: invalid float value: ''"),
    ("--alpha 2", "alpha must lie between 0 and 1, not 2"),
    ("--alpha -0.1", "alpha must lie between 0 and 1, not -0.1"),
    ("--alpha nan", "alpha must lie between 0 and 1, not nan"),
    ("--alpha inf", "alpha must lie between 0 and 1, not inf"),
    ("--temperature hot", "--temperature: invalid float value: 'hot'"),
    ("--temperature 0", "temperature must be a finite number above 0, not 0"),
    ("--temperature -3", "temperature must be a finite number above 0, not -3"),
    ("--temperature nan", "temperature must be a finite number above 0, not nan"),
    ("--temperature inf", "temperature must be a finite number above 0, not inf"),
    ("--beta x", "--beta: invalid float value: 'x'"),
    ("--beta -1", "beta must be a finite number of at least 0, not -1"),
    ("--beta nan", "beta must be a finite number of at least 0, not nan"),
    ("--beta inf", "beta must be a finite number of at least 0, not inf"),
    ("--best nowhere", "the search nowhere has no best.json"),
    ("--best file", "the search file has no best.json"),
    ("--best folder", "the search folder has no best.json"),
    ("--best ../done", "the search ../done has no best.json"),
    ("--best ' '", "has no best.json"),
    ("--best 'no\nwhere'", r"the search no\nwhere has no best.json"),
    (f"--best {LONG}", "nnnnn"),
    ("--best a\0b", "a path cannot have"),
    ("--best done --alpha 2", "alpha must lie between 0 and 1, not 2"),
    ("--best done --name ../a", "a name is made of"),
    ("--best --model resnet152", "no finished search of resnet152 on cifar100"),
    ("--best --resume folder", "not allowed with argument --best"),
    ("--best=done --resume=folder", "not allowed with argument --best"),
    ("--resume ''", "empty"),
    ("--resume nowhere", "there is no run or checkpoint at"),
    ("--resume nowhere/epoch-0001.pt", "there is no run or checkpoint at"),
    ("--resume folder", "holds no checkpoint that can be read"),
    ("--resume outputs/searches/done", "holds no checkpoint that can be read"),
    ("--resume file", "file is damaged, or was not written by this project"),
    ("--resume outputs/searches/done/best.json", "best.json is damaged, or was not written by this project"),
    ("--resume /dev/zero", "/dev/zero is neither a folder nor a file"),
    (f"--resume {LONG}", "File name too long"),
    ("--resume a\0b", "a path cannot have"),
    ("--resume ~nobody-of-that-name", "a user who is not known here"),
    ("--resume folder --fresh", "--fresh starts a run anew and --resume goes on with one"),
    ("--fresh=yes", "ignored explicit argument 'yes'"),
    ("--resume folder --name a", "--name is for a new run"),
    ("--resume", "--resume: expected one argument"),
    ("--resume folder --outputs file", "file is not a folder"),
]

EVALUATE: list[Line] = [
    ("", "the following arguments are required: run"),
    ("''", "empty"),
    ("nowhere", "there is no run or checkpoint at"),
    ("folder", "holds no checkpoint that can be read"),
    ("outputs", "holds no checkpoint that can be read"),
    ("file", "file is damaged, or was not written by this project"),
    ("file/below", "there is no run or checkpoint at"),
    ("/dev/zero", "/dev/zero is neither a folder nor a file"),
    (LONG, "File name too long"),
    ("a\0b", "a path cannot have"),
    ("\udcff", "a path cannot have"),
    ("~nobody-of-that-name", "a user who is not known here"),
    ("'no\nwhere'", r"no\nwhere"),
    ("folder folder", "unrecognized arguments: folder"),
    ("folder --device tpu", "--device: invalid choice: 'tpu'"),
    ("folder --device ''", "--device: invalid choice: ''"),
    ("folder --device", "--device: expected one argument"),
    ("folder --data-dir", "--data-dir: expected one argument"),
    ("folder --alpha 0.5", "unrecognized arguments: --alpha 0.5"),
    ("folder --data .", "unrecognized arguments: --data ."),
    ("checkpoint.pt --data-dir ''", "empty"),
    ("cifar.pt --data-dir nowhere --device cpu", "nowhere does not exist"),
    ("cifar.pt --data-dir folder --device cpu", "neither test*.parquet"),
    ("checkpoint.pt --data-dir ~nobody-of-that-name", "a user who is not known here"),
    ("checkpoint.pt --device cuda", "device cuda is not available here"),
    ("checkpoint.pt --device mps", "device mps is not available here"),
]

# What a checkpoint says of its run no flag may change.
RESUMED: list[Line] = [
    ("--alpha 0.5", "alpha 0.1 (asked for: 0.5)"),
    ("--temperature 1", "temperature 3.0 (asked for: 1.0)"),
    ("--beta 0", "beta 1e-06 (asked for: 0.0)"),
    ("--model resnet34", "model resnet18 (asked for: resnet34)"),
    ("--width 2", "width 1 (asked for: 2)"),
    ("--epochs 3", "epochs 2 (asked for: 3)"),
    ("--seed 1", "seed 0 (asked for: 1)"),
    ("--recipe reference", "recipe modern (asked for: reference)"),
    ("--label-smoothing 0.1", "label_smoothing 0.0 (asked for: 0.1)"),
    ("--teacher ensemble", "teacher deepest (asked for: ensemble)"),
    ("--loss-form paper", "loss_form reference (asked for: paper)"),
    ("--val-fraction 0.1", "val_fraction 0.0 (asked for: 0.1)"),
    ("--precision bf16", "precision auto (asked for: bf16)"),
    ("--epochs 0", "epochs must be at least 1"),
    ("--data-dir ''", "empty"),
]

TUNE: list[Line] = [
    *((f"--dataset digits {line}", part) for line, part in OUTPUTS + NAMES),
    *((line.replace("--outputs", "--dataset digits --storage-path"), part) for line, part in OUTPUTS[:-1]),
    ("--storage-path", "--storage-path: expected one argument"),
    ("--storage-path file:///tmp/a", "--storage-path must be a folder or the URL of an object store (s3, gs, gcs"),
    ("--storage-path ://", "--storage-path must be a folder or the URL of an object store"),
    ("--storage-path s3://", "--storage-path s3:// must be like s3://BUCKET/FOLDER"),
    ("--storage-path s3:///a", "--storage-path s3:///a must be like s3://BUCKET/FOLDER"),
    ("--storage-path s3://bucket/../a", "--storage-path s3://bucket/../a must be like s3://BUCKET/FOLDER"),
    ("--storage-path s3://[bucket/a", "--storage-path s3://[bucket/a is not a URL"),
    ("--storage-path 's3://a b/a'", "Cannot parse URI"),
    ("--storage-path s3://name:word@bucket/a", "--storage-path must have no password in it"),
    ("--storage-path s3://bucket/a?x=1", "Unexpected query parameter in S3 URI: 'x'"),
    ("--storage-path abfs://container/a", "object store (s3, gs, gcs), not abfs://"),
    ("--alpha 0.5", "unrecognized arguments: --alpha 0.5"),  # these three are searched
    ("--temperature 3", "unrecognized arguments: --temperature 3"),
    ("--beta 0", "unrecognized arguments: --beta 0"),
    ("--val-fraction 0", "val_fraction must be above 0 in a search"),
    ("--num-samples x", "--num-samples: invalid int value: 'x'"),
    ("--num-samples 2.5", "--num-samples: invalid int value: '2.5'"),
    ("--num-samples 0", "num_samples must be at least 1, not 0"),
    ("--num-samples -1", "num_samples must be at least 1, not -1"),
    (f"--num-samples {HUGE}", "num_samples must be at most 1000000"),
    ("--max-concurrent x", "--max-concurrent: invalid int value"),
    ("--max-concurrent 0", "max_concurrent must be at least 1, not 0"),
    ("--max-concurrent -1", "max_concurrent must be at least 1, not -1"),
    ("--gpus-per-trial x", "--gpus-per-trial: invalid float value"),
    ("--gpus-per-trial -1", "gpus_per_trial must be a fraction of 1 or a whole number, not -1"),
    ("--gpus-per-trial 1.5", "gpus_per_trial must be a fraction of 1 or a whole number, not 1.5"),
    ("--gpus-per-trial nan", "gpus_per_trial must be a fraction of 1 or a whole number, not nan"),
    ("--gpus-per-trial inf", "gpus_per_trial must be a fraction of 1 or a whole number, not inf"),
    ("--dataset digits --gpus-per-trial 0.5", "0.5 GPUs each are asked for, but this machine has 0"),
    ("--dataset digits --gpus-per-trial 1e300", "1e+300 GPUs each are asked for"),
    ("--trials-per-gpu 0", "trials_per_gpu must be auto or a number from 1 to 99, not '0'"),
    ("--trials-per-gpu many", "trials_per_gpu must be auto or a number from 1 to 99, not 'many'"),
    ("--trials-per-gpu 2 --gpus-per-trial 0.5", "trials_per_gpu and gpus_per_trial say the same in two ways"),
    ("--dataset digits --trials-per-gpu 2", "0.5 GPUs each are asked for, but this machine has 0"),
    ("--batch-norm local", "unrecognized arguments: --batch-norm local"),
    ("--cpus-per-trial x", "--cpus-per-trial: invalid int value"),
    ("--cpus-per-trial 0.5", "--cpus-per-trial: invalid int value"),
    ("--cpus-per-trial 0", "cpus_per_trial must be at least 1, not 0"),
    ("--cpus-per-trial -1", "cpus_per_trial must be at least 1, not -1"),
    ("--dataset digits --cpus-per-trial 100000", "100000 CPU threads each are asked for"),
    ("--metric val_nll val_nll", "metric names val_nll twice"),
    ("--metric val_nll test_nll", "--metric: invalid choice: 'test_nll'"),
    ("--metric", "--metric: expected at least one argument"),
    ("--metric val_accuracy val_nll --scheduler asha", "asha stops trials by one metric"),
    ("--metric val_accuracy val_nll --sampler cmaes", "cmaes searches for one metric"),
    ("--sampler grid", "--sampler: invalid choice: 'grid'"),
    ("--scheduler hyperband", "--scheduler: invalid choice: 'hyperband'"),
    *(
        (f"--{flag} {value}", f"{words} {value}")
        for flag, value, words in (
            ("patience", 0, "patience must be at least 1, not"),
            ("patience", -3, "patience must be at least 1, not"),
            ("patience", 1000001, "patience must be at most 1000000, not"),
            ("seeds-per-trial", 0, "seeds_per_trial must be at least 1, not"),
            ("seeds-per-trial", 1001, "seeds_per_trial must be at most 1000, not"),
            ("confirm", 0, "confirm must be at least 1, not"),
            ("confirm-seeds", 1, "confirm_seeds must be at least 2, not"),
            ("confirm-seeds", 1001, "confirm_seeds must be at most 1000, not"),
        )
    ),
    *(
        (f"--{flag} x", f"--{flag}: invalid int value: 'x'")
        for flag in ("patience", "seeds-per-trial", "confirm", "confirm-seeds")
    ),
    ("--dataset digits --warm-start nowhere", "there is no search nowhere"),
    ("--dataset digits --warm-start ''", "warm_start must be the name of a search"),
    ("--dataset digits --warm-start file", "there is no search file"),
    ("--resume --name done --sampler gp", "--sampler tpe"),
    ("--dataset digits --seed 4294967295 --seeds-per-trial 2", "seed must"),
    ("--dataset digits --seed 4294967000 --confirm 1", "seed must"),
    ("--trials-per-gpu auto --seeds-per-trial 2", "trials_per_gpu auto measures trials of one run"),
    ("--grace 0", "grace must be at least 1, not 0"),
    ("--grace x", "--grace: invalid int value: 'x'"),
    ("--dataset digits --fresh --name done --warm-start nowhere", "there is no search nowhere"),
    ("--resume --name done --confirm 0", "confirm must be at least 1, not 0"),
    ("--time-budget soon", "time_budget must be a time such as 90s"),
    ("--time-budget ''", "time_budget must be a time such as 90s"),
    ("--time-budget 0", "time_budget must be a time such as 90s"),
    ("--time-budget 0.0h", "time_budget must be a time such as 90s"),
    ("--time-budget=-1h", "time_budget must be a time such as 90s"),
    ("--time-budget 1w", "time_budget must be a time such as 90s"),
    ("--time-budget '1 h'", "time_budget must be a time such as 90s"),
    ("--time-budget inf", "time_budget must be a time such as 90s"),
    ("--time-budget nan", "time_budget must be a time such as 90s"),
    (f"--time-budget {HUGE}d", "time_budget must be a time such as 90s"),
    ("--metric test_accuracy", "--metric: invalid choice: 'test_accuracy'"),
    ("--metric val_accuracy_5", "--metric: invalid choice"),
    ("--metric ''", "--metric: invalid choice"),
    ("--address ''", "--address must be"),
    ("--address ' '", "--address must be"),
    ("--address", "--address: expected one argument"),
    ("--space ''", "empty"),
    ("--space nowhere.toml", "nowhere.toml cannot be read (No such file or directory)"),
    ("--space folder", "folder cannot be read (Is a directory)"),
    ("--space file", "file is not valid TOML"),
    (f"--space {LONG}", "File name too long"),
    ("--space a\0b", "a path cannot have"),
    ("--space ~nobody-of-that-name/a.toml", "a user who is not known here"),
    ("--space", "--space: expected one argument"),
    ("--resume", "no unfinished search is in"),
    ("--resume --outputs folder", "no unfinished search is in"),
    ("--resume --outputs file", "file is not a folder"),
    ("--resume --model resnet34", "no unfinished search is in"),
    ("--resume --name nowhere", "there is no search nowhere in"),
    ("--resume --name ../../folder", "a name is made of"),
    ("--resume --name ''", "a name is made of"),
    (f"--resume --name {LONG}", "at most 128"),
    ("--resume --name done --epochs 7", "--epochs 6"),
    ("--resume --name done --epochs 0", "epochs must be at least 1"),
    ("--resume --name done --seed 1", "--seed 0"),
    ("--resume --name done --num-samples 7", "--num-samples 8, which can grow but not shrink to 7"),
    ("--resume --name done --metric val_nll", "--metric val_accuracy"),
    ("--resume --name done --time-budget soon", "time_budget must be a time"),
    ("--resume --name done --space nowhere.toml", "nowhere.toml cannot be read"),
    ("--resume --name done --data-dir nowhere", "nowhere does not exist"),
    ("--resume --name done --data-dir ''", "empty"),
    ("--resume --fresh", "argument --fresh: not allowed with argument --resume"),
    ("--fresh=yes", "ignored explicit argument 'yes'"),
    ("--retry-failed=2", "ignored explicit argument '2'"),
    ("--resume=yes", "ignored explicit argument 'yes'"),
    ("--resu", "unrecognized arguments: --resu"),
]

# The search that analysis/*.py is to read.
SEARCH: list[Line] = [
    ("nowhere", "there is no search nowhere in"),
    ("nowhere", "there are done"),
    ("''", "empty"),
    ("' '", "there is no search"),
    ("..", "there is no search .. in"),
    ("../done", "there is no search ../done in"),
    ("folder", "there is no search folder in"),
    ("file", "there is no search file in"),
    ("outputs/searches/done/search.json", "there is no search outputs/searches/done/search.json in"),
    ("~nobody-of-that-name", "~nobody-of-that-name"),
    ("'no\nwhere'", r"there is no search no\nwhere in"),
    ("nowhère", "there is no search nowhère in"),
    ("a\0b", r"a\x00b"),
    (LONG, "nnnnn"),
    ("done done", "unrecognized arguments: done"),
    ("--outputs folder", "run python search/tune.py first"),
    ("--outputs nowhere", "run python search/tune.py first"),
    *OUTPUTS,
    ("--surprise", "unrecognized arguments: --surprise"),
    ("--outp folder", "unrecognized arguments: --outp"),
    ("--model resnet18", "unrecognized arguments: --model"),
]


def written(flag: str) -> list[Line]:
    """A file to write, and its flag."""
    return [
        (f"done {flag} ''", "empty"),
        (f"done {flag} folder", "folder is a folder"),
        (f"done {flag} .", "is a folder"),
        (f"done {flag} folder/", "folder is a folder"),
        (f"done {flag} file/below", "file is not a folder"),
        (f"done {flag} /dev/null/below", "/dev/null is not a folder"),
        (f"done {flag} ~nobody-of-that-name/a", "a user who is not known here"),
        (f"done {flag} {LONG}", "File name too long"),
        (f"done {flag} a\0b", "a path cannot have"),
        (f"done {flag} \udcff", "a path cannot have"),
        (f"done {flag}", f"{flag}: expected one argument"),
        (f"nowhere {flag} new/page", "there is no search nowhere in"),
    ]


BEST: list[Line] = [
    *SEARCH,
    *written("--csv"),
    ("done --top x", "--top: invalid int value: 'x'"),
    ("done --top 1.5", "--top: invalid int value: '1.5'"),
    ("done --top ''", "--top: invalid int value: ''"),
    ("done --top nan", "--top: invalid int value: 'nan'"),
    ("done --top 0", "--top must be at least 1, not 0"),
    ("done --top -5", "--top must be at least 1, not -5"),
    ("done --top", "--top: expected one argument"),
]

REPORT: list[Line] = [*SEARCH, *written("--output"), ("done --top 3", "unrecognized arguments: --top 3")]

RETRAIN: list[Line] = [
    *SEARCH,
    *(
        (f"done {flag} {value}", part.format(flag=flag))
        for flag in ("--top", "--seeds", "--epochs", "--cpus-per-run", "--max-concurrent")
        for value, part in (
            ("x", "{flag}: invalid int value: 'x'"),
            ("1.5", "{flag}: invalid int value: '1.5'"),
            ("''", "{flag}: invalid int value: ''"),
            ("inf", "{flag}: invalid int value: 'inf'"),
            ("0", "{flag} must be at least 1, not 0"),
            ("-1", "{flag} must be at least 1, not -1"),
            ("", "{flag}: expected one argument"),
        )
    ),
    (f"done --epochs {HUGE}", "epochs must be at most 1000000"),
    ("done --seeds 4294967297", "--seeds must be at most 10000"),
    ("done --cpus-per-run 100000 --data-dir images", "100000 CPU threads each are asked for"),
    ("done --gpus-per-run x", "--gpus-per-run: invalid float value: 'x'"),
    ("done --gpus-per-run -1", "--gpus-per-run must be a fraction of 1 or a whole number, not -1"),
    ("done --gpus-per-run 1.5", "--gpus-per-run must be a fraction of 1 or a whole number, not 1.5"),
    ("done --gpus-per-run nan", "--gpus-per-run must be a fraction of 1 or a whole number, not nan"),
    ("done --gpus-per-run inf", "--gpus-per-run must be a fraction of 1 or a whole number, not inf"),
    ("done --gpus-per-run 2 --data-dir images", "2 GPUs each are asked for, but this machine has 0"),
    ("done --with-controls=yes", "ignored explicit argument 'yes'"),
    ("done --no-with-controls=no", "ignored explicit argument 'no'"),
    ("done --with", "unrecognized arguments: --with"),
    ("done --no-controls", "unrecognized arguments: --no-controls"),
    ("done --data-dir ''", "empty"),
    ("done --data-dir nowhere", "nowhere does not exist"),
    ("done --data-dir file", "file is not a folder"),
    ("done --data-dir folder", "folder has neither"),
    ("done --data-dir ~nobody-of-that-name", "a user who is not known here"),
    (f"done --data-dir {LONG}", "File name too long"),
    ("done --data-dir a\0b", "a path cannot have"),
    ("done", "cifar100 is not in"),  # no data, and no network to fetch it by
]

LINES = {
    "train.py": SETTINGS + TRAIN,
    "evaluate.py": EVALUATE,
    "tune.py": SETTINGS + TUNE,
    "best.py": BEST,
    "retrain.py": RETRAIN,
    "report.py": REPORT,
}
ALL = [(program, line, part) for program, lines in LINES.items() for line, part in lines]


@pytest.mark.parametrize(("program", "line", "part"), ALL, ids=[f"{p} {line[:60]}" for p, line, _ in ALL])
def test_a_bad_command_line_is_one_sentence(refuse: Refuse, program: str, line: str, part: str) -> None:
    refuse(program, tuple(shlex.split(line)), part)


@pytest.mark.parametrize(("line", "part"), RESUMED, ids=[line for line, _ in RESUMED])
def test_a_resumed_run_keeps_its_settings(refuse: Refuse, line: str, part: str) -> None:
    refuse("train.py", ("--resume", "checkpoint.pt", *shlex.split(line)), part)


@pytest.mark.parametrize("line", ["--data-dir nowhere", "--data-dir folder", "--dataset digits --device mps"])
def test_what_cannot_start_anew_moves_nothing_aside(refuse: Refuse, place: Path, line: str) -> None:
    (place / "outputs" / "runs" / "mine").mkdir(parents=True)
    (place / "outputs" / "runs" / "mine" / "result.json").write_text("{}")
    refuse("train.py", (*shlex.split(line), "--name", "mine", "--fresh"))


@pytest.mark.parametrize("program", LINES)
def test_every_flag_of_every_command_is_in_the_tables(programs: dict[str, Any], program: str) -> None:
    typed = {word.partition("=")[0] for line, _ in LINES[program] for word in shlex.split(line)}
    flags = {flag for action in programs[program].build_parser()._actions for flag in action.option_strings}
    assert flags - {"-h", "--help"} <= typed


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("train.py", "--dataset digits --name a"),
        ("tune.py", "--dataset digits"),
        ("retrain.py", "outputs/searches/done --data-dir images"),
        ("report.py", "outputs/searches/done"),
    ],
)
def test_a_file_where_a_folder_is_to_be_is_told(refuse: Refuse, place: Path, program: str, line: str) -> None:
    for name in ("runs", "searches", "reports"):
        (place / "folder" / name).write_text("in the way")
    refuse(program, (*shlex.split(line), "--outputs", "folder"), "nothing can be written to", str(place / "folder"))


@pytest.mark.parametrize("program", [program for program in LINES if program != "evaluate.py"])
def test_a_bad_folder_in_the_environment_is_told(refuse: Refuse, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setenv("BYOT_OUTPUTS", "file")
    refuse(program, (), "nothing can be written to", "file is not a folder")


def test_a_bad_folder_in_the_environment_hinders_nobody_who_names_another(
    place: Path, programs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BYOT_OUTPUTS", "file")
    arguments = ("done", "--outputs", "outputs")
    code, out, err = call_main(programs["best.py"], "best.py", arguments, monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert f"--best done --outputs {place / 'outputs'}" in out


@pytest.mark.parametrize("program", ["train.py", "tune.py"])
def test_a_folder_that_must_not_be_written_to_is_told(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """Told of by the system, as the tests may be run by root, who may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    refuse(program, ("--dataset", "digits", "--outputs", "folder/new"), "nothing can be written to", "folder/new")
    refuse(program, ("--dataset", "digits"), "nothing can be written to")  # of BYOT_OUTPUTS


@pytest.mark.parametrize(
    ("script", "line", "part"),
    [
        ("byot/train.py", "--surprise 'new\nline'", r"unrecognized arguments: --surprise new\nline"),
        ("byot/train.py", "--data-dir nowhere", "nowhere does not exist"),
        ("byot/train.py", f"--resume {LONG}", "File name too long"),
        ("byot/train.py", "--best nowhere --name a", "the search nowhere has no best.json"),
        ("byot/evaluate.py", "file", "file is damaged, or was not written by this project"),
        ("byot/evaluate.py", "''", "empty"),
        ("search/tune.py", "--dataset digits --cpus-per-trial 100000", "100000 CPU threads each"),
        ("search/tune.py", "--space file", "file is not valid TOML"),
        ("analysis/best.py", "nowhere", "there is no search nowhere in"),
        ("analysis/best.py", "done --csv file/below", "file is not a folder"),
        ("analysis/retrain.py", "done --data-dir nowhere", "nowhere does not exist"),
        ("analysis/report.py", "done --output folder", "folder is a folder"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_command_line_from_a_shell(place: Path, script: str, line: str, part: str) -> None:
    """The same in processes of their own: no warning and no banner from anywhere either."""
    before = picture_of(place)
    done = run_command(shlex.split(line), cwd=place, script=script, BYOT_OUTPUTS=str(place / "outputs"))
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_sentence(done.stderr, part)
    assert done.stderr.startswith(f"{Path(script).name}: ")
    assert picture_of(place) == before, "something was written"
