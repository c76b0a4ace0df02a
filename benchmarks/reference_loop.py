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

from byot.config import TrainConfig
from byot.model import ARCHITECTURES, STAGE_CHANNELS, CifarResNet

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
        self.trunk = CifarResNet(block, layers, num_classes, width)
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
