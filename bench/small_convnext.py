"""Train a small ConvNeXt on Tiny ImageNet, since docs/evaluation.md should say something about such networks.

    RAMP_FAST_TINY_IMAGENET=FOLDER python bench/small_convnext.py FILE.pt

Trained ConvNeXts come from model hubs, which the machines that the page is made on cannot reach. Six epochs take three
quarters of an hour of one core. The file holds the state dict; what it reaches on the validation photographs is
printed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 128


def model() -> nn.Module:
    """Three stages, so that the last maps have 4 x 4 pixels: 1.6 M parameters."""
    stages = [CNBlockConfig(48, 96, 2), CNBlockConfig(96, 192, 2), CNBlockConfig(192, None, 4)]
    return ConvNeXt(stages, num_classes=200, stochastic_depth_prob=0.0)


def photographs(files: list[Path]) -> Tensor:
    """[N, 3, 64, 64], uint8."""
    return torch.from_numpy(np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])).permute(0, 3, 1, 2)


def training(data: Path, classes: list[str]) -> tuple[Tensor, Tensor]:
    """All photographs and their classes."""
    found = [
        (file, label) for label, name in enumerate(classes) for file in sorted(data.glob(f"train/{name}/*/*.JPEG"))
    ]
    files, labels = zip(*found, strict=True)
    return photographs(list(files)), torch.tensor(labels)


def allowed(count: int) -> list[int]:
    """Positions of validation photographs but multiples of 5, counted from 0 or from 1: those are for a later check."""
    return [p for p in range(count) if p % 5 and (p + 1) % 5]


def validation(data: Path, classes: list[str]) -> tuple[Tensor, Tensor]:
    """The photographs that are not kept for a later check, and their classes."""
    lines = (data / "val" / "val_annotations.txt").read_text().splitlines()
    found = [lines[p].split()[:2] for p in allowed(len(lines))]
    images = photographs([data / "val" / "images" / name for name, _ in found])
    return images, torch.tensor([classes.index(label) for _, label in found])


def prepared(images: Tensor) -> Tensor:
    """As the network takes them."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def batches(images: Tensor, labels: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: shifted by up to 4 pixels, and half of them mirrored."""
    order = torch.randperm(len(images), generator=generator)
    for at in order.split(BATCH):
        x = nn.functional.pad(prepared(images[at]), (4, 4, 4, 4))
        top, left = torch.randint(9, (2, len(at)), generator=generator)
        x = torch.stack([one[:, t : t + 64, s : s + 64] for one, t, s in zip(x, top, left, strict=True)])
        mirrored = torch.rand(len(at), generator=generator) < 0.5
        x[mirrored] = x[mirrored].flip(-1)
        yield x.contiguous(memory_format=torch.channels_last), labels[at]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    data = Path(os.environ["RAMP_FAST_TINY_IMAGENET"])
    classes = (data / "wnids.txt").read_text().split()
    images, labels = training(data, classes)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = model().to(memory_format=torch.channels_last).train()
    decayed = [p for p in network.parameters() if p.dim() > 1]
    rest = [p for p in network.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}])
    steps = arguments.epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # elsewhere it is slower than float32
    for epoch in range(arguments.epochs):
        began, losses = time.time(), []
        for x, y in batches(images, labels, generator):
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16):
                logits = network(x)
            loss = loss_of(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) % 100 == 0:
                print(f"epoch {epoch} step {len(losses)}: loss {np.mean(losses[-100:]):.3f}", flush=True)
        print(f"epoch {epoch}: loss {np.mean(losses):.3f}, {time.time() - began:.0f} s", flush=True)
        torch.save(network.state_dict(), arguments.file)

    network.eval()
    images, labels = validation(data, classes)
    with torch.no_grad():
        right = [network(prepared(x)).argmax(1) == y for x, y in zip(images.split(100), labels.split(100), strict=True)]
    print(f"right on {torch.cat(right).float().mean():.1%} of {len(labels)} validation photographs")


if __name__ == "__main__":
    main()
