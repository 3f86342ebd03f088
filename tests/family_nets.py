"""Hand-written models of the kinds that people prune: convolutional, recurrent, packed attention; torch only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two convolutions around a residual stream; the stream is projected where its width or size changes."""

    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, images: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(images)))
        out = self.bn2(self.conv2(out))
        out += images if self.downsample is None else self.downsample(images)
        return self.relu(out)


class ResNet(nn.Module):
    """As torchvision writes it: a stem with pooling, two stages, global pooling, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(10)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(10, 12, 10, 1), BasicBlock(10, 14, 10, 1))
        self.layer2 = nn.Sequential(BasicBlock(10, 18, 22, 2), BasicBlock(22, 26, 22, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(22, 5)

    def forward(self, images: Tensor) -> Tensor:
        out = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        out = self.avgpool(self.layer2(self.layer1(out)))
        logits: Tensor = self.fc(torch.flatten(out, 1))
        return logits


class InvertedResidual(nn.Module):
    """Expand, filter each channel on its own, project."""

    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1 and before == after
        self.conv = nn.Sequential(
            nn.Conv2d(before, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True), nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.conv(images)
        return images + out if self.residual else out


class MobileNet(nn.Module):
    """Depthwise convolutions between pointwise ones, the mean over height and width at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
            InvertedResidual(8, 14, 10, 1), InvertedResidual(10, 18, 10, 1), InvertedResidual(10, 22, 12, 2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 5))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).mean([2, 3]))
        return logits


class DenseLayer(nn.Module):
    """Its output stands beside its input."""

    def __init__(self, before: int, inner: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), nn.Conv2d(before, inner, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, growth, 3, 1, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        out = self.conv1(functional.relu(self.norm1(images)))
        return torch.cat([images, self.conv2(functional.relu(self.norm2(out)))], 1)


class DenseNet(nn.Module):
    """Two dense blocks with a transition; every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3, 1, 1, bias=False)
        self.block1 = nn.Sequential(DenseLayer(9, 12, 5), DenseLayer(14, 13, 5))
        self.norm, self.conv, self.pool = nn.BatchNorm2d(19), nn.Conv2d(19, 11, 1, bias=False), nn.AvgPool2d(2, 2)
        self.block2 = nn.Sequential(DenseLayer(11, 12, 6), DenseLayer(17, 14, 6))
        self.last = nn.BatchNorm2d(23)
        self.classifier = nn.Linear(23, 5)

    def forward(self, images: Tensor) -> Tensor:
        out = self.block1(self.stem(images))
        out = self.pool(self.conv(functional.relu(self.norm(out))))
        out = functional.relu(self.last(self.block2(out)))
        logits: Tensor = self.classifier(functional.adaptive_avg_pool2d(out, (1, 1)).flatten(1))
        return logits


class PackedAttention(nn.Module):
    """As timm writes it: query, key and value from one weight, heads before the split."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, size, heads * size
        self.qkv = nn.Linear(width, 3 * self.attn_dim)
        self.proj = nn.Linear(self.attn_dim, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        packed = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = packed.unbind(0)
        out = functional.scaled_dot_product_attention(query, key, value)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(batch, length, self.attn_dim))
        return mixed


class PackedBlock(nn.Module):
    """Attention and a feed-forward block, each on a normalized copy of the stream."""

    def __init__(self, width: int, heads: int, size: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), PackedAttention(width, heads, size)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.fc2(functional.gelu(self.fc1(self.norm2(tokens))))


class PackedViT(nn.Module):
    """A vision transformer with a class token, as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 4, 4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 32)), nn.Parameter(torch.zeros(1, 10, 32))
        self.blocks = nn.Sequential(PackedBlock(32, 4, 8, 44), PackedBlock(32, 4, 8, 40))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


class Recurrent(nn.Module):
    """Embeds tokens, reads them in order, and classifies what it has in mind at the end."""

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU], layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        self.rnn = layer(12, 18, layers, batch_first=True)
        self.head = nn.Linear(18, 5)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.rnn(self.embedding(ids))
        logits: Tensor = self.head(states[:, -1])
        return logits
