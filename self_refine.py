"""Self-refining video sampling: a video model as its own denoising autoencoder while it samples.

Paper     Jang, Ki, Jo, Xie, Yoon, Hwang. Self-Refining Video Sampling. arXiv:2601.18577v1
Here      Eq. 2-3 flow_loss, predict-and-perturb (Eq. 5-9) and the uncertainty mask (Eq. 10-11)
          pnp_sample, the schedule of its iterations plan_steps; pretrained Wan: refine_pretrained
Changed   plans are windows of t, not of step numbers, which depend on the flow shift, without t = 0
          (the authors skip 1 to 3 steps); noise of the iterations is of a generator of its own, one
          a clip. As in the authors' code, not in Eq. 10-11: a certain place stays so until the next
          step, the mask also mixes x, Euler replaces Wan's UniPC, given frames by replacement. The
          mask keeps its channel axis (their shapes fit one clip only). A small model, trained here
Left out  the early exit of the inner loop where all is certain; per-token times (Wan 2.2 TI2V-5B);
          a second expert for low noise (Wan 2.2 A14B); image conditions in further channels
Notation  z1   clean latent video, (B, C, F, H, W)     t    0 = noise ... 1 = data
          z0   noise of the same shape                 u    velocity, ~ z1 - z0
          z    t z1 + (1 - t) z0                       x    z + (1 - t) u, the prediction of z1
          y    number of balls - 1, int64 (B,);        cond clean first frames, (B, C, given, H, W)
               `classes` = no condition                K    iterations of one step
Run       python self_refine.py                      # loss 0.300, 4.4 min, 1 CPU core
          python self_refine.py --preset gpu         # not measured
          python self_refine.py --preset wan         # not measured
"""
import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import (autocast, batch_indices, bouncing_balls, due, ema_update, explain, gather,
                    load_checkpoint, log, mix, parallel, parse_config, save_gif, save_grid, setup,
                    shares, steps, to_uint8)

# ---- config ----------------------------------------------------------------------------

def parse_plan(text):
    """Windows "low-high:K", a comma between them, in which a step has K iterations: a list."""
    words = (re.split("[-:]", word) for word in text.split(",") if word)
    return [(float(low), float(high), int(K)) for low, high, K in words]

def flow_times(n, shift=1.0):
    """n + 1 times, 0 ... 1: t = 1 - sigma, sigma = s q / (1 + (s - 1) q) with q = 1 - i / n."""
    return [i / n / (1 + (shift - 1) * (1 - i / n)) for i in range(n + 1)]

def plan_steps(windows, times):
    """Iterations of each step, {i: K}: those of the window [low, high) that its time lies in; at
    t = 0 none, as the state is noise alone and an iteration would only draw it anew."""
    for low, high, _ in windows:
        if not any(low <= t < high for t in times[1:-1]):
            raise ValueError(f"plan: no step after t = 0 lies in {low:g}-{high:g}")
    return {i: K for i, t in enumerate(times[:-1]) for low, high, K in windows
            if low <= t < high and t > 0}

