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
        from byot.runs import evaluate_checkpoint, find_checkpoint

        _, config, checkpoint = find_checkpoint(absolute_path(arguments.run))
        data_dir = config.data_dir if arguments.data_dir is None else str(absolute_path(arguments.data_dir))
        config = config.with_settings(device=arguments.device, data_dir=data_dir)
        test = load_images(config.dataset, config.data_dir, "test")
        evaluation, epoch = evaluate_checkpoint(config, checkpoint, test)
    print(f"{checkpoint}\n{config.dataset}, {evaluation.num_images} test images, after epoch {epoch}/{config.epochs}")
    print(classifier_table(evaluation.to_record("test"), "test"))


if __name__ == "__main__":
    main()
