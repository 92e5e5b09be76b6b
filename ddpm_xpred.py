"""A pixel transformer that predicts the clean image (JiT), and the other eight trainers of Tab. 2.

Paper     Li, He. Back to Basics: Let Denoising Generative Models Denoise. arXiv:2511.13720v1 (JiT)
          Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. arXiv:2006.11239v2 (DDPM)
Here      JiT Eq. 1-2 flow_matching, Tab. 1 convert, Tab. 2 denoising_loss, Alg. 2 sample_heun,
          Tab. 9 JiT and PRESETS (but guidance); DDPM Eq. 4 variance_preserving, Eq. 6-7 and Alg. 2
          sample_ancestral
Changed   the target takes the same clipped conversion as the output (the authors' code does so too;
          clipping the output alone would give a perfect one a loss); divisions by t, which only
          eps-prediction has, are clipped like those by 1 - t; rotary embedding turns the channels
          (i, i + D / 2) instead of (2i, 2i + 1), a renaming that runs faster; one EMA, with a ramp;
          --process ddpm: time runs as in JiT, from noise to data; v points to the data, b x - a eps
Left out  JiT's three EMAs in parallel, auxiliary classifier loss and guidance sweeps; DDPM's
          discrete decoder (Eq. 13) and its U-Net
Notation  x    clean image, (B, 3, H, W) in [-1, 1]     t  0 = noise ... 1 = data, float32 (B,)
          eps  noise of the same shape                  y  class, int64 (B,); `classes` = no class
          z    a x + b eps, the noisy image             a, b, da, db  factors at t, (B, 1, 1, 1)
          v    da x + db eps, the velocity              *_hat         predicted by the network
Run       python ddpm_xpred.py                     # judge accuracy 0.849, 3 min, 2 CPU cores
          python ddpm_xpred.py --preset cifar10    # not measured
          torchrun --nproc-per-node 8 ddpm_xpred.py --preset paper --data <folder>  # not measured
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import (autocast, batch, due, ema_update, gather, load_checkpoint, load_images, log,
                    parallel, parse_config, save_grid, save_npz, setup, shares, steps,
                    to_uint8)

# ---- config ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    preset: str = ""  # cifar10 | paper | paper-l | paper-h | paper-g; a flag beats its preset
    out: str = ""  # run folder; empty: runs/ddpm_xpred or runs/ddpm_xpred-<preset>
    fresh: bool = False  # start over instead of continuing the run in the folder
    seed: int = 0  # of weights, data order and noise
    device: str = "auto"  # auto | cuda | mps | cpu
    precision: str = "auto"  # auto | bf16 | fp32; auto: bf16 where the device is fast at it
    compile: str = "auto"  # auto | on | off; auto: with CUDA, or Linux and g++; takes a minute
    data: str = "shapes"  # shapes | folder or .tar of class sub-folders | torch/... hfds/... (timm)
    image_size: int = 16  # side S in pixels; larger images are cropped and resized
    flip: bool = False  # mirror half of the images
    skip_bad: bool = False  # leave out images that cannot be read
    batch_size: int = 64  # images per step, summed over all GPUs
    steps: int = 4000  # optimizer steps
    lr: float = 1e-3  # AdamW, betas (0.9, 0.95), no decay; constant after the warm-up (Tab. 9)
    warmup: int = 200  # steps of linear warm-up (Tab. 9)
    ema_decay: float = 0.999  # of the weights that are sampled (Tab. 9: .9996, .9998 and .9999)
    log_every: int = 100  # steps between two lines in metrics.jsonl
    save_every: int = 1000  # steps between two checkpoints
    sample_every: int = 2000  # steps between two sample grids
    sample: str = ""  # draw from this checkpoint instead of training
    n: int = 80  # how many images --sample draws
    npz: bool = False  # --sample also writes them as ADM's evaluation format
    patch: int = 4  # side of a patch: one token holds 3 patch^2 numbers
    dim: int = 128  # width
    depth: int = 5  # blocks
    heads: int = 4  # attention heads; dim / heads is a multiple of 4, for the rotation
    bottleneck: int = 32  # width inside the patch embedding; 0: one linear map (Fig. 4)
    class_tokens: int = 4  # copies of the class embedding put before the image tokens (Tab. 4)
    class_start: int = 2  # block before which they enter, counted from 0 (Tab. 9)
    dropout: float = 0.0  # in the middle half of the blocks (Tab. 9)
    process: str = "flow"  # flow | ddpm: z = t x + (1 - t) eps, or variance-preserving, 1000 steps
    prediction: str = "x"  # x | eps | v: what the network outputs (Tab. 1)
    loss: str = "v"  # x | eps | v: where the squared error is taken (Tab. 1)
    time: str = "logit-normal"  # logit-normal | uniform: law of t in training (flow only)
    t_mean: float = -0.8  # mean of logit(t) (Tab. 3)
    t_std: float = 0.8  # standard deviation of logit(t)
    noise_scale: float = 1.0  # standard deviation of eps; image_size / 256 from 256 pixels on
    clip: float = 0.05  # smallest divisor in the conversions (Sec. 4)
    label_drop: float = 0.1  # share of labels replaced by "no class"
    sampling_steps: int = 50  # Heun steps, the last one Euler (flow only: ddpm takes its 1000)
    guidance: float = 2.0  # classifier-free guidance; 1: off
    guidance_low: float = 0.1  # guidance acts for t above this; 0: from the start (flow only)
    guidance_high: float = 1.0  # and for t below this (flow only)

    def __post_init__(self):
        for name in ("patch", "dim", "depth", "heads", "sampling_steps", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "t_std", "noise_scale", "bottleneck", "class_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch {self.patch}")
        if self.dim % self.heads or self.dim // self.heads % 4:
            raise ValueError(f"dim / heads must be a multiple of 4, got {self.dim} / {self.heads}")
        if not 0 <= self.class_start < self.depth:
            raise ValueError(f"class_start {self.class_start} must be one of {self.depth} blocks")
        for name in ("clip", "label_drop", "dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.prediction == "eps" and self.process == "flow" and self.clip == 0:
            raise ValueError("prediction eps divides by t = 0 when sampling: clip must be positive")
        if self.process == "ddpm" and self.noise_scale != 1:
            raise ValueError("process ddpm needs noise_scale 1")

PAPER = dict(  # Tab. 9: JiT-B/16 on ImageNet 256; at 64 pixels --image-size 64 --patch 4, where a
    # bottleneck of 128 narrows nothing; guidance is what the code gives for 600 epochs
    data="data/imagenet/train", image_size=256, flip=True, batch_size=1024,
    steps=250_200,  # 200 epochs of 1251 steps
    lr=2e-4, warmup=6255,  # 5 epochs
    ema_decay=0.9999, save_every=5000, sample_every=25_000, patch=16, dim=768, depth=12, heads=12,
    bottleneck=128, class_tokens=32, class_start=4, guidance=2.9)
HUGE = dict(bottleneck=256, class_start=10, dropout=0.2, guidance=2.2)  # of H; G's is not known
PRESETS = {
    "cifar10": dict(
        data="torch/cifar10", image_size=32, flip=True, batch_size=256, steps=20_000, lr=5e-4,
        warmup=500, save_every=2000, sample_every=5000, dim=384, depth=12, heads=6, class_start=4),
    "paper": PAPER,
    "paper-l": PAPER | dict(dim=1024, depth=24, heads=16, class_start=8, guidance=2.4),
    "paper-h": PAPER | dict(dim=1280, depth=32, heads=16) | HUGE,
    "paper-g": PAPER | dict(dim=1664, depth=40, heads=16) | HUGE,
}
SAMPLING = ("sampling_steps", "guidance", "guidance_low", "guidance_high", "clip")

# ---- data ------------------------------------------------------------------------------
# common.load_images and common.batch give x (B, 3, S, S) in [-1, 1] and y (B,), whatever the set.

def class_rows(classes, columns=8):
    """Classes y of a grid of samples, a row each, ten at most: int64 (rows * columns,)."""
    return torch.arange(min(classes, 10)).repeat_interleave(columns)

# ---- model -----------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):  # (..., D) -> (..., D)
        return F.rms_norm(x.float(), self.weight.shape, self.weight, 1e-6).to(x.dtype)

def rotary_table(side, head_dim, prefix):
    """cos and sin of the 2-D rotary angles: (2, prefix + side^2, head_dim / 2).

    The first half of the pairs turns with the row, the second with the column of the token; the
    prefix does not turn.
    """
    rate = 10000 ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))  # (head_dim / 4,)
    angle = torch.arange(side)[:, None] * rate  # (side, head_dim / 4)
    row, column = angle[:, None].expand(-1, side, -1), angle[None].expand(side, -1, -1)
    angle = F.pad(torch.cat([row, column], -1).flatten(0, 1), (0, 0, prefix, 0))
    return torch.stack([angle.cos(), angle.sin()])

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

def position_table(side, dim):
    """Fixed sin and cos of the column (first half of the channels), then the row: (side^2, dim)."""
    rate = 10000 ** (-torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(side)[:, None] * rate
    wave = torch.cat([angle.sin(), angle.cos()], -1)  # (side, dim / 2)
    column, row = wave[None].expand(side, -1, -1), wave[:, None].expand(-1, side, -1)
    return torch.cat([column, row], -1).flatten(0, 1)

class JiT(nn.Module):
    """Just image Transformer (Sec. 4, Tab. 9): noisy image, time and class -> x, eps or v.

    A patch enters through a low-rank linear map; the class enters every block through adaLN and,
    from block class_start on, as tokens too. The output is zero at initialisation.
    """

    def __init__(self, image_size, patch, classes, dim, depth, heads, bottleneck=0, class_tokens=0,
                 class_start=0, dropout=0.0):
        super().__init__()
        side, pixels = image_size // patch, 3 * patch**2
        self.side, self.patch, self.classes, self.class_start = side, patch, classes, class_start
        self.embed = nn.Linear(pixels, dim)
        if bottleneck:  # two linear maps, as a stride-p convolution and a 1x1 one would be
            low = nn.Linear(pixels, bottleneck, bias=False)
            self.embed = nn.Sequential(low, nn.Linear(bottleneck, dim))
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)  # the last one: no class
        self.class_position = nn.Parameter(torch.zeros(class_tokens, dim))
        middle = range(depth // 4, 3 * (depth // 4))
        self.blocks = nn.ModuleList(Block(dim, heads, dropout if i in middle else 0.0)
                                    for i in range(depth))
        self.norm, self.modulation = RMSNorm(dim), nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, pixels)
        self.register_buffer("position", position_table(side, dim), persistent=False)
        table = rotary_table(side, dim // heads, class_tokens)
        self.register_buffer("rotary", table, persistent=False)
        self.initialize()

    def initialize(self):
        """Xavier for linear maps, N(0, 0.02^2) for embeddings, 0 for modulations and the head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        time = self.time[0].weight, self.time[2].weight
        for weight in (*time, self.label.weight, self.class_position):
            nn.init.normal_(weight, std=0.02)
        for module in (*[block.modulation for block in self.blocks], self.modulation, self.head):
            nn.init.zeros_(module.weight)

    def forward(self, z, t, y):  # (B, 3, H, W), (B,), (B,) -> (B, 3, H, W)
        p, label = self.patch, self.label(y)  # (B, D)
        c = F.silu(self.time(time_features(t)) + label)  # (B, D)
        h = self.embed(rearrange(z, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p))
        h, tokens = h + self.position, len(self.class_position)  # (B, N, D)
        for i, block in enumerate(self.blocks):
            if i == self.class_start:  # (B, tokens + N, D)
                h = torch.cat([(label[:, None] + self.class_position).to(h.dtype), h], 1)
            h = block(h, c, self.rotary[:, tokens if i < self.class_start else 0:])
        shift, scale = self.modulation(c)[:, None].chunk(2, -1)
        h = self.head(self.norm(h[:, tokens:]) * (1 + scale) + shift)  # (B, N, p q c)
        return rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=p, q=p)

