"""Holds byot/model.py to torchvision's ResNet, to the reference's branches and their published sizes, and to seeds."""

from itertools import zip_longest
from typing import Any, get_args

import pytest
import torch
import torchvision
from torch import Tensor, nn

from byot.config import NUM_CLASSIFIERS, BranchKind, ModelName, TrainConfig
from byot.exits import measure_costs
from byot.loss import self_distillation_loss
from byot.model import BranchedResNet, Conv2d, PatchConv2d, fold_batch_norms
from byot.system.paths import PROJECT_ROOT
from byot.trainer import build_model

EXPANSION = {"resnet18": 1, "resnet34": 1, "resnet50": 4, "resnet101": 4, "resnet152": 4}


def stir_batch_norms(model: nn.Module, seed: int = 0) -> None:
    """Give every batch normalisation statistics and weights of its own: fresh ones are all 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for values, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.1, 0.3),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
            ):
                values.copy_(torch.rand(values.shape, generator=generator) * (high - low) + low)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 8), ("resnet18", 16), ("resnext50_32x4d", 64)])
def test_folded_batch_norms_change_nothing_and_are_gone(name, width):
    model = BranchedResNet(name, num_classes=10, width=width).double()
    stir_batch_norms(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norms(model)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        for found, expected in zip(folded(images), model.eval()(images), strict=True):
            torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "imagenet_stem"),
    [("resnet18", False), ("resnet34", False), ("resnet50", False), ("resnet18", True), ("resnext50_32x4d", True)],
)
def test_deepest_classifier_is_torchvisions_resnet(name, imagenet_stem):
    ours = BranchedResNet(name, num_classes=100, branch=None, imagenet_stem=imagenet_stem).double().eval()
    stir_batch_norms(ours)
    theirs: Any = getattr(torchvision.models, name)(num_classes=100)
    if not imagenet_stem:
        theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        theirs.maxpool = nn.Identity()
    theirs = theirs.double().eval()
    theirs.load_state_dict(ours.trunk.state_dict())
    size = 72 if imagenet_stem else 32
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        found, expected = ours(images).logits[-1], theirs(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def reference_branch(branch: Any, x: Tensor, out_channels: int, kernel_size: int) -> Tensor:
    """The reference's branch spelled out one operation after the other, with the weights of ours."""
    weights = [p for p in branch.bottleneck.state_dict().values() if p.dim() != 0]  # without the batch counters
    shapes = [(1, x.shape[1]), (kernel_size, out_channels // 4), (1, out_channels // 4)]
    for i, (kernel, channels) in enumerate(shapes):
        weight, bias, scale, shift, mean, variance = weights[6 * i : 6 * i + 6]
        assert weight.shape[1:] == (channels, kernel, kernel)
        x = nn.functional.conv2d(x, weight, bias, stride=kernel)
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        x = (x * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
    return x.flatten(2).mean(dim=2)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 8), ("resnet50", 4), ("resnet18", 1)])
def test_branches_are_the_references(name, width):
    model = BranchedResNet(name, num_classes=10, width=width).double().eval()
    stir_batch_norms(model)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        outputs = model(images)
        x = model.trunk.stem(images)
        for i, stage in enumerate(model.trunk.stages()[:3]):
            x = stage(x)
            branch: Any = model.branches[i]
            feature = reference_branch(branch, x, 8 * width * EXPANSION[name], kernel_size=(8, 4, 2)[i])
            torch.testing.assert_close(outputs.features[i], feature, rtol=1e-9, atol=1e-12)
            logits = feature @ branch.fc.weight.T + branch.fc.bias
            torch.testing.assert_close(outputs.logits[i], logits, rtol=1e-9, atol=1e-12)
        deepest = model.trunk.layer4(x).flatten(2).mean(dim=2)
        torch.testing.assert_close(outputs.features[3], deepest, rtol=1e-9, atol=1e-12)


# Width 64: parameters of the three branches, and their multiply-adds for 32 x 32 pixels, the plain network's being 1.
BRANCHES: dict[tuple[ModelName, BranchKind], tuple[tuple[int, ...], tuple[float, ...]]] = {
    ("resnet18", "reference"): ((1_175_908, 397_668, 217_444), (0.0473, 0.0171, 0.0076)),
    ("resnet18", "lean"): ((1_175_908, 397_668, 217_444), (0.0473, 0.0171, 0.0076)),
    ("resnet18", "wide"): ((537_316, 348_900, 299_364), (0.0926, 0.0284, 0.0100)),
    ("resnet50", "reference"): ((18_170_980, 5_719_140, 2_835_556), (0.3233, 0.1165, 0.0519)),
    ("resnet50", "lean"): ((1_555_300, 801_636, 670_564), (0.0422, 0.0195, 0.0107)),
    ("resnet50", "wide"): ((916_708, 752_868, 752_484), (0.0616, 0.0244, 0.0117)),
}