@dataclass(frozen=True)
class Config:
    preset: str = ""  # gpu | wan; a flag beats its preset
    out: str = ""  # run folder; empty: runs/self_refine or runs/self_refine-<preset>
    fresh: bool = False  # start over instead of continuing the run in the folder
    seed: int = 0  # of weights, data order and noise
    device: str = "auto"  # auto | cuda | mps | cpu
    precision: str = "auto"  # auto | bf16 | fp32; auto: bf16 where the device is fast at it
    compile: str = "auto"  # auto | on | off; auto: with CUDA, or Linux and g++; takes a minute
    image_size: int = 32  # side S of a frame in pixels; Wan: its height
    batch_size: int = 64  # clips per step, summed over all GPUs
    steps: int = 2600  # optimizer steps
    lr: float = 1.5e-3  # AdamW, betas (0.9, 0.99), no decay; falls to 0 over the last half
    ema_decay: float = 0.998  # of the weights that are sampled
    grad_clip: float = 1.0  # largest norm of the gradient
    log_every: int = 50  # steps between two lines in metrics.jsonl
    save_every: int = 650  # steps between two checkpoints
    sample_every: int = 1300  # steps between two animations
    sample: str = ""  # draw from this checkpoint instead of training
    n: int = 8  # how many held-out clips are continued and shown
    clips: int = 20_000  # training clips, made at the start
    frames: int = 16  # of a clip, at 15 a second (Wan: 4 k + 1, 16 a second)
    given: int = 2  # first frames that are given clean (Wan: none)
    texture: bool = False  # a random smooth background that does not move, instead of black
    components: int = 64  # principal components of a channel of a frame; 0: work on pixels
    patch_frames: int = 1  # latent frames in a patch, which becomes one token
    patch: int = 1  # side of a patch; with components 1: a token is a channel of a frame
    dim: int = 128  # width
    depth: int = 4  # blocks
    heads: int = 4  # attention heads
    label_drop: float = 0.1  # share of labels replaced by "no condition", for guidance
    warmup: int = 100  # steps of linear warm-up
    plan: str = "0.2-0.4:3"  # windows low-high:K of t; "": plain Euler (paper: t < 0.2, K = 2 or 3)
    tau: float = 0.0  # places whose prediction moves less are kept (paper: 0.25); 0: no mask
    sampling_steps: int = 20  # Euler steps from noise to data
    shift: float = 1.0  # flow shift s: noise level q becomes s q / (1 + (s - 1) q) (Wan: its own)
    guidance: float = 1.0  # classifier-free guidance; 1: off
    generator: str = ""  # a pretrained Wan model of diffusers, in bf16, from text alone
    prompt: str = ""  # what the generator shows
    width: int = 0  # of the generator's frames in pixels

    def __post_init__(self):
        ones = ("frames", "patch_frames", "patch", "heads", "warmup", "sampling_steps")
        for name in (*ones, "lr", "grad_clip", "tau", "components", "depth"):
            if not getattr(self, name) >= (least := int(name in ones)):
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (0 <= self.label_drop < 1 and 0 <= self.ema_decay < 1):
            raise ValueError("label_drop and ema_decay must be in [0, 1)")
        if not self.shift > 0 or not 0 <= self.given < self.frames:
            raise ValueError(f"need shift > 0 and given < frames, got {self.shift}, {self.given}")
        if not re.fullmatch(r"(\d*\.?\d+-\d*\.?\d+:\d+(,|$))*", self.plan):
            raise ValueError(f"plan {self.plan} is not low-high:K or several, a comma between them")
        windows, edge = parse_plan(self.plan), 0
        for low, high, K in windows:
            if not edge <= low < high <= 1 or K < 1:
                raise ValueError(f"plan {self.plan} needs rising windows in [0, 1] and K >= 1")
            edge = high
        if self.generator:
            misfit = self.image_size % 16 or self.width % 16 or self.frames % 4 != 1
            if misfit or self.width < 1 or not self.prompt:
                raise ValueError("a generator needs a prompt, 4 k + 1 frames, sides of 16 k pixels")
            return
        plan_steps(windows, flow_times(self.sampling_steps, self.shift))
        if self.dim < 1 or self.dim % (2 * self.heads):
            raise ValueError(f"dim / heads must be even, got {self.dim} / {self.heads}")
        side = 1 if self.components else self.image_size
        if side % self.patch or self.frames % self.patch_frames:
            raise ValueError(f"patches of {self.patch_frames} frames, side {self.patch} do not fit")
        if self.components > self.image_size**2 or self.batch_size > self.clips:
            raise ValueError("more components than pixels of a frame, or batch_size than clips")

PRESETS = {
    "gpu": dict(  # pixels: 512 tokens, patch 2 x 4 x 4
        batch_size=256, steps=5000, lr=1e-3, save_every=1000, clips=50_000, components=0,
        patch_frames=2, patch=4, dim=256, depth=8, heads=8, sampling_steps=40),
    # the authors' plan, steps 2-5 of 40 with K = 3, 6-13 with K = 1, as times t at a shift of 3
    "wan": dict(  # tau, guidance: the defaults of their pipeline (their script: 0.2, and 4 or 3)
        generator="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", image_size=480, width=832, frames=81, given=0,
        n=1, plan="0.013-0.05:3,0.05-0.145:1", tau=0.25, sampling_steps=40, guidance=5.0,
        prompt="Three glass marbles roll down a wooden slope, collide and bounce off the wall"),
}
SAMPLING = ("plan", "tau", "sampling_steps", "shift", "guidance")