# ---- method ----------------------------------------------------------------------------
# A process maps t (B,) to a, b, da, db, each (B, 1, 1, 1): z = a x + b eps and v = da x + db eps,
# where b da - a db = 1, so that x = b v - db z and eps = da z - a v.

def flow_matching(t):
    """z = t x + (1 - t) eps and v = dz/dt = x - eps."""
    t = t.view(-1, 1, 1, 1)
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)  # JiT Eq. 1-2

def noise_schedule(steps=1000, beta_1=1e-4, beta_T=0.02):
    """alpha_bar_k = prod (1 - beta_i) for k = 0 (data, 1) ... steps. float64 (steps + 1,)."""
    beta = torch.linspace(beta_1, beta_T, steps, dtype=torch.float64)  # DDPM Sec. 4
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])

def variance_preserving(alpha_bar, device):
    """The process of a DDPM: a = cos, b = sin of an angle, v the derivative towards smaller angles.

    At time t the chain stands at k = round((1 - t) T), in 1 ... T.
    """
    cos, sin = (w.sqrt().float().to(device) for w in (alpha_bar, 1 - alpha_bar))  # (T + 1,)

    def process(t):
        k = ((1 - t) * (len(alpha_bar) - 1)).round().long().clamp(min=1)  # (B,)
        a, b = cos[k].view(-1, 1, 1, 1), sin[k].view(-1, 1, 1, 1)
        return a, b, b, -a  # DDPM Eq. 4; v = b x - a eps
    return process

