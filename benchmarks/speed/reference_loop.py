"""A plain training loop that works the way the reference implementation does, to measure speed and memory against.

Written from the description of its behaviour, not from its code: images are PIL objects transformed one by one in a
DataLoader, tensors are float32 NCHW, every loss and accuracy is read back to the host at each step, the branches'
convolutions are ordinary ones, and each branch carries a 1x1 convolution with batch normalisation that nothing uses.
Source of the facts: luanyunteng/pytorch-be-your-own-teacher.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from byot.config import TrainConfig

STAGE_CHANNELS = (64, 128, 256, 512)
ARCHITECTURES: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class PilImages(Dataset[tuple[Tensor, int]]):
    """Images that are cropped, mirrored and normalised one at a time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


class PlainResNet(ResNet):
    """torchvision's network with a 3x3 convolution as its stem, no pooling after it and a scaled width."""

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: list[int], num_classes: int, width: int) -> None:
        self._width = width
        super().__init__(block, layers, num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(self._scaled(STAGE_CHANNELS[-1]) * block.expansion, num_classes)

    def _scaled(self, planes: int) -> int:
        return planes * self._width // STAGE_CHANNELS[0]

    def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:  # type: ignore[no-untyped-def]
        if planes == STAGE_CHANNELS[0]:
            self.inplanes = self._width
        return super()._make_layer(block, self._scaled(planes), *args, **kwargs)

    def stages(self) -> tuple[nn.Sequential, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4


def make_bottleneck(channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    middle = out_channels // 4
    return nn.Sequential(
        nn.Conv2d(channels, middle, 1),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, middle, kernel_size, stride=kernel_size),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, out_channels, 1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class ReferenceNet(nn.Module):
    """The four classifiers, with the modules that are built and never used."""

    def __init__(self, model: str, width: int, num_classes: int) -> None:
        super().__init__()
        block, layers = ARCHITECTURES[model]
        self.trunk = PlainResNet(block, layers, num_classes, width)
        *shallow, deepest = [c * width // 64 * block.expansion for c in STAGE_CHANNELS]
        self.bottlenecks = nn.ModuleList(make_bottleneck(c, deepest, 8 // 2**i) for i, c in enumerate(shallow))
        self.classifiers = nn.ModuleList(nn.Linear(deepest, num_classes) for _ in shallow)
        self.unused = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, deepest, 1, bias=False), nn.BatchNorm2d(deepest)) for c in shallow
        )

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        x = self.trunk.relu(self.trunk.bn1(self.trunk.conv1(images)))
        logits, features = [], []
        *shallow, deepest = self.trunk.stages()
        for stage, bottleneck, classifier in zip(shallow, self.bottlenecks, self.classifiers, strict=True):
            x = stage(x)
            features.append(F.adaptive_avg_pool2d(bottleneck(x), 1).flatten(1))
            logits.append(classifier(features[-1]))
        features.append(F.adaptive_avg_pool2d(deepest(x), 1).flatten(1))
        return [*logits, self.trunk.fc(features[-1])], features


class ReferenceLoop:
    """Trains epoch after epoch over the same images."""

    def __init__(self, config: TrainConfig, images: np.ndarray, labels: np.ndarray, num_workers: int = 0) -> None:
        """images [N, 32, 32, 3] uint8, labels [N]."""
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.loader = DataLoader(
            PilImages(images, labels), config.batch_size, shuffle=True, num_workers=num_workers, drop_last=True
        )
        self.model = ReferenceNet(config.model, config.width, num_classes=100).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def epoch(self) -> Iterator[dict[str, float]]:
        """Yield what the meters read at each step."""
        self.model.train()
        for images, labels in self.loader:
            yield self._step(images.to(self.device), labels.to(self.device))

    def _step(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        config = self.config
        logits, features = self.model(images)
        label = [F.cross_entropy(z, labels) for z in logits]
        softened = F.softmax(logits[-1].detach() / config.temperature, dim=1)
        distillation = [
            -(softened * F.log_softmax(z / config.temperature, dim=1)).sum(dim=1).mean() * config.temperature**2
            for z in logits[:-1]
        ]
        hint = [(f - features[-1].detach()).square().sum() for f in features[:-1]]
        total = (1 - config.alpha) * sum(label) + config.alpha * sum(distillation) + config.beta * sum(hint)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        meters = {"total": total.item()}
        for i, z in enumerate(logits, start=1):
            meters[f"label_{i}"] = label[i - 1].item()
            meters[f"accuracy_{i}"] = (z.argmax(dim=1) == labels).float().mean().item() * 100
        for i, (d, h) in enumerate(zip(distillation, hint, strict=True), start=1):
            meters |= {f"distillation_{i}": d.item(), f"hint_{i}": h.item()}
        return meters
