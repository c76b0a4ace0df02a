"""Test a trained network: accuracy, likelihood and calibration of every classifier and of their ensemble.

  python byot/evaluate.py outputs/runs/NAME        the run's last checkpoint
  python byot/evaluate.py path/to/epoch-0200.pt    one checkpoint file

Reads the test set; prints only.
"""

from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import absolute_path


def build_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("run", help="a run's folder or one checkpoint file")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data set is, if not where it was trained from")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="where to compute")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("evaluate.py"):
        from byot.console import classifier_table
        from byot.data import load_images
        from byot.runs import evaluate_run, find_run

        saved = find_run(absolute_path(arguments.run))
        config = saved.config.with_settings(device=arguments.device)
        if arguments.data_dir is not None:
            config = config.with_settings(data_dir=str(absolute_path(arguments.data_dir)))
        test = load_images(config.dataset, config.data_dir, "test", config.image_size)
        evaluation = evaluate_run(saved, config, test)
    epoch = f"after epoch {saved.state['epoch']}/{config.epochs}"
    print(f"{saved.checkpoint}\n{config.dataset}, {evaluation.num_images} test images, {epoch}")
    print(classifier_table(evaluation.to_record("test"), "test"))


if __name__ == "__main__":
    main()