def sample_time(n, law, mean, std, device):
    """t (n,) in [0, 1): logit(t) ~ N(mean, std^2) (Sec. 3.1), uniform, or 1 - k / 1000."""
    if law == "chain":
        return 1 - torch.randint(1, 1001, (n,), device=device) / 1000  # DDPM: k ~ U{1 ... T}
    if law == "uniform":
        return torch.rand(n, device=device)
    return (mean + std * torch.randn(n, device=device)).sigmoid()

def convert(kind, o, z, a, b, da, db, clip=0.0):
    """The output o, of kind x, eps or v -> a dict of x, eps and v, all like z (JiT Tab. 1).

    Divisors are at least clip: with it, the three agree with z only where b (a for eps) > clip.
    """
    if kind == "x":
        b = b.clamp(min=clip)
        return {"x": o, "eps": (z - a * o) / b, "v": (o + db * z) / b}
    if kind == "eps":
        a = a.clamp(min=clip)
        return {"x": (z - b * o) / a, "eps": o, "v": (da * z - o) / a}
    return {"x": b * o - db * z, "eps": da * z - a * o, "v": o}

def denoising_loss(net, x, y, t, process, prediction, space, clip=0.05, noise_scale=1.0):
    """Squared error, its mean, in `space` of a network that outputs `prediction` (JiT Tab. 2)."""
    eps = noise_scale * torch.randn_like(x)
    a, b, da, db = factors = process(t)
    z = a * x + b * eps  # Eq. 1
    truth = {"x": x, "eps": eps, "v": da * x + db * eps}[prediction]
    o = net(z, t, y).float()  # float32 again: only the network runs in bf16
    o_hat = convert(prediction, o, z, *factors, clip)[space]
    target = convert(prediction, truth, z, *factors, clip)[space]  # clipped as the output is
    return (o_hat - target).square().mean()

