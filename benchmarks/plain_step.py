"""A pretraining step in plain PyTorch: what `bench_pretrain_step.py` compares ours with.

timm-style blocks, torch's scaled dot product attention, a patch convolution, images resampled by
`F.interpolate` and corrupted by `torch.where`, AdamW (fused) and an EMA teacher by `lerp_`. It
takes the state dict of ours, so that both compute the same losses.
"""

import torch
import torch.nn.functional as F
from torch import nn

READ = (5, 7, 9, 11)
TAU = 0.2


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, n, width = x.shape
        qkv = self.qkv(x).reshape(batch, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, n, width))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width, 4 * width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    def __init__(self, image, patch, width, depth, heads):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, 1, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        """All blocks' outputs."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


class Reconstruction(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        layers = [m for _ in range(3) for m in (nn.Linear(width, width), nn.GELU())]
        self.mlp, self.to_pixels = nn.Sequential(*layers), nn.Linear(width, patch * patch)

    def forward(self, x):
        return self.to_pixels(self.mlp(x))


class Projection(nn.Module):
    def __init__(self, width, outputs=256):
        super().__init__()
        hidden = 4 * width
        self.layers = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs, bias=False),
            nn.BatchNorm1d(outputs, affine=False),
        )

    def forward(self, x):
        return F.normalize(self.layers(x), dim=-1)


class GMML(nn.Module):
    def __init__(self, image, patch, width, depth, heads):
        super().__init__()
        self.patch = patch
        self.encoder = Encoder(image, patch, width, depth, heads)
        self.head = Reconstruction(width, patch)

    def rebuilt(self, outputs, side):
        features = torch.stack([outputs[n] for n in READ]).mean(0)
        rows = self.head(self.encoder.norm(features)[:, 1:])
        p, grid = self.patch, side // self.patch
        images = rows.reshape(-1, grid, grid, 1, p, p).permute(0, 3, 1, 4, 2, 5)
        return images.reshape(-1, 1, side, side)

    def l1(self, rebuilt, clean, hidden):
        return (rebuilt.float() - clean).abs()[hidden].mean()

    def forward(self, crops):
        clean, hidden, fill = crops[0]
        corrupted = torch.where(hidden, fill, clean)
        return self.l1(self.rebuilt(self.encoder(corrupted), clean.shape[-1]), clean, hidden)

    def follow(self, momentum):
        """No teacher."""


class SiT(GMML):
    def __init__(self, image, patch, width, depth, heads):
        super().__init__(image, patch, width, depth, heads)
        self.projection = Projection(width)
        self.teacher = nn.ModuleDict(
            {"encoder": Encoder(image, patch, width, depth, heads), "head": Projection(width)}
        ).requires_grad_(False)

    def forward(self, crops):
        clean, hidden, fill = (torch.cat(part) for part in zip(*crops, strict=True))
        outputs = self.encoder(torch.where(hidden, fill, clean))
        rebuilt = self.rebuilt(outputs, clean.shape[-1])
        views = zip(rebuilt.chunk(2), clean.chunk(2), hidden.chunk(2), strict=True)
        l1 = sum(self.l1(*view) for view in views) / 2
        queries = self.projection(self.encoder.norm(outputs[-1])[:, 0]).chunk(2)
        with torch.no_grad():
            taught = self.teacher["encoder"].norm(self.teacher["encoder"](clean)[-1])[:, 0]
            keys = self.teacher["head"](taught).chunk(2)
        own = torch.arange(len(queries[0]), device=clean.device)
        contrast = sum(
            2 * TAU * F.cross_entropy(queries[a].float() @ keys[b].float().T / TAU, own)
            for a, b in ((0, 1), (1, 0))
        )
        return l1 + contrast

    @torch.no_grad()
    def follow(self, momentum):
        for mine, student in (("encoder", self.encoder), ("head", self.projection)):
            theirs = dict(student.named_parameters())
            for name, kept in self.teacher[mine].named_parameters():
                kept.lerp_(theirs[name], 1 - momentum)


def crop_and_normalise(pixels, boxes, flip, scale, shift, side):
    """Raw images ``[B, 1, H, W]`` uint8 -> views, one image at a time as their sizes differ."""
    views = []
    for image, (top, left, height, width), mirrored in zip(pixels, boxes, flip, strict=True):
        part = image[None, :, top : top + height, left : left + width].float()
        view = F.interpolate(part, (side, side), mode="bilinear", antialias=True)
        views.append(view.flip(3) if mirrored else view)
    return torch.cat(views) * scale + shift
