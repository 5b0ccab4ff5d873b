"""State dicts of other libraries: their own names and shapes, and a plain forward pass of each."""

import torch
import torch.nn.functional as F

from spcxr.models.vit import VisionTransformer

WIDTH, DEPTH, HEADS, SIDE = 24, 2, 3, 32


def tiny(image_px=SIDE, patch_px=16, channels=3, seed=9):
    torch.manual_seed(seed)
    return VisionTransformer(
        image_px=image_px,
        patch_px=patch_px,
        channels=channels,
        width=WIDTH,
        depth=DEPTH,
        heads=HEADS,
    ).eval()


def random_state(shapes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=generator) * 0.3 for k, shape in shapes.items()}


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name):
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def timm_state(*, patch_px=16, channels=3, scaled=False, cls_position=True):
    """timm's, and those of DINO, MAE and (with LayerScale) DINOv2."""
    count = (SIDE // patch_px) ** 2
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, count + cls_position, WIDTH),
        "patch_embed.proj.weight": (WIDTH, channels, patch_px, patch_px),
        "patch_embed.proj.bias": (WIDTH,),
        **norm("norm"),
    }
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shapes |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        shapes |= linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        shapes |= linear(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
        if scaled:
            shapes |= {f"{block}.ls1.gamma": (WIDTH,), f"{block}.ls2.gamma": (WIDTH,)}
    return random_state(shapes)


# Our word for a layer of a block -> the family's.
DINOV2 = {
    "norm1": "norm1",
    "norm2": "norm2",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
VIT = DINOV2 | {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
NEWER = {  # state dicts of transformers 5, as torch.save writes them
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
FAMILIES = {
    "Dinov2Model": (DINOV2, "encoder.layer", True),
    "ViTModel": (VIT, "encoder.layer", False),
    "Dinov2Model of transformers 5": (DINOV2 | NEWER, "encoder.layer", True),
    "ViTModel of transformers 5": (VIT | NEWER, "layers", False),
}


def hf_state(family, *, patch_px=16, channels=3):
    """Hugging Face's ``ViTModel`` and ``Dinov2Model`` (RAD-DINO)."""
    words, blocks, scaled = FAMILIES[family]
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 1 + (SIDE // patch_px) ** 2, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, channels, patch_px, patch_px),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        **norm("layernorm"),
    }
    for i in range(DEPTH):
        block = f"{blocks}.{i}."
        shapes |= norm(block + words["norm1"]) | norm(block + words["norm2"])
        for word in ("query", "key", "value", "out"):
            shapes |= linear(block + words[word], WIDTH, WIDTH)
        shapes |= linear(block + words["fc1"], 4 * WIDTH, WIDTH)
        shapes |= linear(block + words["fc2"], WIDTH, 4 * WIDTH)
        if scaled:
            shapes |= {f"{block}layer_scale{n}.lambda1": (WIDTH,) for n in (1, 2)}
    return random_state(shapes)


def attend(q, k, v):
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def layer(state, name, tokens):
    return F.linear(tokens, state[f"{name}.weight"], state[f"{name}.bias"])


def normed(state, name, tokens):
    return F.layer_norm(tokens, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def begun(images, filters, bias, cls_token, positions):
    patches = F.conv2d(images, filters, bias, stride=filters.shape[-1]).flatten(2).transpose(1, 2)
    if positions.shape[1] == patches.shape[1]:
        return torch.cat([cls_token.expand(len(images), -1, -1), patches + positions], 1)
    return torch.cat([cls_token.expand(len(images), -1, -1), patches], 1) + positions


def timm_forward(state, images):
    tokens = begun(
        images,
        state["patch_embed.proj.weight"],
        state["patch_embed.proj.bias"],
        state["cls_token"],
        state["pos_embed"],
    )
    for i in range(DEPTH):
        block = f"blocks.{i}"
        qkv = layer(state, f"{block}.attn.qkv", normed(state, f"{block}.norm1", tokens))
        branch = layer(state, f"{block}.attn.proj", attend(*qkv.chunk(3, -1)))
        tokens = tokens + branch * state.get(f"{block}.ls1.gamma", 1.0)
        hidden = layer(state, f"{block}.mlp.fc1", normed(state, f"{block}.norm2", tokens))
        branch = layer(state, f"{block}.mlp.fc2", F.gelu(hidden))
        tokens = tokens + branch * state.get(f"{block}.ls2.gamma", 1.0)
    return normed(state, "norm", tokens)


def hf_forward(family, state, images):
    words, blocks, _ = FAMILIES[family]
    patches = "embeddings.patch_embeddings.projection"
    tokens = begun(
        images,
        state[f"{patches}.weight"],
        state[f"{patches}.bias"],
        state["embeddings.cls_token"],
        state["embeddings.position_embeddings"],
    )
    for i in range(DEPTH):
        name = {word: f"{blocks}.{i}.{theirs}" for word, theirs in words.items()}
        scale = [state.get(f"{blocks}.{i}.layer_scale{n}.lambda1", 1.0) for n in (1, 2)]
        inner = normed(state, name["norm1"], tokens)
        branch = attend(*(layer(state, name[word], inner) for word in ("query", "key", "value")))
        tokens = tokens + layer(state, name["out"], branch) * scale[0]
        hidden = layer(state, name["fc1"], normed(state, name["norm2"], tokens))
        tokens = tokens + layer(state, name["fc2"], F.gelu(hidden)) * scale[1]
    return normed(state, "layernorm", tokens)


def same_features(encoder, images, wanted):
    return torch.allclose(encoder.forward_features(images), wanted, atol=1e-5)