# ---- data ------------------------------------------------------------------------------
# Latents z1 are (B, C, F, H, W) everywhere. Those of FramePCA (its z; its x are pixels, its K a
# number of components) have a channel's components as C, the three channels as H = 3, and W = 1.

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

class Pixels(nn.Module):
    """The latent is the video."""
    encode = decode = staticmethod(lambda videos: videos)

def make_clips(n, seed, cfg, device):
    """n clips of bouncing balls in [-1, 1], 500 at a time: yields videos (<= 500, 3, F, S, S) and
    labels, the number of balls - 1. A function of the seed alone."""
    for i in range(0, n, 500):
        shape = min(500, n - i), cfg.frames, cfg.image_size
        clips = bouncing_balls(*shape, mix(seed, i), cfg.texture)
        yield clips.videos.to(device).float() / 127.5 - 1, clips.labels.to(device)

def load_clips(cfg, codec, device):
    """Latents z1 (M, C, F, H, W) and labels (M,) of the training clips; fits the codec."""
    z1, labels = None, []
    for videos, y in make_clips(cfg.clips, 0, cfg, device):
        if cfg.components and not labels:
            codec.fit(videos)
        part = codec.encode(videos)
        if not labels:  # in place: the pixels of the gpu preset are 10 GB, a list and its join 20
            z1 = part.new_empty(cfg.clips, *part.shape[1:])
        z1[500 * len(labels):][:len(part)] = part
        labels.append(y)
    return z1, torch.cat(labels)

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

# h are tokens, in patterns the height; shift is adaLN's; times go into time_features as 0 ... 1000.
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

# ---- method ----------------------------------------------------------------------------

def flow_loss(net, z1, y, t, given):
    """E |u - (z1 - z0)|^2 without the given frames, which enter clean; t (B,) -> scalar. With
    x = z + (1 - t) u it is E |x - z1|^2 / (1 - t)^2: for a fixed t a denoising autoencoder."""
    z0, t5 = torch.randn_like(z1), t.view(-1, 1, 1, 1, 1)
    z = t5 * z1 + (1 - t5) * z0
    z = torch.cat([z1[:, :, :given], z[:, :, given:]], 2)
    u = net(z, t, y).float()  # float32 again: only the network runs in bf16
    return (u - (z1 - z0))[:, :, given:].square().mean()

def conditional_velocity(net, y, cond, guidance=1.0):
    """The function (z, t) -> u that a sampler follows; t is a number in [0, 1).

    The network sees cond (B, C, given, H, W) in place of the first frames of z; their own velocity
    leads from wherever they are now to cond, since a perturbation has changed their noise.
    """
    given = cond.shape[2]

    def velocity(z, t):
        seen = torch.cat([cond, z[:, :, given:]], 2)
        times = seen.new_full((len(z),), t)
        if guidance == 1:
            u = net(seen, times, y).float()
        else:
            both = torch.cat([y, torch.full_like(y, net.classes)])
            u_y, u_null = net(seen.repeat(2, 1, 1, 1, 1), times.repeat(2), both).float().chunk(2)
            u = u_null + guidance * (u_y - u_null)  # for the prediction as for the step
        return torch.cat([(cond - z[:, :, :given]) / (1 - t), u[:, :, given:]], 2)
    return velocity