@pytest.mark.parametrize(("name", "branch"), BRANCHES)
def test_branches_cost_what_the_documentation_says(name, branch):
    model = build_model(TrainConfig(model=name, branch=branch))
    costs = measure_costs(model, 32)
    sizes, shares = BRANCHES[name, branch]
    assert tuple(sum(p.numel() for p in part.parameters()) for part in model.branches) == sizes
    assert [cost / costs.plain for cost in costs.classifiers[:3]] == pytest.approx(shares, abs=5e-5)
    page = (PROJECT_ROOT / "docs" / "train.md").read_text()
    told = f"| {name} | {branch} | {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million |"
    assert f"{told} {' | '.join(f'{cost:.3f}' for cost in costs.alone()[:3])} |" in page


@pytest.mark.parametrize("name", get_args(ModelName))
def test_every_network_has_torchvisions_parameters(name):
    """By name and shape, with the ImageNet stem: its published weights fit."""
    with torch.device("meta"):
        ours = BranchedResNet(name, num_classes=1000, imagenet_stem=True).trunk
        theirs = getattr(torchvision.models, name)()
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", get_args(BranchKind))
def test_branches_end_in_the_deepest_shape_with_the_imagenet_stem(kind):
    """7 x 7 of an image of 224 pixels."""
    with torch.device("meta"):
        model = BranchedResNet("resnet18", num_classes=10, width=16, branch=kind, imagenet_stem=True).eval()
        x = model.trunk.stem(torch.empty(1, 3, 224, 224))
        shapes = []
        for stage, branch in zip_longest(model.trunk.stages(), model.branches):
            x = stage(x)
            shapes.append((x if branch is None else branch.get_submodule("bottleneck")(x)).shape)
    assert shapes == [(1, 128, 7, 7)] * NUM_CLASSIFIERS


@pytest.mark.parametrize(
    ("name", "branch"), [("resnet18", "reference"), ("resnet50", "reference"), ("resnet18", "wide")]
)
def test_every_parameter_learns(name, branch):
    """Dead modules are one of the reference's known weaknesses.

    A bias right before a batch normalisation in training mode has a gradient of 0 by nature, so that the second half
    is asked in evaluation mode, where the normalisation is a fixed scale and shift.
    """
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(16, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (16,), generator=generator)
    model = BranchedResNet(name, num_classes=10, width=8, branch=branch)

    def gradients() -> dict[str, Tensor | None]:
        model.zero_grad()
        self_distillation_loss(model(images), labels, alpha=0.3, temperature=3, beta=1e-4).total.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    assert [n for n, g in gradients().items() if g is None] == []
    stir_batch_norms(model.eval())
    assert [n for n, g in gradients().items() if g is None or not g.any()] == []


@pytest.mark.parametrize("classifier", range(NUM_CLASSIFIERS))
def test_a_classifier_teaches_its_own_stages_and_branch_alone(classifier):
    model = BranchedResNet("resnet18", num_classes=10, width=4).eval()
    stir_batch_norms(model)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    model(images).logits[classifier].square().sum().backward()
    reached = {".".join(n.split(".")[:2]) for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    trunk = {f"trunk.layer{i + 1}" for i in range(classifier + 1)} | {"trunk.conv1", "trunk.bn1"}
    assert reached == trunk | {f"branches.{classifier}" if classifier < 3 else "trunk.fc"}


@pytest.mark.parametrize("name", sorted(EXPANSION))
def test_width_scales_the_channels_of_stem_stages_and_branches(name):
    with torch.device("meta"):
        published, half = (BranchedResNet(name, num_classes=10, width=width) for width in (64, 32))
    shapes = {key: value.shape for key, value in half.state_dict().items()}
    for key, value in published.state_dict().items():
        # a dimension that counts channels is halved; images' colours, classes and kernel sizes are not
        keep = {3, 10, 1, 2, 4, 8}
        expected = [n if (i >= 2 or n in keep) else n // 2 for i, n in enumerate(value.shape)]
        assert list(shapes.pop(key)) == expected, key
    assert not shapes
    assert published.trunk.conv1.weight.shape == (64, 3, 3, 3)
    stages: tuple[Any, ...] = published.trunk.stages()
    last = [[m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)] for stage in stages]
    channels = [64, 128, 256, 512]
    assert [max(m.num_features for m in stage) for stage in last] == [c * EXPANSION[name] for c in channels]


def test_initial_weights_depend_on_the_seed_alone():
    config = TrainConfig(dataset="digits", width=4, seed=5)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = build_model(config).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
    torch.manual_seed(7)
    # nothing but the network and its seed may decide: not the loss weights, the schedule or the data order
    again = build_model(config.with_settings(alpha=0.9, lr=1.0, epochs=3, split_seed=4)).state_dict()
    other = build_model(config.with_settings(seed=6)).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["trunk.conv1.weight"], other["trunk.conv1.weight"])
    assert not torch.equal(first["branches.0.fc.weight"], other["branches.0.fc.weight"])


