"""Holds exported graphs to the network they come from, and the example in docs/predict.md to predicting itself."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import byot
from byot import export
from byot.data import load_images
from byot.exits import measure_costs
from byot.model import fold_batch_norms
from byot.runs import load_network
from byot.system.files import read_json
from tests.helpers import PROJECT, assert_one_sentence, picture_of, random_pixels

EXAMPLE = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "predict.md").read_text(), re.DOTALL)[-1]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """The digits' test images as a graph takes them: float32 [N, 3, 8, 8] from 0 to 1."""
    return load_images("digits", None, "test").images.transpose(0, 3, 1, 2).astype(np.float32) / 255


def logits_of(run: Path, images: np.ndarray) -> np.ndarray:
    """Compute the logits [K, N, C] of every exit."""
    model, (mean, std) = load_network(run)
    with torch.inference_mode():
        x = (torch.from_numpy(images) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        return torch.stack(model(x).logits).numpy()


def load_torch(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    module: Any = torch.export.load(path).module()

    def compute(images: np.ndarray) -> list[np.ndarray]:
        found = module(torch.from_numpy(images))
        return [logits.detach().numpy() for logits in (found if isinstance(found, tuple) else (found,))]

    return compute


def load_onnx(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    import onnx
    import onnxruntime

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}, "standard operators only"
    session = onnxruntime.InferenceSession(path)
    return lambda images: session.run(None, {"images": images})


LOAD = {"torch": load_torch, "onnx": load_onnx}


def exported(folder: Path, *names: str) -> list[Path]:
    """List the graphs of a folder, which has no other file than these and the manifest."""
    manifest = read_json(folder / "manifest.json")
    assert [graph["file"] for graph in manifest["graphs"]] == list(names)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["manifest.json", *names])
    return [folder / name for name in names]


def assert_same_logits(
    compute: Callable[[np.ndarray], list[np.ndarray]], images: np.ndarray, expected: np.ndarray
) -> None:
    """Check the logits [K, N, C] in batches of several sizes."""
    for some in (slice(0, 1), slice(0, 7), slice(None)):
        np.testing.assert_allclose(compute(images[some]), expected[:, some], rtol=0, atol=1e-4)


# ---------------------------------------------------------------- graphs
@pytest.mark.slow
@pytest.mark.parametrize("file_format", LOAD)
def test_one_graph_has_the_logits_of_all_exits(exits_run, images, works, tmp_path, file_format):
    out = works(export, exits_run, "--format", file_format, "--output", tmp_path / "made")
    (path,) = exported(tmp_path / "made", f"all-exits.{'pt2' if file_format == 'torch' else 'onnx'}")
    assert [line.split()[0] for line in out.splitlines()] == [str(path), str(path.with_name("manifest.json"))]
    assert_same_logits(LOAD[file_format](path), images, logits_of(exits_run, images))
    manifest = read_json(path.with_name("manifest.json"))
    assert (manifest["image_size"], manifest["class_names"]) == (8, list("0123456789"))
    assert manifest["graphs"][0]["shape"] == ["batch", 3, 8, 8]
    assert [exit["exit"] for exit in manifest["exits"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("file_format", LOAD)
def test_one_exit_alone_has_no_layer_that_it_does_not_need(exits_run, images, call, tmp_path, file_format):
    assert call(export, exits_run, "--format", file_format, "--exit", 2, "--output", tmp_path / "made")[0] == 0
    (path,) = exported(tmp_path / "made", f"exit-2.{'pt2' if file_format == 'torch' else 'onnx'}")
    assert str(PROJECT).encode() not in path.read_bytes(), "no path of the machine that made it"
    assert_same_logits(LOAD[file_format](path), images, logits_of(exits_run, images)[1:2])
    model = fold_batch_norms(load_network(exits_run)[0])
    trunk = model.trunk
    needed = sum(
        tensor.numel()
        for part in (trunk.conv1, trunk.layer1, trunk.layer2, model.branches[1])
        for tensor in part.parameters()
    )
    if file_format == "torch":
        assert sum(tensor.numel() for tensor in torch.export.load(path).parameters()) == needed
    else:
        assert path.stat().st_size < 4 * sum(tensor.numel() for tensor in model.parameters())
    (exit,) = read_json(path.with_name("manifest.json"))["exits"]
    assert exit == {"exit": 2, "temperature": 1.3, "threshold": 0.3, "cost": measure_costs(model, 8).alone()[1]}


@pytest.mark.slow
def test_the_example_stops_early_as_predicting_does(exits_run, images, call, monkeypatch, capsys):
    """Word for word as in docs/predict.md; the exit that is not asked does not answer there either."""
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(exits_run.parents[2])
    assert call(export, "outputs/runs/NAME", "--format", "onnx", "--stages")[0] == 0
    exported(exits_run / "export" / "onnx-stages", *(f"stage-{number}.onnx" for number in range(1, 5)))
    Image.fromarray(random_pixels(1, size=8)[0]).save("photo.jpg")
    names: dict[str, Any] = {}
    exec(compile(EXAMPLE, "docs/predict.md", "exec"), names)
    ((name, probability, number),) = ast.literal_eval(capsys.readouterr().out)

    predictor = byot.load(exits_run, "cpu")
    (photo,) = predictor.predict(["photo.jpg"])
    assert (name, probability, number) == (photo.name, pytest.approx(photo.probability, abs=1e-5), photo.exit)
    expected = predictor.predict(load_images("digits", None, "test").images)
    found = names["classify"](images)
    assert {number for *_, number in found} == {1, 2, 4}
    assert [(name, number) for name, _, number in found] == [(answer.name, answer.exit) for answer in expected]
    assert [share for _, share, _ in found] == pytest.approx([answer.probability for answer in expected], abs=1e-5)


def test_a_plain_network_is_one_graph_with_the_fourth_exit(plain_run, images, works, refused):
    works(export, plain_run, "--format", "torch", "--stages")
    (path,) = exported(plain_run / "export" / "torch-stages", "stage-4.pt2")
    assert_same_logits(load_torch(path), images, logits_of(plain_run, images))
    assert read_json(path.with_name("manifest.json"))["exits"] == [
        {"exit": 4, "temperature": 1.0, "threshold": 0.0, "cost": 1.0}
    ]
    refused(export, plain_run, "--format", "torch", "--exit", 2, words=("--exit must be one of 4, not 2",))


# ---------------------------------------------------------------- files
@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that take no time to make."""
    monkeypatch.setattr("byot.graphs.encode", lambda graph, file_format: graph.name.encode())


@pytest.mark.usefixtures("quick")
def test_an_export_replaces_an_earlier_one_as_a_whole_or_not_at_all(exits_run, works, refused, tmp_path, monkeypatch):
    output = tmp_path / "made"
    works(export, exits_run, "--format", "torch", "--stages", "--output", output)
    before = picture_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_json", Mock(side_effect=OSError(28, "No space left on device")))
        words = (str(output), "No space left on device")
        refused(export, exits_run, "--format", "torch", "--output", output, words=words)
    assert picture_of(tmp_path) == before
    works(export, exits_run, "--format", "torch", "--output", output)
    exported(output, "all-exits.pt2")
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("with_export", [True, False])
@pytest.mark.parametrize(("name", "text"), [("thesis.txt", "the only copy"), ("manifest.json", '{"name": "my site"}')])
def test_a_folder_of_something_else_is_left_alone(exits_run, works, refused, tmp_path, with_export, name, text):
    output = tmp_path / "mine"
    output.mkdir()
    if with_export:
        works(export, exits_run, "--format", "torch", "--output", output)
    (output / name).write_text(text)
    before = picture_of(output)
    refused(export, exits_run, "--format", "torch", "--output", output, words=("holds other files than an export",))
    assert picture_of(output) == before


@pytest.mark.usefixtures("quick")
def test_stages_without_thresholds_are_told(alone, call):
    code, _, err = call(export, alone, "--format", "torch", "--stages")
    assert code == 0
    assert_one_sentence(err, f"`python byot/evaluate.py {alone} --exits`")
    manifest = read_json(alone.parent / "export" / "torch-stages" / "manifest.json")
    assert [exit["threshold"] for exit in manifest["exits"]] == [2.0, 2.0, 2.0, 0.0]


def test_a_missing_package_is_told_with_its_extra(exits_run, refused, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    words = ("--format onnx needs onnx and onnxscript: pip install 'byot[export]'",)
    refused(export, exits_run, "--format", "onnx", words=words)
