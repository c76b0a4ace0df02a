"""A ResNet with a classifier after each of its four stages.

B batch, C classes, D feature width, K = 4 classifiers, ordered shallow to deep: [-1] is the deepest.
"""

import copy
import math
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from byot.config import BranchKind
from byot.system.fused import AnyBatchNorm, norm_relu

STAGE_CHANNELS = (64, 128, 256, 512)  # of the published network, before the width scales them

# A matrix product trains a convolution faster up to these ratios, as measured: the pixels that a batch's result has,
# times those of the kernel, over the channels of the result.
LARGEST_RATIO_BF16, LARGEST_RATIO = 36, 27
LEAST_WEIGHTS = 2**18  # with fewer it is not faster in float32


class BranchOutputs(NamedTuple):
    """What every classifier says of a batch, shallow to deep."""

    logits: tuple[Tensor, ...]  # K x [B, C]
    features: tuple[Tensor, ...]  # K x [B, D], pooled, before the linear classifier


def make_downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Build what brings a block's input to the shape of its output; None where it has that already."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        DownsampleConv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class Conv2d(nn.Conv2d):
    """A convolution, trained on a CPU as one matrix product where the feature map is small for its weights.

    The weights and the result are the same but for rounding. oneDNN's convolution takes several times as long there
    (512 channels of 2 x 2 pixels, a batch of 128 in bfloat16, on AMX: 126 ms instead of 13), mostly for the gradients.
    """

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, out_channels, H', W']
        if not self._is_small(x):
            return super().forward(x)
        k, stride, padding = self._geometry()
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))  # [B, H, W, C]
        seen: Tensor = x[:, ::stride, ::stride] if k == 1 else SeenByKernel.apply(x, k, stride)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # [out_channels, k * k * C]
        return F.linear(seen, weight, self.bias).permute(0, 3, 1, 2)

    def _is_small(self, x: Tensor) -> bool:
        if not (self.training and x.device.type == "cpu" and self.groups == 1) or torch.compiler.is_compiling():
            return False
        k, stride, padding = self._geometry()
        pixels = len(x) * math.prod((size + 2 * padding - k) // stride + 1 for size in x.shape[2:])
        ratio = pixels * k * k / self.out_channels
        if x.dtype == torch.bfloat16:
            return ratio <= LARGEST_RATIO_BF16
        return ratio <= LARGEST_RATIO and self.weight.numel() >= LEAST_WEIGHTS

    def _geometry(self) -> tuple[int, int, int]:
        return self.kernel_size[0], self.stride[0], int(self.padding[0])


class SeenByKernel(torch.autograd.Function):
    """Puts beside each other the pixels that a k x k kernel sees: [B, H, W, C] -> [B, H', W', k * k * C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, stride: int) -> Tensor:
        ctx.shape, ctx.k, ctx.stride = x.shape, k, stride
        return torch.cat(SeenByKernel.shifted(x, k, stride), dim=3)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx = gradients[0].new_zeros(ctx.shape)
        parts = gradients[0].split(ctx.shape[3], dim=3)
        for part, pixels in zip(parts, SeenByKernel.shifted(dx, ctx.k, ctx.stride), strict=True):
            pixels += part
        return dx, None, None

    @staticmethod
    def shifted(x: Tensor, k: int, stride: int) -> list[Tensor]:
        """Return views of the pixels under each of the kernel's."""
        rows, columns = (stride * ((size - k) // stride + 1) for size in x.shape[1:3])
        return [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(k) for j in range(k)]


class DownsampleConv2d(Conv2d):
    """A 1x1 convolution that drops the pixels its stride skips before it, where channels are few.

    The weights and the result are the same. With fewer channels than a vector register holds, oneDNN's backward pass of
    a strided 1x1 convolution in channels-last memory writes out of bounds: seen on processors with AVX2 below 8
    channels, where it kills the process.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels >= 16:
            return super().forward(x)
        rows, columns = self.stride
        return F.conv2d(
            x[:, :, ::rows, ::columns].contiguous(memory_format=torch.channels_last), self.weight, self.bias
        )


class BasicBlock(nn.Module):
    """Adds its input to the result of two 3x3 convolutions (He et al., 2016)."""

    expansion = 1  # of the channels

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int, group_width: int) -> None:
        super().__init__()
        assert (groups, group_width) == (1, 64)
        self.conv1 = Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = make_downsample(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(x), identity)


class Bottleneck(nn.Module):
    """Adds its input to the result of 1x1, 3x3 and 1x1 convolutions; the 3x3 one has the stride, as in torchvision.

    The 3x3 one has `groups`, each of `group_width` channels where `channels` is 64 (Xie et al., 2017).
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int, group_width: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        inner = max(1, channels * group_width // 64) * groups
        self.conv1 = Conv2d(in_channels, inner, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = Conv2d(inner, inner, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = Conv2d(inner, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = make_downsample(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = norm_relu(self.bn1, self.conv1(x))
        x = norm_relu(self.bn2, self.conv2(x))
        return norm_relu(self.bn3, self.conv3(x), identity)


class Architecture(NamedTuple):
    """What a network's name stands for, as in torchvision."""

    block: type[BasicBlock | Bottleneck]
    num_blocks: tuple[int, int, int, int]  # of the stages
    groups: int = 1
    group_width: int = 64


ARCHITECTURES = {
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Architecture(Bottleneck, (3, 8, 36, 3)),
    "wide_resnet50_2": Architecture(Bottleneck, (3, 4, 6, 3), group_width=128),
    "wide_resnet101_2": Architecture(Bottleneck, (3, 4, 23, 3), group_width=128),
    "resnext50_32x4d": Architecture(Bottleneck, (3, 4, 6, 3), groups=32, group_width=4),
    "resnext101_32x8d": Architecture(Bottleneck, (3, 4, 23, 3), groups=32, group_width=8),
}


class ResNet(nn.Module):
    """A ResNet of a scaled width with the CIFAR stem (3x3 convolution, stride 1, no pooling) or ImageNet's.

    Its parameters bear torchvision's names. It is written out here since importing torchvision costs each worker of a
    search two seconds.
    """

    def __init__(self, model: str, num_classes: int, width: int, *, imagenet_stem: bool = False) -> None:
        super().__init__()
        block, num_blocks, groups, group_width = ARCHITECTURES[model]
        self.maxpool: nn.Module = nn.Identity()
        if imagenet_stem:
            self.conv1 = Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = [c * width // STAGE_CHANNELS[0] for c in STAGE_CHANNELS]
        self.stage_channels = [c * block.expansion for c in channels]  # of the feature maps that leave the stages
        before = [width, *self.stage_channels]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                block(before[i], channels[i], 1 if i == 0 else 2, groups, group_width),
                *(block(before[i + 1], channels[i], 1, groups, group_width) for _ in range(num_blocks[i] - 1)),
            )
            for i in range(len(channels))
        )
        self.fc = nn.Linear(self.stage_channels[-1], num_classes)
        initialise_convolutions(self)

    def stem(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, width, H, W], ImageNet's [B, width, H / 4, W / 4]
        x: Tensor = self.maxpool(norm_relu(self.bn1, self.conv1(images)))
        return x

    def stages(self) -> tuple[nn.Sequential, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4


def initialise_convolutions(module: nn.Module) -> None:
    """Draw all weights of convolutions from kaiming_normal of the outputs, as torchvision and the reference do."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel size, done as one matrix product over the patches.

    Its weights and result are those of nn.Conv2d. It is quicker on CPUs, and right where oneDNN's bfloat16 convolution
    gives meaningless numbers: with a kernel that covers the whole image (pytorch issue 163347).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=kernel_size, stride=kernel_size)

    def forward(self, feature_map: Tensor) -> Tensor:  # [B, C, H, W] -> [B, out_channels, H / k, W / k]
        batch_size, channels, height, width = feature_map.shape
        k = self.kernel_size[0]
        rows, columns = height // k, width // k
        x = feature_map[:, :, : rows * k, : columns * k].permute(0, 2, 3, 1)  # [B, H, W, C]
        x = x.reshape(batch_size, rows, k, columns, k, channels).transpose(2, 3)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # [out_channels, k * k * C]
        return F.linear(x.flatten(3), weight, self.bias).permute(0, 3, 1, 2)


class Branch(nn.Module):
    """Brings a shallow stage's feature map to the shape of the deepest one and classifies it.

    1x1 convolution to `middle` channels, k x k convolution of stride k, 1x1 convolution to `out_channels`, each with
    bias, batch normalisation and ReLU; then global average pooling and a linear classifier. A wide one halves the
    feature map by a 3x3 convolution of stride 2 after the first, which leaves k / 2 for the second.
    Source: luanyunteng/pytorch-be-your-own-teacher; its users found that a further convolution helps (its issue 3).
    """

    def __init__(
        self, in_channels: int, middle: int, out_channels: int, kernel_size: int, num_classes: int, *, wide: bool
    ) -> None:
        super().__init__()
        convolutions: list[nn.Conv2d] = [Conv2d(in_channels, middle, kernel_size=1)]
        if wide:
            convolutions.append(Conv2d(middle, middle, kernel_size=3, stride=2, padding=1))
            kernel_size //= 2
        if kernel_size > 1:
            convolutions.append(PatchConv2d(middle, middle, kernel_size))
        convolutions.append(Conv2d(middle, out_channels, kernel_size=1))
        layers = [(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)) for conv in convolutions]
        self.bottleneck = nn.Sequential(*chain.from_iterable(layers))
        self.fc = nn.Linear(out_channels, num_classes)
        initialise_convolutions(self)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        x = feature_map
        for i in range(0, len(self.bottleneck), 3):
            convolution, norm, _ = self.bottleneck[i : i + 3]
            assert isinstance(norm, AnyBatchNorm | nn.Identity)
            x = norm_relu(norm, convolution(x))
        feature = x.mean(dim=(2, 3))  # [B, D]
        return self.fc(feature), feature


class BranchedResNet(nn.Module):
    """A ResNet trunk whose four stages each end in a classifier.

    Images must be at least 8 pixels on a side, with ImageNet's stem 32. Without branches it is an ordinary ResNet, with
    the deepest classifier alone (K = 1) and the same initial weights.
    """

    def __init__(
        self,
        model: str,
        num_classes: int,
        width: int = 64,
        *,
        branch: BranchKind | None = "reference",
        imagenet_stem: bool = False,
    ) -> None:
        """`branch` None is for a network without. The reference's branches have a quarter of the deepest feature map's
        channels in their middle; lean and wide ones as many as those of a network of basic blocks.
        """
        super().__init__()
        self.trunk = ResNet(model, num_classes, width, imagenet_stem=imagenet_stem)
        *shallow, deepest = self.trunk.stage_channels
        if branch is None:
            shallow = []
        middle = deepest // 4
        if branch != "reference":
            middle //= ARCHITECTURES[model].block.expansion
        self.branches = nn.ModuleList(
            Branch(channels, middle, deepest, 2 ** (len(shallow) - i), num_classes, wide=branch == "wide")
            for i, channels in enumerate(shallow)
        )

    def forward(self, images: Tensor) -> BranchOutputs:  # [B, 3, H, W]
        x = self.trunk.stem(images)
        outputs: list[tuple[Tensor, Tensor]] = []
        for i, stage in enumerate(self.trunk.stages()):
            x = stage(x)
            if len(self.branches) > 0 or i == len(STAGE_CHANNELS) - 1:
                outputs.append(self.classify(i, x))
        logits, features = zip(*outputs, strict=True)
        return BranchOutputs(logits, features)

    def classify(self, stage: int, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Give logits [B, C] and feature [B, D] of the classifier after a stage, numbered from 0."""
        if stage < len(self.branches):
            return self.branches[stage](feature_map)
        feature = feature_map.mean(dim=(2, 3))
        return self.trunk.fc(feature), feature


def fold_batch_norms(model: BranchedResNet) -> BranchedResNet:
    """Copy a network for prediction alone: each batch normalisation becomes part of the convolution before it.

    That is faster, and the same but for rounding.
    """
    model = copy.deepcopy(model).eval()
    for parent in model.modules():
        for (name, convolution), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, norm_name, nn.Identity())
    return model