def test_convolutions_start_as_kaiming_normal_fan_out():
    model = build_model(TrainConfig(width=64))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            expected = (2 / fan_out) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06), name
            assert abs(module.weight.mean().item()) < 0.06 * expected, name


@pytest.mark.parametrize("image_size", [8, 32])
@pytest.mark.parametrize(
    ("name", "width", "branch"),
    [
        ("resnet18", 4, "reference"),
        ("resnet18", 8, "reference"),
        ("resnet18", 16, "reference"),
        ("resnet50", 2, "reference"),
        ("resnet18", 4, "wide"),
        ("resnet18", 16, "wide"),
        ("resnet50", 8, "lean"),
    ],
)
def test_mixed_precision_computes_the_same_network(name, width, branch, image_size):
    """bfloat16 has 8 bits: its outputs are off by percents at most.

    oneDNN's channels-last bfloat16 convolution has been seen to give numbers that have nothing to do with the truth
    where the kernel covers the whole image (pytorch issue 163347), which is branch 1 on the 8 x 8 digits.
    """
    model = BranchedResNet(name, num_classes=10, width=width, branch=branch)
    model = model.to(memory_format=torch.channels_last).eval()
    stir_batch_norms(model)
    images = torch.randn(32, image_size, image_size, 3, generator=torch.Generator().manual_seed(1)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(images)
    errors = [((b.float() - a).norm() / a.norm()).item() for a, b in zip(exact.features, rounded.features, strict=True)]
    assert max(errors) < 0.05, errors


@pytest.mark.parametrize(("kernel_size", "height", "width"), [(8, 8, 8), (8, 32, 32), (4, 16, 16), (2, 9, 6)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patch_convolution_equals_the_convolution(kernel_size, height, width, memory_format):
    """Values and gradients, also where the image is no multiple of the kernel; the weights are interchangeable."""
    patches = PatchConv2d(3, 5, kernel_size).double().to(memory_format=memory_format)
    plain = torch.nn.Conv2d(3, 5, kernel_size, stride=kernel_size).double()
    plain.load_state_dict(patches.state_dict())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, height, width, dtype=torch.float64, generator=generator)
    found, expected = patches(images.to(memory_format=memory_format)), plain(images)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(patches.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "height", "width"), [(3, 1, 2, 2), (3, 2, 5, 4), (3, 1, 1, 1), (1, 2, 3, 4), (1, 1, 2, 3)]
)
def test_a_convolution_of_small_feature_maps_is_trained_as_a_matrix_product(
    kernel_size, stride, height, width, dtype, monkeypatch
):
    """Values and gradients are the convolution's; prediction, groups, large feature maps and few weights in float32
    are left to oneDNN."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"stride": stride, "padding": kernel_size // 2, "dtype": dtype}
    small = Conv2d(64, 96, kernel_size, **settings).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(64, 96, kernel_size, **settings)
    plain.load_state_dict(small.state_dict())
    images = torch.randn(3, 64, height, width, dtype=dtype).to(memory_format=torch.channels_last)

    def is_convolution(module: nn.Module, x: Tensor) -> bool:
        return "Convolution" in module(x).grad_fn.name()

    assert is_convolution(small, images) == (dtype == torch.float64)
    monkeypatch.setattr("byot.model.LEAST_WEIGHTS", 0)
    assert not is_convolution(small, images)
    results = []
    for module in (small, plain):
        x = images.clone().requires_grad_()
        y = module(x)
        results.append([y, *torch.autograd.grad(y, (x, *module.parameters()), torch.ones_like(y))])
    rtol, atol = (0.02, 0.1) if dtype == torch.bfloat16 else (1e-7, 1e-7)
    torch.testing.assert_close(*results, rtol=rtol, atol=atol)
    assert is_convolution(small, torch.randn(2, 64, 96, 96, dtype=dtype))
    assert is_convolution(small.eval(), images)
    assert is_convolution(Conv2d(64, 96, kernel_size, groups=2, **settings), images)
