"""Images a second that several trials train on together, against their number: on one GPU, or on the cores of a CPU.

  python benchmarks/speed/concurrent_trials.py                         ResNet18 at width 16
  python benchmarks/speed/concurrent_trials.py --width 64 --most 4

On a GPU its memory and processor are shared; `tune.py --trials-per-gpu auto` chooses by the same measurement. On a CPU
the cores are dealt out, so that fewer trials have more threads each.
"""

from pathlib import Path
from typing import Any

from byot.config import TrainConfig
from byot.system.files import write_json
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import absolute_path


def build_parser() -> Parser:
    parser = Parser(prog="concurrent_trials.py", description=__doc__)
    parser.add_argument("--model", default="resnet18", help="[resnet18]")
    parser.add_argument("--width", type=int, default=16, help="[16]")
    parser.add_argument("--batch-size", type=int, default=128, help="[128]")
    parser.add_argument("--most", type=int, help="trials at once (default: 8 on a GPU, one a core on a CPU)")
    parser.add_argument("--output", metavar="FILE", help="write the record here as JSON")
    return parser


def measure(config: TrainConfig, most: int | None) -> list[dict[str, Any]]:
    """Images a second in all for one trial, two, and so on."""
    import ray

    from benchmarks.speed.train_speed import some_images
    from byot.trainer import choose_device
    from search.probe import measure_on_ray
    from search.settings import share_of_gpu
    from search.system.resources import Share, Slots, share_machine, start_ray
    from search.trial import TrialSetup

    room = share_machine(Share(), config.device)
    on_gpu = choose_device(config.device).type == "cuda"
    start_ray(Slots(1, 1, 0.0, room.num_cpus, room.num_gpus))
    data = some_images(None, 20 * config.batch_size)
    rows = []
    try:
        for trials in range(1, (most or (8 if on_gpu else room.num_cpus)) + 1):
            threads = max(1, room.num_cpus // trials)
            setup = TrialSetup(config, Path("unused"), "val_accuracy", threads, timed=None)
            run, actors = measure_on_ray(setup, data, cpus=threads, gpus=share_of_gpu(trials) if on_gpu else 0)
            images_per_s = run(trials)
            for actor in actors:
                ray.kill(actor)
            if images_per_s is None:
                print(f"{trials:>6}  out of memory")
                break
            rows.append({"trials": trials, "threads_each": threads, "images_per_s": images_per_s})
            gain = images_per_s / rows[0]["images_per_s"]
            print(f"{trials:>6}  {threads:>12}  {images_per_s:>13.0f}  {gain:>12.2f}", flush=True)
    finally:
        ray.shutdown()
    return rows


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("concurrent_trials.py"):
        config = TrainConfig(
            recipe="reference", model=arguments.model, width=arguments.width, batch_size=arguments.batch_size
        )
        if arguments.most is not None and arguments.most < 1:
            raise ValueError(f"--most must be at least 1, not {arguments.most}")

    from byot.system.provenance import provenance
    from byot.trainer import choose_device

    print("trials  threads each  images/s all  over one trial")
    rows = measure(config, arguments.most)
    if arguments.output:
        settings = {k: v for k, v in vars(arguments).items() if k != "output"}
        record = {"settings": settings, "rows": rows, **provenance(choose_device("auto"))}
        write_json(absolute_path(arguments.output), record)


if __name__ == "__main__":
    main()
