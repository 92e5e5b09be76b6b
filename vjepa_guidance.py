"""A world model's surprise as a reward for physics: best-of-N and guidance of a video generator.

Paper     Yuan et al. Inference-time Physics Alignment of Video Generative Models with Latent World
          Models. arXiv:2601.10553v2 (WMReward). Assran et al. V-JEPA 2. arXiv:2506.09985v1
Here      V-JEPA 2: VideoEncoder, LatentPredictor, draw_visible, jepa_loss, load_official. WMReward:
          Eq. 4-6 surprise, 10 best_of_n, 7-9, 12 guided_step. Generator: as in self_refine.py
Changed   hidden tokens are masked in E, not dropped; one kind of mask a clip, also past to future;
          a pair of channels turns by one angle (theirs does not: published weights); VICReg terms,
          without which this small E collapsed; --world frozen: E is the generator's PCA, only P
          learns; AdamW (0.9, 0.99); S sees unclamped pixels; eta is a share of the norm of z
Left out  VideoMix22M, cool-down; V-JEPA 2.1, Hugging Face's names; maximum over windows; Eq. 13
Notation  E, P  encoder, predictor of hidden features   z   latent clip, (B, K, F, 3, 1)
          S     surprise, (B,); the reward is -S        t   0 = noise ... 1 = data
          C, W  frames of context, of a window          u   velocity; x_hat = z + (1 - t) u
Run       python vjepa_guidance.py           # surprise 0.09, shuffled 0.62, 5 min, 2 CPU cores
          python vjepa_guidance.py --preset gpu         # not measured
          python vjepa_guidance.py --sample runs/vjepa_guidance/last.pt --world official \
              --weights vitg --C 8 --W 16 --stride 8    # not measured
"""
import copy
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import (RANK, autocast, batch_indices, bouncing_balls, due, ema_update, explain, fail,
                    gather, load_checkpoint, log, mix, parallel, parse_config, save_gif, save_grid,
                    setup, shares, steps, to_uint8)

