"""The field's plain ViT, written from the paper's equations with torch's stock modules, under the key names of its released weights.

Imports nothing of ``model``: what it computes is what a checkpoint of the field means.
"""

import torch
from torch import Tensor, nn

SIZES = {  # name: width, depth, heads, patch side, tokens
    "vit_t": (256, 12, 8, 9, 144),
    "vit_l": (768, 24, 8, 9, 144),
    "vit_xxt": (96, 4, 3, 16, 49),
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) * (width // self.heads) ** -0.5, dim=-1)
        return self.proj(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, n, width))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = Mlp(width)

    def forward(self, z: Tensor) -> Tensor:
        z = self.attn(self.norm1(z)) + z  # (2)
        return self.mlp(self.norm2(z)) + z  # (3)


class PatchEmbed(nn.Module):
    def __init__(self, width: int, side: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=side, stride=side)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class FieldVit(nn.Module):
    """[b, 3, 112, 112] in [-1, 1] -> [b, D]. Every weight and statistic is drawn, so that no term can hide behind a one or a zero."""

    def __init__(self, name: str, embedding_size: int = 512):
        super().__init__()
        width, depth, heads, side, tokens = SIZES[name]
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = PatchEmbed(width, side)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.feature = nn.Sequential(
            nn.Linear(tokens * width, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=2e-5),
        )
        with torch.no_grad():
            for key, value in self.state_dict().items():
                if key.endswith("running_var"):
                    value.uniform_(0.01, 2)
                elif not key.endswith("num_batches_tracked"):
                    value.normal_(float(value.ndim == 1 and key.endswith("weight")), 0.05)

    def forward(self, images: Tensor) -> Tensor:
        z = self.patch_embed(images) + self.pos_embed  # (1)
        for block in self.blocks:
            z = block(z)
        return self.feature(self.norm(z).flatten(1))  # (4), (5)
