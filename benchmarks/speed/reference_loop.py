"""Trains in a plain loop, the way the reference implementation does, to measure speed and memory against.

Written from the description of its behaviour, not from its code: images are PIL objects transformed one by one in a
DataLoader, tensors are float32 NCHW, every loss and accuracy is read back to the host at each step, the branches'
convolutions are ordinary ones, and each branch carries a 1x1 convolution with batch normalisation that nothing uses.
Source of the facts: luanyunteng/pytorch-be-your-own-teacher.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models.resnet import BasicBlock, Bottleneck

from byot.config import TrainConfig
from byot.data import REFERENCE_MEAN, REFERENCE_STD
from byot.model import ARCHITECTURES, STAGE_CHANNELS, initialise_convolutions


class PilImages(Dataset[tuple[Tensor, int]]):
    """Images that are cropped, mirrored and normalised one at a time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(REFERENCE_MEAN, REFERENCE_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def make_bottleneck(channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Make a branch's three ordinary convolutions, each with batch normalisation and ReLU."""
    middle = out_channels // 4
    convolutions = (
        nn.Conv2d(channels, middle, 1),
        nn.Conv2d(middle, middle, kernel_size, stride=kernel_size),
        nn.Conv2d(middle, out_channels, 1),
    )
    return nn.Sequential(*(part for c in convolutions for part in (c, nn.BatchNorm2d(c.out_channels), nn.ReLU())))


class ReferenceNet(nn.Module):
    """torchvision's blocks behind a 3x3 stem, the four classifiers, and modules that are built and never used."""

    def __init__(self, model: str, width: int, num_classes: int) -> None:
        super().__init__()
        ours, num_blocks, *grouping = ARCHITECTURES[model]
        block: type[BasicBlock | Bottleneck] = BasicBlock if ours.expansion == 1 else Bottleneck
        trunk: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False),
            "bn1": nn.BatchNorm2d(width),
        }
        before, stage_channels = width, []
        for i, count in enumerate(num_blocks):
            planes = STAGE_CHANNELS[i] * width // STAGE_CHANNELS[0]
            channels, stride = planes * block.expansion, 1 if i == 0 else 2
            downsample = None
            if (before, 1) != (channels, stride):
                convolution = nn.Conv2d(before, channels, kernel_size=1, stride=stride, bias=False)
                downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))
            first = block(before, planes, stride, downsample, *grouping)
            others = (block(channels, planes, 1, None, *grouping) for _ in range(count - 1))
            trunk[f"layer{i + 1}"] = nn.Sequential(first, *others)
            stage_channels.append(before := channels)
        *shallow, deepest = stage_channels
        self.trunk = nn.ModuleDict({**trunk, "fc": nn.Linear(deepest, num_classes)})
        self.bottlenecks = nn.ModuleList(make_bottleneck(c, deepest, 8 // 2**i) for i, c in enumerate(shallow))
        self.classifiers = nn.ModuleList(nn.Linear(deepest, num_classes) for _ in shallow)
        self.unused = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, deepest, 1, bias=False), nn.BatchNorm2d(deepest)) for c in shallow
        )
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        trunk = self.trunk
        x = F.relu(trunk["bn1"](trunk["conv1"](images)), inplace=True)
        features = []
        for i, bottleneck in enumerate(self.bottlenecks, start=1):
            x = trunk[f"layer{i}"](x)
            features.append(F.adaptive_avg_pool2d(bottleneck(x), 1).flatten(1))
        features.append(F.adaptive_avg_pool2d(trunk["layer4"](x), 1).flatten(1))
        return [fc(f) for fc, f in zip((*self.classifiers, trunk["fc"]), features, strict=True)], features


class ReferenceLoop:
    """Trains epoch after epoch over the same images."""

    def __init__(self, config: TrainConfig, images: np.ndarray, labels: np.ndarray, num_workers: int = 0) -> None:
        """Take images [N, 32, 32, 3] uint8 and labels [N]."""
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
            yield self.step(images.to(self.device), labels.to(self.device))

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
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
        accuracy = [(z.argmax(dim=1) == labels).float().mean() * 100 for z in logits]
        meters = {"label": label, "accuracy": accuracy, "distillation": distillation, "hint": hint}
        read = {f"{name}_{i}": value.item() for name, values in meters.items() for i, value in enumerate(values, 1)}
        return {"total": total.item(), **read}
