"""The backbone: a plain vision transformer that turns an aligned 112 x 112 face into an embedding.

    (1) z_0  = [p_1 E; ...; p_N E] + E_pos                 patches p_i, no class token
    (2) z'_l = MSA(LN(z_{l-1})) + z_{l-1}
    (3) z_l  = MLP(LN(z'_l)) + z'_l                        ratio 4, ReLU6
    (4) c    = concat(LN(z_L)_1, ..., LN(z_L)_N)           N * width values
    (5) f    = BN(Linear(BN(Linear(c))))                   N * width -> width -> D, nothing between

ViT: arXiv:2010.11929; the face variant without class token, its sizes and its state_dict keys: LVFace, arXiv:2501.13420.

Precision. The parameters may be float32, bfloat16 or float16 (DeepSpeed casts all of them and keeps float32 masters in its optimizer);
the image is cast to their dtype, matrix products and the residual stream stay in it, and the embedding leaves as float32.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IMAGE_SIZE = 112
MLP_RATIO = 4
LAYER_NORM_EPS = 1e-5
BATCH_NORM_EPS = 2e-5
INIT_STD = 0.02
COUNTERS = ("feature.1.num_batches_tracked", "feature.3.num_batches_tracked")  # BatchNorm's, which older state_dicts lack
KEYS_NAMED = 5  # of each kind, where weights fit no preset


@dataclass(frozen=True)
class VitPreset:
    """The numbers that tell one backbone from another."""

    width: int  # values per token
    depth: int  # transformer blocks
    heads: int
    patch_size: int = 9  # pixels, also the stride: floor(112 / 9)^2 = 144 tokens, the last 4 rows and columns are never read
    drop_path: float = 0.05  # of the last block; rises linearly from 0 at the first

    @property
    def num_tokens(self) -> int:
        return (IMAGE_SIZE // self.patch_size) ** 2


PRESETS: dict[str, VitPreset] = {
    "vit_t": VitPreset(width=256, depth=12, heads=8),
    "vit_s": VitPreset(width=512, depth=12, heads=8),
    "vit_b": VitPreset(width=512, depth=24, heads=8),
    "vit_l": VitPreset(width=768, depth=24, heads=8),
    # Ours, for CPUs and tests: 49 tokens of 16 x 16 pixels.
    "vit_xt": VitPreset(width=192, depth=6, heads=3, patch_size=16),
    "vit_xxt": VitPreset(width=96, depth=4, heads=3, patch_size=16),
}


def build_vit(
    name: str,
    *,
    mask_ratio: float = 0.0,
    drop_path: float | None = None,
    embedding_size: int = 512,
    activation_checkpointing: bool = False,
) -> "Vit":
    """Build a preset with fresh weights, drawn from torch's global generator.

    Args:
        name: a key of ``PRESETS``.
        mask_ratio: share of the tokens dropped per image in training, in [0, 1).
        drop_path: rate of the last block in [0, 1); None takes the preset's.
        embedding_size: D.
        activation_checkpointing: in training, keep only each block's input and recompute the rest in backward; same gradients, bit for bit.
    Raises: ValueError for an unknown name or a number out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown backbone {name!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    return Vit(
        preset,
        mask_ratio=mask_ratio,
        drop_path=preset.drop_path if drop_path is None else drop_path,
        embedding_size=embedding_size,
        activation_checkpointing=activation_checkpointing,
    )


def preset_of(state_dict: Mapping[str, Tensor]) -> str:
    """Name the preset whose keys and shapes are those of ``state_dict``, whatever its embedding size.

    BatchNorm's ``num_batches_tracked`` may be absent: nothing here reads it. Shapes don't show the number of heads; the preset's holds.
    Raises: ValueError that names the nearest preset and what differs from it: missing keys, unexpected ones, and shapes.
    """
    found = _shapes(state_dict)
    embedding_size = (found.get("feature.2.weight") or (512,))[0]
    differences = {}
    for name in PRESETS:
        with torch.device("meta"):
            wanted = _shapes(build_vit(name, embedding_size=embedding_size).state_dict())
        if wanted == found:
            return name
        missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        shapes = [
            f"{key}: expected {list(wanted[key])}, found {list(found[key])}"
            for key in sorted(wanted.keys() & found.keys())
            if wanted[key] != found[key]
        ]
        differences[name] = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    nearest = min(differences, key=lambda name: sum(map(len, differences[name].values())))
    raise ValueError(
        f"these weights fit no preset ({', '.join(PRESETS)}); nearest is {nearest} with embeddings of {embedding_size}: "
        + ", ".join(f"{len(keys)} keys {what} ({_cut(keys)})" for what, keys in differences[nearest].items() if keys)
    )


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items() if key not in COUNTERS}