def guided(net, z, t, y, guidance):
    """Classifier-free guidance, o_null + w (o_y - o_null): as in v, since v is affine in o."""
    if guidance == 1:
        return net(z, t, y).float()
    both = torch.cat([y, torch.full_like(y, net.classes)])
    o, o_null = net(z.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
    return o_null + guidance * (o - o_null)  # v_null + w (v - v_null) in JiT

@torch.no_grad()
def sample_heun(net, noise, y, prediction="x", sampling_steps=50, guidance=1.0, low=0.0, high=1.0,
                clip=0.05):
    """JiT Alg. 2 with Heun steps (Sec. 3.1), the last one Euler (code): dz/dt = v from t = 0 to 1.
    Like noise (B, C, H, W), float32.

    noise      scaled as in training
    low, high  guidance acts for low < t < high; low = 0 includes t = 0
    clip       near t = 1 it leaves some noise in the sample: 0.017 of it at 0.05 and 50 steps
    """
    def velocity(z, t):
        w = guidance if t < high and (low == 0 or t > low) else 1.0
        t = z.new_full((len(z),), t)
        return convert(prediction, guided(net, z, t, y, w), z, *flow_matching(t), clip)["v"]

    z, dt = noise, 1 / sampling_steps
    for i in range(sampling_steps):
        v = velocity(z, i * dt)
        if i + 1 < sampling_steps:  # the network is never asked at t = 1
            v = (v + velocity(z + dt * v, (i + 1) * dt)) / 2
        z = z + dt * v
    return z

@torch.no_grad()
def sample_ancestral(net, noise, y, alpha_bar, prediction="eps", guidance=1.0, generator=None):
    """DDPM Alg. 2, posterior of Eq. 6-7 at x = x_hat clamped to [-1, 1]. (B, C, H, W) float32.

    Its variance is beta_tilde, zero in the last step. No clip is needed: neither a nor b vanishes.
    """
    z, bars, T = noise, alpha_bar.tolist(), len(alpha_bar) - 1
    process = variance_preserving(alpha_bar, noise.device)
    for k in range(T, 0, -1):
        t = z.new_full((len(z),), 1 - k / T)
        o = guided(net, z, t, y, guidance)
        x_hat = convert(prediction, o, z, *process(t))["x"].clamp(-1, 1)
        bar, bar_next, alpha = bars[k], bars[k - 1], bars[k] / bars[k - 1]  # alpha_k = 1 - beta_k
        mean = (bar_next**0.5 * (1 - alpha) * x_hat + alpha**0.5 * (1 - bar_next) * z) / (1 - bar)
        std = ((1 - bar_next) / (1 - bar) * (1 - alpha))**0.5  # Eq. 7, square root of beta_tilde
        z = mean + std * torch.randn(z.shape, generator=generator).to(z.device)
    return z

# ---- train -----------------------------------------------------------------------------

def build(cfg, classes):
    """The network of this config: JiT."""
    return JiT(cfg.image_size, cfg.patch, classes, cfg.dim, cfg.depth, cfg.heads, cfg.bottleneck,
               cfg.class_tokens, cfg.class_start, cfg.dropout)

def draw(net, y, cfg, device, generator):
    """Samples of classes y (B,), float32 (B, 3, S, S) in [-1, 1]; noise comes from generator."""
    shape = len(y), 3, cfg.image_size, cfg.image_size
    noise = cfg.noise_scale * torch.randn(shape, generator=generator).to(device)
    with autocast(cfg, device):
        if cfg.process == "ddpm":
            return sample_ancestral(net, noise, y.to(device), noise_schedule(), cfg.prediction,
                                    cfg.guidance, generator)
        return sample_heun(net, noise, y.to(device), cfg.prediction, cfg.sampling_steps,
                           cfg.guidance, cfg.guidance_low, cfg.guidance_high, cfg.clip).clamp(-1, 1)

def train(cfg):
    device = setup(cfg)
    data = load_images(cfg, device)
    model = build(cfg, data.classes).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # for sampling; not compiled or wrapped
    opt = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, 0.95), weight_decay=0, fused=True)
    net = parallel(model, cfg, device)
    process, law = flow_matching, cfg.time
    if cfg.process == "ddpm":
        process, law = variance_preserving(noise_schedule(), device), "chain"
    state = {"model": model, "ema": ema, "opt": opt, "classes": data.classes}

    for step in steps(cfg, state):
        x, y = batch(data, cfg, device, step)  # (B, 3, S, S) in [-1, 1], (B,)
        y = torch.where(torch.rand(len(y), device=device) < cfg.label_drop, data.classes, y)
        t = sample_time(len(x), law, cfg.t_mean, cfg.t_std, device)  # (B,)
        with autocast(cfg, device):
            loss = denoising_loss(net, x, y, t, process, cfg.prediction, cfg.loss, cfg.clip,
                                  cfg.noise_scale)
        loss.backward()
        grad_norm = nn.utils.get_total_norm([w.grad for w in model.parameters()])
        opt.param_groups[0]["lr"] = lr = cfg.lr * min(1, (step + 1) / cfg.warmup)
        opt.step()
        opt.zero_grad()
        ema_update(ema, model, cfg.ema_decay, step)
        log(cfg, state, step, loss=loss, lr=lr, grad_norm=grad_norm)
        if due(cfg, cfg.sample_every, step):
            rows, generator = class_rows(data.classes), torch.Generator().manual_seed(0)
            images = draw(ema, rows, cfg, device, generator)
            save_grid(images, f"{cfg.out}/samples_{step + 1:07d}.png", columns=8)

def sample(cfg):
    """Draw cfg.n images from cfg.sample, image i of class i mod classes; the PNG shows ten."""
    device, saved = setup(cfg), load_checkpoint(cfg.sample)
    net = build(cfg, saved["classes"]).to(device).eval().requires_grad_(False)
    net.load_state_dict(saved["ema"])
    y = torch.arange(cfg.n) % saved["classes"]
    images = gather([(i, to_uint8(draw(net, y[i], cfg, device, generator)))
                     for i, generator in shares(cfg.n, 250, cfg.seed)])
    columns = max(1, min(8, cfg.n // saved["classes"]))
    rows = [images[y == k][:columns] for k in range(min(saved["classes"], 10))]
    save_grid(torch.cat(rows), f"{cfg.out}/sample.png", columns)
    if cfg.npz:
        save_npz(images, y, f"{cfg.out}/sample.npz")

def main(argv=None):
    cfg = parse_config(Config, PRESETS, SAMPLING, argv)
    sample(cfg) if cfg.sample else train(cfg)

if __name__ == "__main__":
    main()