# ---- config ----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = ""  # gpu; a flag beats its preset
    out: str = ""  # run folder; empty: runs/vjepa_guidance or runs/vjepa_guidance-<preset>
    fresh: bool = False  # start over instead of continuing the run in the folder
    seed: int = 0  # of weights, data order, masks and noise
    device: str = "auto"  # auto | cuda | mps | cpu
    precision: str = "auto"  # auto | bf16 | fp32; S itself is always float32
    compile: str = "auto"  # auto | on | off; auto: with CUDA, or Linux and g++; takes a minute
    image_size: int = 32  # side of a frame in pixels
    batch_size: int = 16  # clips per step, summed over all GPUs
    steps: int = 9000  # optimizer steps of the last stage, the world model
    lr: float = 1e-3  # AdamW, of both stages; falls to 0 over the last half
    ema_decay: float = 0.998  # of the generator that is sampled, and of the target of V-JEPA 2
    log_every: int = 100  # steps between two lines in metrics.jsonl
    save_every: int = 1000  # steps between two checkpoints
    sample_every: int = 9000  # steps between two checks of health and animations
    sample: str = ""  # draw from this checkpoint instead of training
    n: int = 8  # how many held-out clips are continued and shown
    clips: int = 8000  # training clips of both stages, made at the start
    frames: int = 16  # of a clip, at 15 a second
    texture: bool = False  # a random smooth background that does not move, instead of black
    components: int = 64  # K of a frame and channel: the generator's latent, the frozen E
    dim: int = 128  # width of the generator
    depth: int = 4  # its blocks
    generator_steps: int = 4000  # optimizer steps of the first stage, the generator
    world: str = "frozen"  # frozen | tiny | official: E a frame PCA; V-JEPA 2; published weights
    weights: str = ""  # official: a .pt file, or vitl, vith, vitg or vitg-384 to download
    weights_key: str = "target_encoder"  # target_encoder | encoder: EMA, or online, as WMReward has
    mask_index: int = 1  # which of the ten mask tokens: WMReward takes 1, training perhaps 0
    world_dim: int = 192  # width of E, six blocks (tiny)
    predictor_dim: int = 128  # width of P, four blocks
    masks: str = "causal"  # causal | blocks | mixed: what is hidden in training
    C: int = 4  # frames of context (paper: 8)
    W: int = 8  # frames of a window (paper: 16)
    stride: int = 1  # frames from one window to the next (paper: 8)
    cos: str = "feature"  # feature | token: axis of the cosine; token: earlier versions of the code
    grad: str = "target"  # target | context | both: what the gradient of S goes through
    best_of: int = 8  # N candidates a clip (paper: 16 and 8)
    eta: float = 0.01  # length of a guidance step, a share of the latent's norm; 0: none
    skip: int = 2  # first sampling steps without guidance (their scripts: 3 or 5 of 50)
    every: int = 1  # then every so many steps have it
    sampling_steps: int = 20  # Euler steps of the generator

    def __post_init__(self):
        side, counts = self.image_size, """clips components dim depth generator_steps world_dim
        predictor_dim C stride best_of every sampling_steps""".split()
        for ok, message in (
                (min(getattr(self, k) for k in counts) > 0, f"{', '.join(counts)}: at least 1"),
                (min(self.lr, self.eta, self.skip) >= 0, "lr, eta and skip must not be negative"),
                (0 <= self.ema_decay < 1 and 0 <= self.mask_index < 10,
                 "ema_decay must be in [0, 1), mask_index one of 0 to 9"),
                (self.components <= side**2, f"components: a frame has only {side**2} pixels"),
                (self.dim % 8 == self.predictor_dim % 32 == self.world_dim % 32 == 0,
                 "dim must be a multiple of 8, predictor_dim and world_dim of 32"),
                (max(self.C, GIVEN) < self.W <= self.frames, f"need C < W <= frames, {GIVEN} < W"),
                (self.C % 2 == self.W % 2 == self.frames % 2 == 0, "C, W and frames must be even"),
                (self.world != "tiny" or side % 4 == 0 < side // 16, "tiny: image_size 16, 20, .."),
                (self.masks == "causal" or self.world == "tiny" or self.sample,
                 "other masks need world tiny"),
                ((self.world == "official") == bool(self.weights) <= bool(self.sample),
                 "world official and weights need each other and sample"),
                (self.batch_size <= self.clips, f"batch_size must be at most clips {self.clips}")):
            if not ok:
                raise ValueError(message)

GIVEN = 2  # frames the generator gets clean: they fix place and velocity of every ball
PRESETS = {"gpu": dict(  # V-JEPA 2 trained in place (officially 252,000 steps, momentum 0.99925)
    batch_size=256, steps=8000, lr=1.5e-3, sample_every=2000, clips=50_000, texture=True,
    components=80, dim=256, depth=8, generator_steps=8000, world="tiny", predictor_dim=96,
    masks="mixed", best_of=16, sampling_steps=40, skip=4)}
SAMPLING = """world weights weights_key mask_index C W stride cos grad best_of eta skip every
sampling_steps""".split()

# ---- data ------------------------------------------------------------------------------

class FramePCA(nn.Module):
    """Linear autoencoder: a channel of a frame <-> its first K principal components, whitened."""

    def __init__(self, size, components):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.zeros(size**2))
        self.register_buffer("basis", torch.zeros(components, size**2))
        self.register_buffer("std", torch.ones(components))

    def fit(self, videos):
        """Components of the frames of videos (B, 3, F, S, S), the three channels together."""
        x = rearrange(videos, "b c f h w -> (b c f) (h w)").cpu().double()
        self.mean.copy_(x.mean(0))
        values, vectors = torch.linalg.eigh(x.T.cov())  # ascending
        self.basis.copy_(vectors.T.flip(0)[:len(self.basis)])
        std = values.flip(0)[:len(self.std)].clamp(min=0).sqrt()
        self.std.copy_(std.clamp(min=0.05 * std[0]))  # a floor, so that noise is not blown up
        return self

    def encode(self, videos):  # (B, 3, F, S, S) -> (B, K, F, 3, 1)
        x = rearrange(videos, "b c f h w -> b f c (h w)")
        z = (x - self.mean) @ self.basis.T / self.std
        return rearrange(z, "b f c k -> b k f c 1")

    def decode(self, z):  # (B, K, F, 3, 1) -> (B, 3, F, S, S)
        x = self.mean + (rearrange(z, "b k f c 1 -> b c f k") * self.std) @ self.basis
        return rearrange(x, "b c f (h w) -> b c f h w", h=self.size)

class FrozenCodes(FramePCA):
    """E of --world frozen: 40 components of a frame's channel are a token, visible or not."""
    def forward(self, video, visible=None):  # (B, 3, F, S, S) -> (B, 3 F, 40)
        return rearrange(self.encode(video)[:, :40], "b k f c 1 -> b (f c) k")