def _cut(keys: list[str]) -> str:
    more = f", and {len(keys) - KEYS_NAMED} more" if len(keys) > KEYS_NAMED else ""
    return ", ".join(key[:200] for key in keys[:KEYS_NAMED]) + more


def accumulate_in_float32(product: Callable[..., Tensor], *operands: Tensor | None) -> Tensor:
    """A matrix product with low-precision operands and result, and float32 accumulation on every device.

    CUDA's tensor cores multiply bfloat16 or float16 operands into a float32 sum and round the result once, so there the product runs as
    it is. A CPU without bfloat16 instructions emulates them at a fraction of its float32 speed (one thread of an AMD EPYC Milan, forward
    and backward of vit_xt on 64 images: 14 s; this way 0.83 s, as in float32). So the same operands are multiplied in float32 there and
    the result is rounded once: the tensor core's arithmetic, gradients included, on every kind of CPU.
    """
    first = operands[0]
    if first.device.type != "cpu" or first.dtype not in (torch.bfloat16, torch.float16):
        return product(*operands)
    return product(*(operand if operand is None else operand.float() for operand in operands)).to(first.dtype)


class Linear(nn.Linear):
    """``nn.Linear`` in the dtype of its weight, summed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return accumulate_in_float32(F.linear, x.to(self.weight.dtype), self.weight, self.bias)


class PatchProjection(nn.Conv2d):
    """E of (1): every patch to one token, [b, 3, 112, 112] -> [b, N, width]. A convolution, so that the released weight fits.

    Patches do not overlap, so it is one matrix product. Images that lie channels last in memory, as the loader's do, are cut fastest.
    """

    def __init__(self, width: int, patch_size: int):
        super().__init__(3, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        height, width = self.kernel_size
        patches = images.to(self.weight.dtype).unfold(2, height, height).unfold(3, width, width)  # [b, 3, rows, columns, height, width]
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # [b, N, height * width * 3]
        return accumulate_in_float32(F.linear, patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class BatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` whose arithmetic, running statistics and output are float32, whatever the dtype of its input and parameters.

    A mean over a batch and a running average that moves by a tenth of a difference are the two places of the backbone where bfloat16's
    8 bits lose the signal. The parameters may still arrive as bfloat16: the float32 master of the affine weight then lives in the ZeRO
    optimizer, and what is read here is its rounded copy. Buffers must stay float32: DeepSpeed leaves them alone, ``module.bfloat16()``
    does not.

    A batch statistic that is not finite does not enter the running statistics: the optimizer skips such a step, and a running average
    would never recover from it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.running_mean.dtype != torch.float32:
            raise TypeError(f"BatchNorm statistics must stay float32, found {self.running_mean.dtype}: cast parameters, not buffers")
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = mean.clone(), var.clone()  # autograd keeps what batch_norm is given: that must not change afterwards
        out = F.batch_norm(x.float(), mean, var, self.weight.float(), self.bias.float(), self.training, self.momentum, self.eps)
        if self.training:
            self.num_batches_tracked.add_(1)
            self.running_mean.copy_(torch.where(mean.isfinite(), mean, self.running_mean))
            self.running_var.copy_(torch.where(var.isfinite(), var, self.running_var))
        return out


class Attention(nn.Module):
    """MSA of (2): ``heads`` scaled dot products, scale head_dim^-0.5, qkv without bias. [b, n, width] -> [b, n, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.mix(self.qkv(x)))

    def mix(self, qkv: Tensor) -> Tensor:
        """The mean of v over all tokens, weighted by softmax(q k^T / sqrt(head_dim)), per head. [b, n, 3 width] -> [b, n, width]."""
        # Unbound before transposed: backward then stacks the three gradients in the layout of qkv, and no copy is needed.
        q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, self.heads, -1)).unbind(2))  # each [b, heads, n, head_dim]
        return accumulate_in_float32(F.scaled_dot_product_attention, q, k, v).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """MLP of (3): width -> 4 width -> width with ReLU6 between."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = Linear(width, MLP_RATIO * width)
        self.fc2 = Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu6(self.fc1(x)))


class Block(nn.Module):
    """Equations (2) and (3); in training each branch is dropped per image with probability ``drop_path``."""

    def __init__(self, width: int, heads: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, self.attn(self.norm1(x)))
        return self.add(x, self.mlp(self.norm2(x)))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + branch; in training x + keep * branch / (1 - drop_path), keep drawn per image: the same in expectation (stochastic depth,
        arXiv:1603.09382)."""
        if not self.training or self.drop_path == 0:
            return x + branch
        keep = (torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path).to(x.dtype)
        # alpha is a scalar applied in float32; a keep of 1 / 0.95 in bfloat16 would be 0.2 % too large in every step.
        return torch.add(x, keep * branch, alpha=1 / (1 - self.drop_path))