@torch.no_grad()
def pnp_sample(velocity, z, times, plan, generators, tau=0.0):
    """Euler steps from noise z to data; before step i predict and perturb plan[i] times.

    velocity    function (z, t) -> u; see conditional_velocity
    z           noise z0 (B, C, F, H, W), float32
    times       rising numbers, 0 ... 1; no iteration at 1, where there is no noise
    plan        {i: K}; {} is the plain Euler sampler
    generators  B generators of fresh noise, a clip each: the initial noise is not touched by them
    tau         a place is certain once its prediction moves by less (Eq. 10); 0: none ever is
    returns     z (B, C, F, H, W) at the last time; the uncertainty U (B, 1, F, H, W) of the last
                iteration of each planned step, {i: U}; one evaluation a step and an iteration
    """
    U = {}
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        u = velocity(z, t)
        x, z_next = z + (1 - t) * u, z + (t_next - t) * u  # predict; Euler step
        certain = torch.zeros_like(z[:, :1], dtype=torch.bool)  # (B, 1, F, H, W)
        for _ in range(plan.get(i, 0)):
            eps = torch.stack([torch.randn(z.shape[1:], generator=g, device=g.device)
                               for g in generators]).to(z.device)
            z = t * x + (1 - t) * eps  # perturb, back to the same t (Eq. 5-9)
            u = velocity(z, t)
            x_new, z_new = z + (1 - t) * u, z + (t_next - t) * u
            U[i] = (x_new - x).abs().mean(1, keepdim=True)
            # Alg. 2 may also mean that what was uncertain stays so: uncertain |= U[i] > tau
            certain = certain | (U[i] < tau)  # Eq. 10
            x = torch.where(certain, x, x_new)  # not in the paper
            z_next = torch.where(certain, z_next, z_new)  # Eq. 11
        z = z_next
    return z, U

def wan_velocity(transformer, text, no_text, guidance):
    """The function (z, t) -> u of a Wan transformer, whose output is z0 - z1 at sigma = 1 - t."""
    def velocity(z, t):
        time = torch.full((len(z),), 1000 * (1 - t), device=z.device)
        v, v_null = (transformer(hidden_states=z.to(states.dtype), timestep=time,
                                 encoder_hidden_states=states, return_dict=False)[0].float()
                     for states in (text, no_text))
        return -(v_null + guidance * (v - v_null))
    return velocity

# ---- train -----------------------------------------------------------------------------

def build(cfg):
    """The network of this config, for 1, 2 or 3 balls, and what makes latents of videos."""
    codec = FramePCA(cfg.image_size, cfg.components) if cfg.components else Pixels()
    C, H, W = (cfg.components, 3, 1) if cfg.components else (3, cfg.image_size, cfg.image_size)
    shape = C, cfg.frames, H, W
    return VideoDiT(shape, cfg.patch_frames, cfg.patch, 3, cfg.dim, cfg.depth, cfg.heads), codec

def draw(net, codec, videos, y, index, cfg, device, plan):
    """Continue the first cfg.given frames of videos (B, 3, F, S, S): the same in [-1, 1], float32.
    The numbers of the clips, index (B,), and the seed fix the noise, whatever the plan is."""
    z1 = codec.encode(videos.to(device))  # only its shape and its given frames are used
    initial, fresh = ([torch.Generator().manual_seed(mix(cfg.seed, int(i), kind)) for i in index]
                      for kind in (0, 1))
    z0 = torch.stack([torch.randn(z1.shape[1:], generator=g) for g in initial]).to(device)
    velocity = conditional_velocity(net, y.to(device), z1[:, :, :cfg.given], cfg.guidance)
    times = flow_times(cfg.sampling_steps, cfg.shift)
    with autocast(cfg, device):
        z, _ = pnp_sample(velocity, z0, times, plan_steps(plan, times), fresh, cfg.tau)
    return codec.decode(z).clamp(-1, 1)

def save_samples(net, codec, cfg, device, name):
    """Held-out clips, real | Euler | refined: a GIF of at most 64, a row each, a PNG of the first
    three, with one to three balls: rows real, Euler, refined of each, columns the frames."""
    videos, y = (torch.cat(part) for part in zip(*make_clips(cfg.n, 1, cfg, "cpu")))
    parts = []
    for index, _ in shares(cfg.n, 100, cfg.seed):
        drawn = [draw(net, codec, videos[index], y[index], index, cfg, device, plan).cpu()
                 for plan in ([], parse_plan(cfg.plan))]
        parts.append((index, torch.stack([videos[index], *drawn], 1)))  # (B, 3, 3, F, S, S)
    videos = gather(parts)
    save_gif(videos[:64].flatten(0, 1), f"{cfg.out}/{name}.gif", columns=3)
    save_grid(videos[:3].transpose(2, 3).flatten(0, 2), f"{cfg.out}/{name}.png", cfg.frames)

