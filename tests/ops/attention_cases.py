"""Calls of masked attention of every kind, and their truth: loops in float64 with autograd."""

import torch

from spcxr.ops.masked_attention import masked_attention

# name -> sequences, tokens at most, heads, head dim, packed, masks, bias, q k v apart
CASES = {
    "ViT at 224": (2, 197, 3, 64, False, False, False, False),
    "masked": (4, 50, 2, 64, False, True, False, False),
    "packed": (5, 40, 2, 64, True, False, False, False),
    "packed, masked, biased": (4, 70, 2, 32, True, True, True, False),
    "apart": (2, 33, 2, 64, False, True, True, True),
    "apart, packed": (3, 20, 1, 32, True, False, False, True),
    "wide heads": (2, 17, 1, 128, False, True, True, False),
    "odd heads": (2, 9, 3, 24, False, True, True, False),
    "one token": (3, 1, 2, 64, False, False, True, False),
    "no token": (2, 0, 2, 64, False, True, False, False),
    "no image": (0, 7, 2, 64, False, True, False, False),
    "no image, packed": (0, 7, 2, 64, True, False, False, False),
}
PADDING = 3  # rows of a packed batch that belong to nobody


class Call:
    """Inputs on a device, drawn once in float64 and rounded to ``dtype``."""

    def __init__(self, name, dtype=torch.float32, device="cpu", more=0, seed=0):
        count, self.n_max, heads, dim, packed, masks, bias, apart = CASES[name]
        count += more
        draw = torch.Generator().manual_seed(seed)
        self.lengths = [self.n_max] * count
        if packed:
            self.lengths = torch.randint(0, self.n_max + 1, (count,), generator=draw).tolist()
        rows = (sum(self.lengths) + PADDING,) if packed else (count, self.n_max)
        normal = torch.randn(*rows, 3, heads, dim, generator=draw)
        self.key_mask = masks_of(count, self.n_max, draw).to(device) if masks else None
        self.cu_seqlens = None
        if packed:
            starts = torch.tensor([0, *self.lengths]).cumsum(0).int()
            self.cu_seqlens = starts.to(device)
        self.qkv = normal.to(dtype).to(device).requires_grad_()
        self.bias = None
        if bias:
            drawn = 0.5 * torch.randn(3, heads, dim, generator=draw)
            self.bias = drawn.to(dtype).to(device).requires_grad_()
        self.upstream = torch.randn(*rows, heads * dim, generator=draw).to(dtype).to(device)
        self.apart = apart

    def __call__(self, backend, **changes):
        sequences = {"cu_seqlens": self.cu_seqlens, "key_mask": self.key_mask, "bias": self.bias}
        if self.cu_seqlens is not None:
            sequences["n_max"] = self.n_max
        qkv = self.qkv
        if self.apart:
            # As three projections would give them: each with strides of its own.
            q, k, v = (t.clone() for t in qkv.unbind(-3))
            qkv = (q, k.transpose(-3, -2).contiguous().transpose(-3, -2), v)
        return masked_attention(qkv, backend=backend, **(sequences | changes))

    def gradients(self, out):
        """Of qkv, and of the bias where there is one."""
        inputs = [t for t in (self.qkv, self.bias) if t is not None]
        return torch.autograd.grad(out, inputs, self.upstream)

    def truth(self):
        """Output and gradients in float64 on the CPU."""
        qkv = self.qkv.detach().double().cpu().requires_grad_()
        bias = None if self.bias is None else self.bias.detach().double().cpu().requires_grad_()
        flat = qkv.flatten(0, 1) if self.cu_seqlens is None else qkv
        out, start = torch.zeros(*flat.shape[:1], *flat.shape[2:], dtype=torch.float64), 0
        for b, length in enumerate(self.lengths):
            part = flat[start : start + length]
            part = part if bias is None else part + bias
            seen = torch.arange(length)
            if self.key_mask is not None:
                seen = seen[~self.key_mask[b, :length].cpu()]
            q, k, v = part[:, 0], part[seen, 1], part[seen, 2]
            scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
            if len(seen):
                mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
                out = out.index_put((torch.arange(start, start + length),), mixed)
            start += length
        out = out.reshape(self.upstream.shape) + 0 * qkv.sum()
        inputs = [qkv] if bias is None else [qkv, bias]
        made = torch.autograd.grad(out, inputs, self.upstream.double().cpu(), allow_unused=True)
        return out.detach(), [
            torch.zeros_like(t) if g is None else g for t, g in zip(inputs, made, strict=True)
        ]


def masks_of(count, n_max, draw):
    """Random masks; the first image's hides nothing, the second's everything."""
    mask = torch.rand(count, n_max, generator=draw) < torch.rand(count, 1, generator=draw)
    mask[:1], mask[1:2] = False, True
    return mask


def relative_error(made, truth):
    """Largest difference over the largest value; 0 where there is nothing."""
    made, truth = made.detach().double().cpu(), truth.detach().double().cpu()
    if truth.numel() == 0:
        return 0.0
    return float((made - truth).abs().max() / truth.abs().max().clamp(min=1e-30))
