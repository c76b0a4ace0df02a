"""Cuts a trained network into graphs for other programs: images from 0 to 1 in, logits out, normalisation inside.

N images in a batch, any number; C classes; K exits, shallow to deep; S = image size in pixels.
"""

import io
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from byot.config import NUM_CLASSIFIERS, exit_numbers
from byot.data import Normalisation
from byot.exits import ExitRule, measure_costs
from byot.model import BranchedResNet, fold_batch_norms
from byot.runs import SavedRun, class_names

Network = tuple[BranchedResNet, Normalisation]
Format = Literal["onnx", "torch"]
ENDINGS: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}


class Graph(NamedTuple):
    """One file to be: a module, a batch to trace it with, and the names of what goes in and out."""

    name: str
    module: nn.Module
    example: Tensor
    input: str
    outputs: tuple[str, ...]


class Normalise(nn.Module):
    """Normalises images [N, 3, S, S] with values from 0 to 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalisation: Normalisation) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(normalisation.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(normalisation.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class BranchLogits(nn.Module):
    """A branch without the features that it gives beside its logits."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, feature_map: Tensor) -> Tensor:
        logits: Tensor = self.branch(feature_map)[0]
        return logits


class Section(nn.Module):
    """The layers between two exits and the classifier that follows them."""

    def __init__(self, layers: Sequence[nn.Module], classifier: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.classifier = classifier

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # images or a feature map -> [N, C], the next feature map
        x = self.layers(x)
        return self.classifier(x), x


class AllExits(nn.Module):
    """The whole network."""

    def __init__(self, sections: Sequence[Section]) -> None:
        super().__init__()
        self.sections = nn.ModuleList(sections)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # [N, 3, S, S] -> K x [N, C]
        x, logits = images, []
        for section in self.sections:
            exit_logits, x = section(x)
            logits.append(exit_logits)
        return tuple(logits)


def cut_sections(model: BranchedResNet, normalisation: Normalisation) -> list[Section]:
    """Cut a network at its exits into K sections; the first normalises the images, too."""
    trunk = model.trunk
    layers: list[nn.Module] = [Normalise(normalisation), trunk.conv1, trunk.bn1, nn.ReLU(), trunk.maxpool]
    *shallow, deepest = trunk.stages()
    sections = []
    for stage, branch in zip(shallow, model.branches, strict=False):
        sections.append(Section([*layers, stage], BranchLogits(branch)))
        layers = []
    layers += [*shallow[len(sections) :], deepest]  # of a network without branches, all four stages
    return [*sections, Section(layers, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), trunk.fc))]


def whole_graph(sections: Sequence[Section], image_size: int) -> Graph:
    """Make one graph of the logits of all exits."""
    outputs = tuple(f"logits_{number}" for number in exit_numbers(len(sections)))
    return Graph("all-exits", AllExits(sections), _images(image_size), "images", outputs)


def exit_graph(sections: Sequence[Section], image_size: int, number: int) -> Graph:
    """Make one graph of the logits of one exit, 1 to 4, without a layer that it does not need."""
    needed = sections[: exit_numbers(len(sections)).index(number) + 1]
    module = nn.Sequential(*(section.layers for section in needed), needed[-1].classifier)
    return Graph(f"exit-{number}", module, _images(image_size), "images", ("logits",))


@torch.no_grad()
def stage_graphs(sections: Sequence[Section], image_size: int) -> list[Graph]:
    """Make a graph of each section: from the images or the feature map before it to its logits and feature map.

    The last one gives logits alone.
    """
    x = _images(image_size)
    graphs: list[Graph] = []
    for section, number in zip(sections, exit_numbers(len(sections)), strict=True):
        last = section is sections[-1]
        module = nn.Sequential(section.layers, section.classifier) if last else section
        outputs = ("logits",) if last else ("logits", f"features_{number}")
        graphs.append(Graph(f"stage-{number}", module, x, graphs[-1].outputs[1] if graphs else "images", outputs))
        x = section.layers(x)
    return graphs


def render(
    saved: SavedRun, network: Network, rule: ExitRule, file_format: Format, *, stages: bool, exit: int | None
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Make the files of an export and its manifest: one graph a stage, of one exit alone, or of all exits."""
    config, (model, normalisation) = saved.config, network
    size = config.image_size
    costs: tuple[float, ...] = (1.0,) * NUM_CLASSIFIERS  # of the plain network
    if config.num_classifiers > 1:
        measured = measure_costs(model, size)
        costs = measured.of_exits((0.0,) * NUM_CLASSIFIERS) if exit is None else measured.alone()
    sections = cut_sections(fold_batch_norms(model), normalisation)
    if stages:
        graphs = stage_graphs(sections, size)
    else:
        graphs = [whole_graph(sections, size) if exit is None else exit_graph(sections, size, exit)]
    files = {graph.name + ENDINGS[file_format]: encode(graph, file_format) for graph in graphs}
    manifest = {
        "format": file_format,
        "run": saved.folder.name,
        "checkpoint": saved.checkpoint.name,
        **{name: getattr(config, name) for name in ("model", "width", "dataset")},
        "image_size": size,
        "class_names": class_names(saved),
        "graphs": [
            {"file": file, "input": graph.input, "shape": ["batch", *graph.example.shape[1:]], "outputs": graph.outputs}
            for file, graph in zip(files, graphs, strict=True)
        ],
        "exits": [
            {"exit": number, "temperature": temperature, "threshold": threshold, "cost": cost}
            for number, temperature, threshold, cost in zip(range(1, NUM_CLASSIFIERS + 1), *rule, costs, strict=True)
            if number in (exit_numbers(len(sections)) if exit is None else (exit,))
        ],
    }
    return files, manifest


def encode(graph: Graph, file_format: Format) -> bytes:
    """Trace a graph for batches of any size and write it as a file of ONNX, or of torch.export."""
    module = graph.module.eval()
    program = torch.export.export(module, (graph.example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of this machine's files
    if file_format == "torch":
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return buffer.getvalue()
    made = torch.onnx.export(
        program,
        input_names=[graph.input],
        output_names=list(graph.outputs),
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        verbose=False,
    )
    assert made is not None
    return made.model_proto.SerializeToString()


def _images(size: int) -> Tensor:
    return torch.zeros(2, 3, size, size)  # a batch of one would be traced as always one