def load_videos(cfg, device):
    """Training clips uint8 (M, 3, F, S, S), labels (M,), and the frame PCA of the first 500."""
    parts = [bouncing_balls(min(500, cfg.clips - i), cfg.frames, cfg.image_size, mix(0, i),
                            cfg.texture) for i in range(0, cfg.clips, 500)]
    videos, labels = (torch.cat(x).to(device) for x in zip(*((p.videos, p.labels) for p in parts)))
    codec = FrozenCodes(cfg.image_size, cfg.components).to(device)
    return videos, labels, codec.fit(videos[:500].float() / 127.5 - 1)

# ---- model -----------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):  # (..., D) -> (..., D)
        return F.rms_norm(x.float(), self.weight.shape, self.weight, 1e-6).to(x.dtype)

def rotate(x, table):
    """Turn the channel pairs (i, i + D / 2) of x (..., N, D) as table (2, N, D / 2) says."""
    first, second = x.chunk(2, -1)
    cos, sin = table  # float32
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)

class Attention(nn.Module):
    """Self-attention with normalised queries and keys, turned by their position."""

    def __init__(self, dim, heads, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, table):  # (B, N, D), (2, N, D / heads / 2) -> (B, N, D)
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        return self.dropout(self.proj(rearrange(x, "b h n d -> b n (h d)")))

class SwiGLU(nn.Module):
    """Gated MLP: (SiLU(x W1) * x W2) W3, hidden width 2/3 of 4 D."""

    def __init__(self, dim, dropout=0.0):
        super().__init__()
        hidden = int(4 * dim * 2 / 3)
        self.up, self.down = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):  # (B, N, D) -> (B, N, D)
        gate, value = self.up(x).chunk(2, -1)
        return self.down(self.dropout(F.silu(gate) * value))

class Block(nn.Module):
    """Pre-norm transformer block, shifted, scaled and gated by the condition c (adaLN-Zero)."""

    def __init__(self, dim, heads, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attention, self.mlp = Attention(dim, heads, dropout), SwiGLU(dim, dropout)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, c, table):  # (B, N, D), (B, D), (2, N, D / heads / 2) -> (B, N, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, table)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

