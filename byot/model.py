"""A CIFAR ResNet with a classifier after each of its four stages.

B batch, C classes, D feature width, K = 4 classifiers, ordered shallow to deep: [-1] is the deepest.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

STAGE_CHANNELS = (64, 128, 256, 512)  # torchvision's, before the width scales them
ARCHITECTURES: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}


class BranchOutputs(NamedTuple):
    """What every classifier says of a batch, shallow to deep."""

    logits: tuple[Tensor, ...]  # K x [B, C]
    features: tuple[Tensor, ...]  # K x [B, D], pooled, before the linear classifier


class CifarResNet(ResNet):
    """torchvision's ResNet with the CIFAR stem (3x3 convolution, stride 1, no pooling) and a scaled width."""

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: list[int], num_classes: int, width: int) -> None:
        self._width = width
        super().__init__(block, layers, num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(self._scaled(STAGE_CHANNELS[-1]) * block.expansion, num_classes)

    def _scaled(self, planes: int) -> int:
        return planes * self._width // STAGE_CHANNELS[0]

    def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:  # type: ignore[no-untyped-def]
        # torchvision fixes the channels of stem and stages; this is where they are scaled.
        if planes == STAGE_CHANNELS[0]:
            self.inplanes = self._width
        return super()._make_layer(block, self._scaled(planes), *args, **kwargs)

    def stages(self) -> tuple[nn.Sequential, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel size, done as one matrix product over the patches.

    Same weights and result as nn.Conv2d, quicker on CPUs, and right where oneDNN's bfloat16 convolution is not: there a
    kernel that covers the whole image gives numbers of no meaning (pytorch issue 163347).
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

    1x1 convolution to a quarter of the channels, k x k convolution of stride k, 1x1 convolution to `out_channels`,
    each with bias, batch normalisation and ReLU; then global average pooling and a linear classifier.
    Source: luanyunteng/pytorch-be-your-own-teacher.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, num_classes: int) -> None:
        super().__init__()
        middle = out_channels // 4
        self.bottleneck = nn.Sequential(
            nn.Conv2d(in_channels, middle, kernel_size=1),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            PatchConv2d(middle, middle, kernel_size),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, out_channels, kernel_size=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
        self.fc = nn.Linear(out_channels, num_classes)
        for module in self.bottleneck.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.bottleneck(feature_map).mean(dim=(2, 3))  # [B, D]
        return self.fc(feature), feature


class BranchedResNet(nn.Module):
    """A ResNet trunk whose four stages each end in a classifier. Images must be at least 8 pixels on a side."""

    def __init__(self, model: str, num_classes: int, width: int = 64) -> None:
        super().__init__()
        block, layers = ARCHITECTURES[model]
        self.trunk = CifarResNet(block, layers, num_classes, width)
        channels = [c * width // STAGE_CHANNELS[0] * block.expansion for c in STAGE_CHANNELS]
        self.branches = nn.ModuleList(
            Branch(channels[i], channels[-1], kernel_size=2 ** (3 - i), num_classes=num_classes) for i in range(3)
        )

    def forward(self, images: Tensor) -> BranchOutputs:  # [B, 3, H, W]
        trunk = self.trunk
        x = trunk.relu(trunk.bn1(trunk.conv1(images)))
        logits: list[Tensor] = []
        features: list[Tensor] = []
        *shallow, deepest = trunk.stages()
        for stage, branch in zip(shallow, self.branches, strict=True):
            x = stage(x)
            branch_logits, branch_feature = branch(x)
            logits.append(branch_logits)
            features.append(branch_feature)
        feature = deepest(x).mean(dim=(2, 3))  # [B, D]
        return BranchOutputs((*logits, trunk.fc(feature)), (*features, feature))