def train(cfg):
    device = setup(cfg, "steps")  # the learning rate depends on it
    model, codec = (module.to(device) for module in build(cfg))
    z1, labels = load_clips(cfg, codec, device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # for sampling; not compiled or wrapped
    opt = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, 0.99), weight_decay=0, fused=True)
    net = parallel(model, cfg, device)
    state = {"model": model, "ema": ema, "opt": opt, "codec": codec}

    for step in steps(cfg, state):
        index = batch_indices(len(z1), cfg, step).to(device, non_blocking=True)
        y = torch.where(torch.rand(len(index), device=device) < cfg.label_drop, model.classes,
                        labels[index])
        t = torch.rand(len(index), device=device)
        with autocast(cfg, device):
            loss = flow_loss(net, z1[index], y, t, cfg.given)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        lr = cfg.lr * min(1, (step + 1) / cfg.warmup, 2 - 2 * step / cfg.steps)
        opt.param_groups[0]["lr"] = lr
        opt.step()
        opt.zero_grad()
        ema_update(ema, model, cfg.ema_decay, step)
        log(cfg, state, step, loss=loss, lr=lr, grad_norm=grad_norm)
        if due(cfg, cfg.sample_every, step):
            save_samples(ema, codec, cfg, device, f"samples_{step + 1:07d}")

def sample(cfg):
    """Continue cfg.n held-out clips with the network of the checkpoint cfg.sample."""
    device, saved = setup(cfg), load_checkpoint(cfg.sample)
    net, codec = (module.to(device).eval() for module in build(cfg))
    net.load_state_dict(saved["ema"])
    codec.load_state_dict(saved["codec"])
    save_samples(net, codec, cfg, device, "sample")

@torch.no_grad()
def refine_pretrained(cfg):
    """Draw cfg.n videos of cfg.prompt with a pretrained Wan model: a GIF, Euler | refined."""
    device = setup(cfg)
    with explain(f"--generator {cfg.generator}: needs diffusers and transformers", Exception):
        from diffusers import WanPipeline
        pipe = WanPipeline.from_pretrained(cfg.generator, torch_dtype=torch.bfloat16).to(device)
    pipe.scheduler.set_timesteps(cfg.sampling_steps)
    times = (1 - pipe.scheduler.sigmas).tolist()  # with the model's own flow shift
    with explain(f"--generator {cfg.generator}", ValueError):
        plans = {}, plan_steps(parse_plan(cfg.plan), times)
    text, no_text = pipe.encode_prompt(cfg.prompt, "", max_sequence_length=512)
    velocity = wan_velocity(pipe.transformer, text, no_text, cfg.guidance)
    height, width = (side // pipe.vae_scale_factor_spatial for side in (cfg.image_size, cfg.width))
    frames = (cfg.frames - 1) // pipe.vae_scale_factor_temporal + 1
    mean, std = (torch.tensor(numbers, device=device).view(-1, 1, 1, 1)
                 for numbers in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
    shape, parts = (1, len(mean), frames, height, width), []
    for index, generator in shares(cfg.n, 1, cfg.seed):
        z0, videos = torch.randn(shape, generator=generator).to(device), []
        fresh = torch.Generator().manual_seed(mix(cfg.seed, int(index), 1))
        for plan in plans:
            z, _ = pnp_sample(velocity, z0, times, plan, [fresh], cfg.tau)
            z = (z * std + mean).to(pipe.vae.dtype)
            videos.append(to_uint8(pipe.vae.decode(z, return_dict=False)[0]))
        parts.append((index, torch.stack(videos, 1)))  # (1, 2, 3, F, H, W)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    save_gif(gather(parts).flatten(0, 1), f"{cfg.out}/sample.gif", columns=2, fps=16)

def main(argv=None):
    cfg = parse_config(Config, PRESETS, SAMPLING, argv)
    (sample if cfg.sample else refine_pretrained if cfg.generator else train)(cfg)

if __name__ == "__main__":
    main()