def time_features(t, dim=256):
    """cos and sin of t at dim / 2 rates, 1 to 1e-4: (B,) -> (B, dim)."""
    rate = 10000 ** (-torch.arange(dim // 2, device=t.device) / (dim // 2))
    return torch.cat([(t[:, None] * rate).cos(), (t[:, None] * rate).sin()], -1)

def rotary_grid(frames, rows, columns, head_dim):
    """cos and sin of the 3-D rotary angles, a third of the pairs an axis: (2, N, head_dim / 2)."""
    share = head_dim // 6
    rate = 10000 ** (-torch.arange(share) / max(share, 1))
    place = torch.cartesian_prod(*(torch.arange(n) for n in (frames, rows, columns)))  # (N, 3)
    angle = (place[:, :, None] * rate).flatten(1)  # (N, 3 share)
    angle = F.pad(angle, (0, head_dim // 2 - 3 * share))
    return torch.stack([angle.cos(), angle.sin()])

class VideoDiT(nn.Module):
    """Transformer over the patches of a latent video (B, C, F, H, W): u, zero at initialisation.

    Positions are learned as well: a ball's distance to the walls and to the first frames matters.
    """

    def __init__(self, shape, patch_frames, patch, classes, dim, depth, heads):
        super().__init__()
        C, frames, H, W = shape
        self.classes, self.patch = classes, dict(r=patch_frames, p=patch, q=patch)
        self.grid = dict(f=frames // patch_frames, h=H // patch, w=W // patch)
        numbers, N = C * patch_frames * patch**2, math.prod(self.grid.values())
        self.embed = nn.Linear(numbers, dim)
        self.position = nn.Parameter(torch.zeros(N, dim))
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)  # the last one: no condition
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.modulation = RMSNorm(dim), nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, numbers)
        table = rotary_grid(*self.grid.values(), dim // heads)
        self.register_buffer("rotary", table, persistent=False)
        self.initialize()

    def initialize(self):
        """Xavier for linear maps, N(0, 0.02^2) for embeddings, 0 for modulations and the head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.time[0].weight, self.time[2].weight, self.label.weight, self.position):
            nn.init.normal_(weight, std=0.02)
        for module in (*[block.modulation for block in self.blocks], self.modulation, self.head):
            nn.init.zeros_(module.weight)

    def forward(self, z, t, y):  # (B, C, F, H, W), (B,), (B,) -> (B, C, F, H, W)
        c = F.silu(self.time(time_features(1000 * t)) + self.label(y))  # (B, D)
        h = self.embed(rearrange(z, "b c (f r) (h p) (w q) -> b (f h w) (r p q c)", **self.patch))
        h = h + self.position  # (B, N, D)
        for block in self.blocks:
            h = block(h, c, self.rotary)
        shift, scale = self.modulation(c)[:, None].chunk(2, -1)
        h = self.head(self.norm(h) * (1 + scale) + shift)
        return rearrange(h, "b (f h w) (r p q c) -> b c (f r) (h p) (w q)", **self.grid,
                         **self.patch)

def rope_3d(grid, head_dim, tiled=False):
    """cos and sin of V-JEPA 2's rotation of tokens in a grid, (2, T H W, head_dim): a third of the
    channels turns with each axis. tiled, as published: the angles of a pair are not the same."""
    third = head_dim // 3 // 2 * 2  # 20 of 64 channels, 26 of 80, 10 of 32
    rate = 10000 ** (-torch.arange(0, third, 2) / third)  # (third / 2,)
    angle = torch.cartesian_prod(*map(torch.arange, grid))[..., None] * rate  # (N, 3, third / 2)
    angle = angle.repeat(1, 1, 2) if tiled else angle.repeat_interleave(2, -1)
    angle = F.pad(angle.flatten(1), (0, head_dim - 3 * third))
    return torch.stack([angle.cos(), angle.sin()])

def turn_pairs(x, table):
    """Turn the channel pairs (2i, 2i + 1) of x (..., N, D) as table (2, N, D) says."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * table[0] + turned * table[1]).to(x.dtype)  # by way of float32

class ViTBlock(nn.Module):
    """Pre-norm block of V-JEPA 2; its names, like those below, are of the published weights."""
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
    def forward(self, x, table, visible=None):  # (B, N, D), (2, N, D / heads), bool (B, N): keys
        q, k, v = rearrange(self.attn["qkv"](self.norm1(x)), "b n (three h d) -> three b h n d",
                            three=3, h=self.heads)
        keys = None if visible is None else visible[:, None, None]
        h = F.scaled_dot_product_attention(turn_pairs(q, table), turn_pairs(k, table), v, keys)
        x = x + self.attn["proj"](rearrange(h, "b h n d -> b n (h d)"))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))

def init_vit(net, blocks):
    """Truncated normal of std 0.02, biases 0; what block i = 1, 2, ... adds: over sqrt(2 i)."""
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for i, block in enumerate(blocks, 1):
        for layer in (block.attn["proj"], block.mlp["fc2"]):
            layer.weight.data /= (2 * i)**0.5

class VideoEncoder(nn.Module):
    """E of V-JEPA 2, a ViT of tubelets: clip (B, 3, F, S, S) in [-1, 1] -> (B, N, D), N = T H W."""
    def __init__(self, grid, patch, dim, depth, heads, hidden, tiled=False, size=0):
        super().__init__()
        tube, self.size = (2, patch, patch), size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, dim, tube, tube)})
        self.blocks = nn.ModuleList(ViTBlock(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("table", rope_3d(grid, dim // heads, tiled), persistent=False)
        init_vit(self, self.blocks)
    def forward(self, video, visible=None):  # no token attends to hidden ones
        if self.size:  # published weights: resized to this side, mean and std of ImageNet
            x = rearrange(video, "b c f h w -> (b f) c h w") * 0.5 + 0.5
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
            mean, std = x.new_tensor([0.485, 0.456, 0.406, 0.229, 0.224, 0.225]).view(2, 3, 1, 1)
            video = rearrange((x - mean) / std, "(b f) c h w -> b c f h w", b=len(video))
        h = self.patch_embed["proj"](video).flatten(2).mT  # frame by frame, row by row
        for block in self.blocks:
            h = block(h, self.table[:, :h.shape[1]], visible)
        return self.norm(h)

class LatentPredictor(nn.Module):
    """P of V-JEPA 2: features of visible tokens, a mask token for each hidden one -> (B, N, D)."""
    def __init__(self, grid, width, dim, depth, tiled=False, mask_tokens=1, mask_index=0):
        super().__init__()
        heads, self.index = dim // 32, mask_index
        self.predictor_embed, self.predictor_proj = nn.Linear(width, dim), nn.Linear(dim, width)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, dim) for _ in range(mask_tokens))
        self.predictor_blocks = nn.ModuleList(ViTBlock(dim, heads, 4 * dim) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("table", rope_3d(grid, 32, tiled), persistent=False)
        init_vit(self, self.predictor_blocks)
    def forward(self, h, visible):  # (B, N, D), bool (B, N)
        h = torch.where(visible[..., None], self.predictor_embed(h), self.mask_tokens[self.index])
        for block in self.predictor_blocks:
            h = block(h, self.table[:, :h.shape[1]])
        return self.predictor_proj(self.predictor_norm(h))

class WorldModel(nn.Module):
    """Encoder E, its target (tiny: an EMA of E, set to E here; else E itself) and predictor P."""
    def __init__(self, encoder, predictor, grid, tiny=False):
        super().__init__()
        self.encoder, self.predictor, self.grid, self.tiny = encoder, predictor, grid, tiny
        self.target = copy.deepcopy(encoder).requires_grad_(False) if tiny else encoder
    def forward(self, video, visible):  # -> predicted, true, visible features, all (B, N, D)
        z = self.target(video).detach()  # of FrozenCodes a token sees no other: z is also h
        h = self.encoder(video, visible) if self.tiny else z
        return self.predictor(h, visible), z, h
    def predict(self, context, N):
        """Features of a window of N tokens behind the frames of context: (B, N - n, D)."""
        n = (h := self.encoder(context)).shape[1]  # has never seen what follows
        visible = (torch.arange(N, device=h.device) < n).expand(len(h), N)
        return self.predictor(F.pad(h, (0, 0, 0, N - n)), visible)[:, n:]

def load_official(weights, key, mask_index, frames):
    """V-JEPA 2 of a .pt file, or of vitl, vith, vitg, vitg-384, downloaded; every name must fit.
    key  target_encoder or encoder, EMA or online: the hub has returned both. It is E and target"""
    url, how = "https://dl.fbaipublicfiles.com/vjepa2", dict(map_location="cpu", weights_only=True)
    size = 384 if "384" in weights else 256
    with explain(f"--weights {weights}, --weights-key {key}", Exception):
        saved = (torch.load(weights, **how) if Path(weights).is_file() else
                 torch.hub.load_state_dict_from_url(f"{url}/{weights}.pt", **how))
        own, other = ({k.replace("module.", "").replace("backbone.", ""): w for k, w in
                       saved[p].items() if "pos_embed" not in k} for p in (key, "predictor"))
        dim, hidden = len(own["norm.weight"]), len(own["blocks.0.mlp.fc1.bias"])
        depth, depth_p = (sum(k.endswith("norm1.bias") for k in part) for part in (own, other))
        heads = 16 if dim == 1280 else dim // 64  # ViT-g: 22, not the 16 of their vit_giant
        grid, masks = (frames // 2, size // 16, size // 16), sum("mask_tokens" in k for k in other)
        encoder = VideoEncoder(grid, 16, dim, depth, heads, hidden, True, size)
        predictor = LatentPredictor(grid, dim, len(other["predictor_norm.bias"]), depth_p, True,
                                    masks, mask_index)
        encoder.load_state_dict(own)
        predictor.load_state_dict(other)
    return WorldModel(encoder, predictor, grid)

# ---- method ----------------------------------------------------------------------------

def flow_loss(net, z1, y, t, given):
    """E |u - (z1 - z0)|^2 without the given frames, which enter clean; t (B,) -> scalar. With
    x = z + (1 - t) u it is E |x - z1|^2 / (1 - t)^2: for a fixed t a denoising autoencoder."""
    z0, t5 = torch.randn_like(z1), t.view(-1, 1, 1, 1, 1)
    z = t5 * z1 + (1 - t5) * z0
    z = torch.cat([z1[:, :, :given], z[:, :, given:]], 2)
    u = net(z, t, y).float()  # float32 again: only the network runs in bf16
    return (u - (z1 - z0))[:, :, given:].square().mean()

def hide_boxes(n, grid, count, share, device):
    """n unions of `count` boxes of `share` of the frame, aspect 0.75 to 1.5: bool (n, H, W)."""
    aspect, axes = 0.75 + 0.75 * torch.rand(n, 1, device=device), []
    for side, ratio in (grid[1], aspect), (grid[2], 1 / aspect):
        length = (share * grid[1] * grid[2] * ratio).sqrt().round().clamp(1, side)  # (n, 1)
        start = (torch.rand(n, count, device=device) * (side - length + 1)).floor()
        place = torch.arange(side, device=device) - start[..., None]
        axes.append((place >= 0) & (place < length[..., None]))  # (n, count, side)
    box = axes[0][..., None] & axes[1][:, :, None]
    return torch.where(box.any(1).all((1, 2), keepdim=True), box[:, 0], box.any(1))  # never all

def draw_visible(n, grid, masks, device):
    """What E sees of n clips: bool (n, T H W).
    blocks  hides 8 boxes of 15 % of the frame or 2 of 70 %, the same in all frames (V-JEPA 2)
    causal  hides what comes after a frame of the middle half; mixed: one of the three a clip"""
    T, H, W = grid
    cut = torch.randint(-(-T // 4), 3 * T // 4 + 1, (n, 1, 1, 1), device=device)
    causal = (torch.arange(T, device=device).view(T, 1, 1) < cut).expand(n, T, H, W)
    if masks == "causal":
        return causal.flatten(1)
    short, long = (~hide_boxes(n, grid, *k, device)[:, None] for k in ((8, 0.15), (2, 0.7)))
    kind = torch.randint(2 + (masks == "mixed"), (n, 1, 1, 1), device=device)
    return torch.where(kind == 0, short, torch.where(kind == 1, long, causal)).flatten(1)

def plain_norm(z):
    """LayerNorm without affine over the channels, in float32."""
    return F.layer_norm(z.float(), z.shape[-1:])

def jepa_loss(net, video, visible, spread=0.0):
    """|P(mask tokens, E(visible)) - sg(LN(E_ema(clip)))|, mean over channels and hidden tokens;
    spread weighs what keeps the channels of E from collapsing: std >= 1, no covariance (VICReg)."""
    z_hat, z, h = net(video, visible)
    error = (z_hat.float() - plain_norm(z)).abs().mean(-1)  # (B, N); z_hat without LN
    loss = ((error * ~visible).sum(1) / (~visible).sum(1)).mean()
    cov = h.float().flatten(0, 1).T.cov()  # (D, D), hidden tokens, too
    std, off = cov.diagonal().add(1e-4).sqrt(), cov - cov.diagonal().diag()
    return loss + spread * (F.relu(1 - std).mean() + off.square().sum() / len(cov))

def surprise(video, world, C=4, W=8, stride=1, cos="feature", grad="target"):
    """1 - cos(P(E(first C frames)), E(W frames)) on the last W - C after LN, mean over windows from
    0, stride, 2 stride, ...: (B,), float32. Eq. 4-6, whose S is to be large: a slip of the print.
    cos   feature: over a token's channels, as the paper reads; token: over a channel's tokens
    grad  target: of E(W frames) alone (their code); context: of P(E(C frames)) (for Cosmos)"""
    target = torch.no_grad()(world.target) if grad == "context" else world.target
    predict = torch.no_grad()(world.predict) if grad == "target" else world.predict
    windows = rearrange(video.float().unfold(2, W, stride), "b c k h w f -> (b k) c f h w")
    with torch.autocast(video.device.type, enabled=False):
        z = target(windows)  # Eq. 5, (B k, N, D)
        z_hat = predict(windows[:, :, :C], z.shape[1])  # Eq. 4
    z_hat, z = plain_norm(z_hat), plain_norm(z[:, -z_hat.shape[1]:])
    similar = F.cosine_similarity(z_hat, z, {"feature": 2, "token": 1}[cos]).mean(1)
    return 1 - similar.unflatten(0, (len(video), -1)).mean(1)  # Eq. 6

def health(world, video, tracks, S, W):
    """What tells a collapse, on held-out clips (B, 3, F, S, S), tracks (B, F, 3, 4): std over clips
    and rank, exp(entropy of the spectrum), of target features of W frames after LN; mean S, and of
    frames in random order; R^2 of ridge probes of ball 0 from two token frames. Numbers by name."""
    T, half = world.grid[0] * W // video.shape[2], len(video) // 2
    z = plain_norm(world.target(video[:, :, :W]))  # as long as in training
    p = F.normalize(torch.linalg.eigvalsh(z.flatten(0, 1).T.cov()).clamp(min=1e-9), 1, 0)
    x, y = z.unflatten(1, (T, -1)).flatten(2), tracks[:, :W:W // T, 0].to(z)
    x, y = torch.cat([x[:, :-1], x[:, 1:]], 2), y[:, :-1]  # (B, T - 1, 2 H W D), (B, T - 1, 4)
    x, y = x - x[:half].mean((0, 1)), y - y[:half].mean((0, 1))
    (x, x_new), (y, y_new) = ([w[:half].flatten(0, 1), w[half:].flatten(0, 1)] for w in (x, y))
    K = x @ x.T * (1 + 0.1 * torch.eye(len(x)).to(x))
    r2 = 1 - (x_new @ x.T @ torch.linalg.solve(K, y) - y_new).square().mean(0) / y_new.var(0)
    order = torch.randperm(video.shape[2], generator=torch.Generator().manual_seed(0))
    numbers = (z.std(0).mean(), (-p * p.log()).sum().exp(), S(video).mean(),
               S(video[:, :, order]).mean(), r2[:2].mean(), r2[2:].mean())
    return dict(zip("std rank surprise shuffled position velocity".split(), map(float, numbers)))

def best_of_n(candidates, S):
    """Of N candidates (N, B, ...) a condition, that of least S (N, B): (B, ...). Eq. 10."""
    return candidates[S.argmin(0), torch.arange(S.shape[1], device=S.device)]

def guided_step(velocity, decode, S, z, t, eta):
    """z - eta |z| g / |g|, g = d S(decode(x_hat)) / dz: a step of the authors' code (Eq. 7-9, 12).
    Eq. 12 to the letter would add -omega (1 - t) / t dS/dz to the velocity, infinite at t = 0."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        g, = torch.autograd.grad(S(decode(z + (1 - t) * velocity(z, t))).sum(), z)  # S(x_hat)
    length = eta * z.detach().flatten(1).norm(dim=1, keepdim=True)  # (B, 1)
    return z.detach() - (length * F.normalize(g.flatten(1))).view_as(z)

@torch.no_grad()
def sample_guided(net, decode, S, z, y, cond, sampling_steps, eta=0.0, skip=0, every=1):
    """Euler steps from noise z (B, C, F, H, W) to data, its first frames cond; y (B,): labels.
    Guided: each `every`-th step from `skip` on (x_hat is a blur before); eta = 0: none is."""
    def velocity(z, t):  # conditional_velocity of self_refine.py without its guidance by labels
        u = net(torch.cat([cond, z[:, :, GIVEN:]], 2), z.new_full((len(z),), t), y).float()
        return torch.cat([(cond - z[:, :, :GIVEN]) / (1 - t), u[:, :, GIVEN:]], 2)
    for i in range(sampling_steps):
        t = i / sampling_steps
        if eta and i >= skip and (i - skip) % every == 0:
            z = guided_step(velocity, decode, S, z, t, eta)
        z = z + velocity(z, t) / sampling_steps
    return z

# ---- train -----------------------------------------------------------------------------

def build(cfg, codec):
    """Generator and world model of this config, untrained, or with published weights."""
    net = VideoDiT((cfg.components, cfg.frames, 3, 1), 1, 1, 3, cfg.dim, cfg.depth, heads=4)
    if cfg.world == "official":
        return net, load_official(cfg.weights, cfg.weights_key, cfg.mask_index, cfg.frames)
    grid, encoder, width = (cfg.frames, 3, 1), codec, min(40, cfg.components)
    if cfg.world == "tiny":
        grid, width = (cfg.frames // 2, cfg.image_size // 4, cfg.image_size // 4), cfg.world_dim
        encoder = VideoEncoder(grid, 4, width, 6, width // 32, 4 * width)
    predictor = LatentPredictor(grid, width, cfg.predictor_dim, depth=4)
    return net, WorldModel(encoder, predictor, grid, cfg.world == "tiny")

@torch.no_grad()
def show_rows(net, codec, world, cfg, device, path):
    """Continue cfg.n held-out clips. GIF: a row a clip, real | one sample | guided | best of N |
    best of N guided; PNG: the frames of clip 2, a row each. Returns the world model's health."""
    clips, parts = bouncing_balls(cfg.n + 256, cfg.frames, cfg.image_size, 1, cfg.texture), []
    videos, y = clips.videos.to(device).float() / 127.5 - 1, clips.labels.to(device)
    S = lambda video: surprise(video, world, cfg.C, cfg.W, cfg.stride, cfg.cos, cfg.grad)
    for index, generator in shares(cfg.n, 100, cfg.seed):
        z1, drawn = codec.encode(videos[index]), {0.0: [], cfg.eta: []}
        for _ in range(cfg.best_of):
            noise = torch.randn(z1.shape, generator=generator).to(device)
            for eta, candidates in drawn.items():
                with autocast(cfg, device):
                    z = sample_guided(net, codec.decode, S, noise, y[index], z1[:, :, :GIVEN],
                                      cfg.sampling_steps, eta, cfg.skip, cfg.every)
                candidates.append(codec.decode(z).clamp(-1, 1))
        best = [best_of_n(torch.stack(c), torch.stack([*map(S, c)])) for c in drawn.values()]
        rows = [videos[index], *(candidates[0] for candidates in drawn.values()), *best]
        parts.append((index, to_uint8(torch.stack(rows, 1))))
    rows = gather(parts)  # (n, 5, 3, F, S, S); without guidance 3 instead of 5
    save_gif(rows.flatten(0, 1), f"{path}.gif", rows.shape[1])
    save_grid(rearrange(rows[:3][-1], "row c f h w -> (row f) c h w"), f"{path}.png", cfg.frames)
    held = videos[cfg.n:], clips.tracks[cfg.n:], S, cfg.W
    return {} if cfg.world == "official" else health(world, *held)

def train_stage(cfg, model, decay, loss, average, check=lambda path: {}, **extra):
    """Train one stage by loss(indices). average: an EMA and its source; check(path): numbers."""
    checks, trained = {}, [w for w in model.parameters() if w.requires_grad]
    groups = [{"params": [w for w in trained if w.ndim > 1], "weight_decay": decay},
              {"params": [w for w in trained if w.ndim <= 1], "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, cfg.lr, (0.9, 0.99), fused=True)
    state = {"model": model, "opt": opt, **extra}
    for step in steps(cfg, state):
        value = loss(batch_indices(cfg.clips, cfg, step).to(trained[0].device, non_blocking=True))
        value.backward()
        grad_norm = nn.utils.clip_grad_norm_(trained, 1.0)
        for group in opt.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / 100, 2 - 2 * step / cfg.steps)
        opt.step()
        opt.zero_grad()
        ema_update(*average, cfg.ema_decay, step) if average else None
        if due(cfg, cfg.sample_every, step):
            checks = check(f"{cfg.out}/samples_{step + 1:07d}")
        log(cfg, state, step, loss=value, lr=group["lr"], grad_norm=grad_norm, **checks)

def train(cfg):
    device = setup(cfg, "steps")  # the learning rate depends on it
    if cfg.fresh and RANK == 0:
        Path(cfg.out, "last.pt").unlink(missing_ok=True)  # the first stage comes before it
    videos, labels, codec = load_videos(cfg, device)
    model, world = (net.to(device) for net in build(cfg, codec))
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # for sampling; not compiled or wrapped
    net, world_net = parallel(model, cfg, device), parallel(world, cfg, device)
    def generator_loss(i):
        z1, t = codec.encode(videos[i].float() / 127.5 - 1), torch.rand(len(i), device=device)
        with autocast(cfg, device):
            return flow_loss(net, z1, labels[i], t, GIVEN)
    def world_loss(i):
        T, k = world.grid[0] * cfg.W // cfg.frames, torch.randint(cfg.frames - cfg.W + 1, ()).item()
        visible = draw_visible(len(i), (T, *world.grid[1:]), cfg.masks, device)
        x = videos[i][:, :, k:k + cfg.W].float() / 127.5 - 1  # a window, as the reward has them
        with autocast(cfg, device):
            return jepa_loss(world_net, x, visible, float(world.tiny))
    first = dataclasses.replace(cfg, out=f"{cfg.out}/generator", steps=cfg.generator_steps)
    setup(first, "steps")
    train_stage(first, model, 0.0, generator_loss, (ema, model), generator=ema, codec=codec)
    train_stage(cfg, world, 0.04, world_loss, world.tiny and (world.target, world.encoder),
                lambda path: show_rows(ema, codec, world, cfg, device, path), ema=ema, codec=codec)

def sample(cfg):
    """Continue cfg.n held-out clips with the networks of the checkpoint cfg.sample."""
    device, saved = setup(cfg), load_checkpoint(cfg.sample, "ema")
    if not cfg.weights and cfg.world != (own := saved["config"]["world"]):
        fail(f"--world {cfg.world}: the world model of {cfg.sample} is {own}")
    codec = FrozenCodes(cfg.image_size, cfg.components)
    codec.load_state_dict(saved["codec"])
    net, world = (part.to(device).eval().requires_grad_(False) for part in build(cfg, codec))
    net.load_state_dict(saved["ema"])
    cfg.weights or world.load_state_dict(saved["model"])
    show_rows(net, codec.to(device), world, cfg, device, f"{cfg.out}/sample")

def main(argv=None):
    cfg = parse_config(Config, PRESETS, SAMPLING, argv)
    sample(cfg) if cfg.sample else train(cfg)

if __name__ == "__main__":
    main()