class Vit(nn.Module):
    """Equations (1) to (5). Build it by name with ``build_vit``.

    In training, ``mask_ratio`` of the tokens are left out of the blocks, a fresh random subset per image, and the learned ``mask_token``
    stands in their places before (4), so it passes the final LayerNorm as every token does. (The field's presets named mask_005 were
    trained at 0.10, because the ratio never reached the call; here it is what it says.)

    Weights start as normal(0, 0.02) for every projection (patches included), ``pos_embed`` and ``mask_token``; biases start as 0, norms
    as 1 and 0. Randomness of training (drop path, patch dropping) comes from torch's global generator of the images' device.
    """

    def __init__(self, preset: VitPreset, *, mask_ratio: float, drop_path: float, embedding_size: int, activation_checkpointing: bool):
        super().__init__()
        width, num_tokens = preset.width, preset.num_tokens
        num_kept = round((1 - mask_ratio) * num_tokens)
        if not 0 <= mask_ratio < 1 or num_kept < 1:
            raise ValueError(f"mask_ratio must lie in [0, 1) and keep at least one of {num_tokens} tokens, got {mask_ratio}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {drop_path}")
        if embedding_size < 1:
            raise ValueError(f"embedding_size must be at least 1, got {embedding_size}")
        self.embedding_size = embedding_size
        self.activation_checkpointing = activation_checkpointing
        self.num_kept = num_kept

        self.patch_embed = nn.ModuleDict({"proj": PatchProjection(width, preset.patch_size)})
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(width, preset.heads, drop_path * index / max(1, preset.depth - 1)) for index in range(preset.depth)
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.feature = nn.Sequential(
            Linear(num_tokens * width, width, bias=False),
            BatchNorm(width, eps=BATCH_NORM_EPS),
            Linear(width, embedding_size, bias=False),
            BatchNorm(embedding_size, eps=BATCH_NORM_EPS),
        )
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        """Embed a batch.

        Args:
            images: [b, 3, 112, 112] RGB in [-1, 1], any float dtype.
        Returns: [b, D] float32, not normalised. In training mode b must be at least 2 (BatchNorm).
        """
        if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images must be [b, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(images.shape)}")
        # The sum takes the layout of its first operand: contiguous, where that of the convolution is transposed. All that follows keeps
        # it, and a transposed residual stream would be copied by every LayerNorm, forward and backward.
        tokens = self.pos_embed + self.patch_embed["proj"](images)
        if self.training and self.num_kept < tokens.shape[1]:
            places = random_subsets(*tokens.shape[:2], self.num_kept, device=tokens.device).unsqueeze(-1).expand(-1, -1, tokens.shape[2])
            kept = self._run_blocks(tokens.gather(1, places))
            tokens = self.mask_token.expand(tokens.shape).scatter(1, places, kept)
        else:
            tokens = self._run_blocks(tokens)
        return self.feature(self.norm(tokens).flatten(1))

    def _run_blocks(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            if self.training and self.activation_checkpointing:
                # preserve_rng_state (on by default) replays the same drop path in the second forward.
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return tokens

    def _initialise(self) -> None:
        for tensor in self._weights():
            nn.init.trunc_normal_(tensor, std=INIT_STD)  # torch cuts at +-2, absolute: 100 standard deviations, so this is a plain normal
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _weights(self) -> Iterator[Tensor]:
        yield from (self.pos_embed, self.mask_token)
        yield from (module.weight for module in self.modules() if isinstance(module, nn.Linear | nn.Conv2d))


def random_subsets(b: int, n: int, size: int, *, device: torch.device) -> Tensor:
    """[b, size] int64: per row a uniform random subset of range(n), without repeats, in random order (the blocks don't see order)."""
    return torch.rand(b, n, device=device).argsort(dim=1)[:, :size]
