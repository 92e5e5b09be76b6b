"""Consistency Training: a network that maps every noisy image straight to a clean one, no teacher.

Paper     Song, Dhariwal, Chen, Sutskever. Consistency Models. arXiv:2303.01469v2 (CT)
          Song, Dhariwal. Improved Techniques for Training Consistency Models. arXiv:2310.14189v1
          (iCT); Geng, Pokle, Luo, Lin, Kolter. Consistency Models Made Easy. arXiv:2406.14548v2
          (ECT); Karras et al. Elucidating the Design Space. arXiv:2206.00364v2 (EDM)
Here      CT: c_skip and c_out in consistency; Alg. 3 consistency_loss and pairs_ct, Alg. 1
          sample_multistep, Alg. 4 edit, schedules karras_grid, count_ct, target_decay; iCT:
          count_ict, pairs_ict, distance; ECT: pairs_ect; EDM: edm_loss, UNet (DDPM++)
Changed   one network for all, DDPM++ with a positional embedding (CT and iCT: NCSN++ with Fourier
          features); no LPIPS by default; editing with an orthogonal projector; mu(k) with N, not
          N - 1 (text, not code). ECT: where its t_lo is 0 (target x) it is eps here (target x
          + eps z, by the boundary condition), t_hi at least 2 eps; pseudo-Huber distance; eps
          shifts coefficients in training, too; samples keep the correction; ECT's settings for its
          start, too. EMA ramps up. float32 (TF32 on CUDA): bf16 rounds more than branches differ
Left out  consistency distillation; sCM and MeanFlow; NCSN++ resampling, ADM; ECT's repair of
          gradients that are not finite; editing by strokes, interpolation
Notation  t     standard deviation of the noise: 0 is data. Smallest t_min (eps), largest t_max (T)
          x     clean image, (B, 3, H, W)        t_hi, t_lo  levels of a pair, float64 (B,)
          z     one noise for both branches      N           points of the grid of levels
          x_t   x + t z                          step, steps k, K
          online  f(x + t_hi z, t_hi), trained   target      f(x + t_lo z, t_lo), gradient stopped;
                                                 equal weights, or their moving average (CT)
Run       python consistency_training.py         # std ratio 0.75, 2 min, 2 CPU cores
          python consistency_training.py --preset cifar10        # not measured
          torchrun --nproc-per-node 8 consistency_training.py --preset paper          # not measured
"""
import copy
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import (RANK, WORLD, batch, due, ema_update, explain, gather, load_checkpoint,
                    load_images, log, parallel, parse_config, save_grid, save_npz, setup, shares,
                    steps, to_uint8)

# ---- config ----------------------------------------------------------------------------

def numbers(text):
    """Numbers of a flag such as --widths 32,64: list of floats, empty for an empty text."""
    return [float(word) for word in text.split(",") if word.strip()]

@dataclass(frozen=True)
class Config:
    preset: str = ""  # cifar10 | paper | paper-ct | paper-ect; a flag beats its preset
    out: str = ""  # run folder; empty: runs/consistency_training, with -<preset>
    fresh: bool = False  # start over instead of continuing the run in the folder
    seed: int = 0  # of weights, data order and noise
    device: str = "auto"  # auto | cuda | mps | cpu
    compile: str = "off"  # auto | on | off; minutes, on a CPU no gain; with dropout always off
    data: str = "shapes:disc,ring,bar"  # shapes | folder or .tar of classes | torch/... hfds/...
    image_size: int = 16  # side S in pixels; larger images are cropped and resized
    flip: bool = False  # mirror half of the images
    skip_bad: bool = False  # leave out images that cannot be read
    batch_size: int = 128  # images per step, summed over all GPUs
    steps: int = 750  # optimizer steps K
    lr: float = 1e-2  # RAdam (CT Tab. 3: 4e-4; iCT, ECT: 1e-4)
    lr_decay: bool = True  # the rate falls linearly to 0 (papers: constant)
    ema_decay: float = 0.999  # of the weights that are sampled
    log_every: int = 50  # steps between two lines in metrics.jsonl
    save_every: int = 375  # steps between two checkpoints
    sample_every: int = 375  # steps between two sample grids
    sample: str = ""  # draw from this checkpoint instead of training
    n: int = 64  # how many images --sample draws
    npz: bool = False  # --sample also writes them as ADM's evaluation format
    channels: int = 16  # of the first convolution and of the embedding of t
    widths: str = "16,32,64"  # channels of each level; the side halves in between
    blocks: int = 1  # residual blocks per level of the encoder; one more in the decoder
    attention: int = 4  # side of the feature maps that have self-attention, beside the middle
    dropout: float = 0.0  # in residual blocks; one mask for both branches (iCT: 0.3, ECT: 0.2)
    method: str = "ict"  # ct | ict | ect | diffusion: noise levels; all of CT: --preset paper-ct
    metric: str = "huber"  # huber | l2 | l1 | lpips: distance d of the two branches (iCT Sec. 3.3)
    stop_grad: bool = True  # stop the gradient of the target branch (CT Alg. 3)
    target_ema: float = 0.0  # decay of the target's average; 0: online weights; ct: mu_0 of mu(k)
    t_min: float = 0.002  # eps, where f is the identity
    t_max: float = 80.0  # T, where sampling starts
    sigma_data: float = 0.5  # standard deviation of the data, for the preconditioning
    s0: int = 10  # steps between levels at the start (ct: 2 levels)
    s1: int = 40  # and at the end (CT: 150; iCT: 1280), one more level than steps
    q: float = 2.0  # ECT: each stage divides t - r by it
    stages: int = 4  # ECT: equal parts of the steps (CIFAR-10: 8; one hour: 1, q = 256)
    diffusion_steps: int = 500  # ECT: steps of the diffusion model that it starts from
    taus: str = "0.8"  # noise levels of further sampling steps, comma between; "": one step
    edit_steps: int = 18  # points of the grid in editing (CT: 40)

    def __post_init__(self):
        for name in ("blocks", "s0", "diffusion_steps", "stages", "edit_steps"):
            if getattr(self, name) < 1 + (name == "edit_steps"):
                raise ValueError(f"{name} is too small: {getattr(self, name)}")
        widths = numbers(self.widths)
        if not widths or any(w < 1 or w % 4 for w in [self.channels, *widths]):
            raise ValueError(f"not multiples of 4: channels {self.channels}, widths {self.widths}")
        coarsest = max(4, 2 ** (len(widths) - 1))  # 4: for super-resolution
        if self.image_size % coarsest:
            raise ValueError(f"image_size {self.image_size} is not divisible by {coarsest}: 4, and "
                             "2 for every level but the first")
        for name in ("dropout", "target_ema", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        falling = [self.t_max, *numbers(self.taus), self.t_min, 0]
        if any(not a > b for a, b in zip(falling, falling[1:])) or self.t_max == math.inf:
            raise ValueError(f"need t_max > taus, falling > t_min > 0, got {falling[:-1]}")
        if not 0 < self.sigma_data < math.inf or not self.lr >= 0:
            raise ValueError(f"need sigma_data > 0, lr >= 0, got {self.sigma_data} and {self.lr}")
        if not 1 < self.q**self.stages < 1e6:  # else r = t in the end
            raise ValueError(f"q^stages must lie between 1 and 1e6, got {self.q}^{self.stages}")
        if self.target_ema and not self.stop_grad:
            raise ValueError("target_ema has no gradient to let through: drop --no-stop-grad")
        if self.s1 < self.s0 or (self.method == "ct" and self.s0 < 2):
            raise ValueError(f"need s0 <= s1, and s0 >= 2 with ct, got {self.s0} and {self.s1}")

CIFAR10 = dict(compile="auto", data="torch/cifar10", image_size=32, attention=16, stages=8)
PAPER = CIFAR10 | dict(  # iCT on CIFAR-10 with the DDPM++ network, 55.7 M parameters
    flip=True, batch_size=1024, steps=400_000, lr=1e-4, lr_decay=False, ema_decay=0.99993,
    save_every=5000, sample_every=25_000, channels=128, widths="256,256,256", blocks=4, dropout=0.3,
    s1=1280, taus="0.821", edit_steps=40)
PRESETS = {
    "cifar10": CIFAR10 | dict(
        method="ect", flip=True, batch_size=256, steps=6000, lr=4e-4, save_every=1000,
        sample_every=2000, channels=64, widths="64,128,128", blocks=2, s1=160, dropout=0.1,
        diffusion_steps=4000),
    "paper": PAPER,
    "paper-ct": PAPER | dict(  # CT Tab. 3; it has no tau, so iCT's
        method="ct", metric="lpips", batch_size=512, steps=800_000, lr=4e-4, ema_decay=0.9999,
        dropout=0.0, target_ema=0.9, s0=2, s1=150),
    "paper-ect": PAPER | dict(  # 8 stages of 25,000; ECT starts from EDM's, 200 M images, here 50 M
        method="ect", flip=False, batch_size=128, steps=200_000, ema_decay=0.9999, dropout=0.2,
        diffusion_steps=390_000),
}
SAMPLING = ("taus",)

# ---- data ------------------------------------------------------------------------------
# common gives x (B, 3, S, S) in [-1, 1]; labels are not used. What a user knows of an image y in
# editing is P y, for an orthogonal projector P on images (B, 3, S, S).

def project_pixels(y, mask):
    """The pixels where mask (S, S) is 1: inpainting."""
    return y * mask

def project_luminance(y):
    """The component along one colour direction, the luminance: colourisation."""
    q = F.normalize(y.new_tensor([0.2989, 0.5870, 0.1140]), dim=0)[:, None, None]
    return q * (q * y).sum(1, keepdim=True)

def project_blocks(y, p):
    """The means of p x p squares: super-resolution."""
    return F.interpolate(F.avg_pool2d(y, p), scale_factor=p)

# ---- model -----------------------------------------------------------------------------

def norm(channels):
    """GroupNorm of at least four channels a group, at most 32 groups."""
    groups = next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)

class ResBlock(nn.Module):
    """Residual block of DDPM++, time as an additive bias; self-attention of one head if asked for.

    resample  "down" averages 2 x 2 squares, "up" repeats pixels, "" neither; inside the block.
    """

    def __init__(self, c_in, c_out, embedding, resample="", attention=False, dropout=0.0):
        super().__init__()
        self.resample = {"down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2)}.get(
            resample, nn.Identity())
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(embedding, c_out)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        changes = c_in != c_out or resample
        self.skip = nn.Conv2d(c_in, c_out, 1) if changes else nn.Identity()
        self.attention = attention
        if attention:
            self.norm3, self.qkv = norm(c_out), nn.Conv2d(c_out, 3 * c_out, 1)
            self.proj = nn.Conv2d(c_out, c_out, 1)

    def forward(self, x, c):  # (B, C, H, W), (B, E) -> (B, C', H', W')
        h = self.conv1(self.resample(F.silu(self.norm1(x)))) + self.time(c)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        x = (self.skip(self.resample(x)) + h) / 2**0.5
        if self.attention:
            qkv = self.qkv(self.norm3(x))
            qkv = rearrange(qkv, "b (three c) h w -> three b 1 (h w) c", three=3)
            a = F.scaled_dot_product_attention(*qkv)  # (B, 1, H W, C)
            x = (x + self.proj(rearrange(a, "b 1 (h w) c -> b c h w", h=x.shape[2]))) / 2**0.5
        return x

class UNet(nn.Module):
    """DDPM++ of Song et al. 2021 in EDM's form: (B, 3, S, S) and c_noise (B,) -> (B, 3, S, S)."""

    def __init__(self, side, channels, widths, blocks, attention, dropout=0.0):
        super().__init__()
        self.channels, E = channels, 4 * channels
        self.embedding = nn.Sequential(nn.Linear(channels, E), nn.SiLU(),
                                       nn.Linear(E, E), nn.SiLU())
        c = channels
        def block(c_in, c_out, resample="", attend=False):
            return ResBlock(c_in, c_out, E, resample, attend, dropout)
        self.conv_in, skips = nn.Conv2d(3, channels, 3, padding=1), [channels]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            if level:
                side = side // 2
                self.encoder.append(block(c, c, "down"))
                skips.append(c)
            for _ in range(blocks):
                self.encoder.append(block(c, width, attend=side == attention))
                c = width
                skips.append(c)
        self.middle = nn.ModuleList([block(c, c, attend=True), block(c, c)])
        for level, width in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                attend = i == blocks and side == attention
                self.decoder.append(block(c + skips.pop(), width, attend=attend))
                c = width
            if level:
                side = side * 2
                self.decoder.append(block(c, c, "up"))
        self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, 3, 3, padding=1)
        self.initialize()

    def initialize(self):
        """Xavier, biases 0; ends of residual branches times 1e-5, attention's qkv times 0.2^0.5."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                last = name.endswith(("conv2", "proj", "conv_out"))
                scale = 1e-5 if last else 0.2**0.5 if name.endswith("qkv") else 1.0
                nn.init.xavier_uniform_(module.weight, scale)
                nn.init.zeros_(module.bias)

    def encode(self, x, c_noise):
        """Features in the middle (B, C, H, W), those of the encoder, and the embedding of time."""
        half = self.channels // 2
        rate = 10000 ** (-torch.arange(half, device=x.device) / (half - 1))  # EDM: up to 1e-4
        angle = c_noise[:, None] * rate
        c = self.embedding(torch.cat([angle.cos(), angle.sin()], -1))  # (B, E)
        h = [self.conv_in(x)]
        for block in self.encoder:
            h.append(block(h[-1], c))
        middle = h[-1]
        for block in self.middle:
            middle = block(middle, c)
        return middle, h, c

    def forward(self, x, c_noise):  # (B, 3, S, S), (B,) -> (B, 3, S, S)
        x, skips, c = self.encode(x, c_noise)
        for block in self.decoder:
            joins = not isinstance(block.resample, nn.Upsample)
            x = block(torch.cat([x, skips.pop()], 1) if joins else x, c)
        return self.conv_out(F.silu(self.norm_out(x)))

# ---- method ----------------------------------------------------------------------------

def karras_grid(N, t_min=0.002, t_max=80.0, rho=7):
    """N noise levels from t_min to t_max (CT Sec. 4): float64 (N,), ascending, exact at both ends;
    in float32 the first would miss t_min, and f the boundary condition."""
    u = torch.linspace(0, 1, N, dtype=torch.float64)
    t = (t_min**(1 / rho) + u * (t_max**(1 / rho) - t_min**(1 / rho)))**rho
    t[0], t[-1] = t_min, t_max
    return t

def count_ct(k, K, s0=2, s1=150):
    """N(k), points of the grid at step k of K: s0 ... s1 + 1; its square grows linearly (CT)."""
    return math.ceil((k / K * ((s1 + 1)**2 - s0**2) + s0**2)**0.5 - 1) + 1

def count_ict(k, K, s0=10, s1=1280):
    """N(k), points of the grid: doubles in equal stages from s0 + 1 to s1 + 1 (iCT)."""
    stage = math.floor(K / (math.log2(s1 // s0) + 1))  # K'
    return min(s0 * 2**(k // max(1, stage)), s1) + 1

def target_decay(mu_0, s0, N):
    """mu(k) = exp(s0 ln(mu_0) / N(k)), decay of CT's target: mu_0 at first, then nearer to 1."""
    return math.exp(s0 * math.log(mu_0) / N)

def pairs_ct(n, grid):
    """Neighbours of the grid, uniform, weight 1: t_hi, t_lo, weight, float64 (n,) (CT Alg. 3)."""
    i = torch.randint(len(grid) - 1, (n,))
    return grid[i + 1], grid[i], torch.ones(n, dtype=torch.float64)

def pairs_ict(n, grid, mean=-1.1, std=2.0):
    """Neighbours of the grid by the mass of ln t ~ N(mean, std^2) between them, weight
    1 / (t_hi - t_lo): float64 (n,) each (iCT)."""
    mass = torch.erf((grid.log() - mean) / (2**0.5 * std)).diff()  # (N - 1,)
    i = torch.multinomial(mass, n, replacement=True)
    return grid[i + 1], grid[i], 1 / (grid[i + 1] - grid[i])

def pairs_ect(n, stage, q=2.0, k=8.0, b=1.0, mean=-1.1, std=2.0, t_min=0.002):
    """ln t ~ N(mean, std^2), r = t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t), weight
    1 / (t - r): float64 (n,) each (ECT). (t, r) is (t_hi, t_lo). At stage 0 most r are t_min."""
    t = (mean + std * torch.randn(n, dtype=torch.float64)).exp().clamp(min=2 * t_min)
    r = t * (1 - (1 + k * torch.sigmoid(-b * t)) / q**(stage + 1))
    r = r.clamp(min=t_min)
    return t, r, 1 / (t - r)

def consistency(net, x, t, sigma_data=0.5, t_min=0.002):
    """f(x, t) = c_skip x + c_out F(c_in x, ln(t) / 4), with f(x, t_min) = x for any F (CT).

    x (B, 3, S, S) float32, t (B,) float64: coefficients are cast last. Like x.
    """
    s = t - t_min
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = sigma_data * s / (sigma_data**2 + t**2).sqrt()
    c_in, c_noise = 1 / (t**2 + sigma_data**2).sqrt(), t.log() / 4
    factors = torch.stack([c_skip, c_out, c_in, c_noise]).float()
    c_skip, c_out, c_in, c_noise = factors.to(x.device, non_blocking=True)
    wide = lambda c: c.view(-1, 1, 1, 1)
    return wide(c_skip) * x + wide(c_out) * net(wide(c_in) * x, c_noise)

def add_noise(x, t, z):
    """x + t z for t (B,) in float64, cast last."""
    return x + t.float().to(x.device, non_blocking=True).view(-1, 1, 1, 1) * z

@functools.cache
def perceptual(kind):
    """LPIPS with VGG on a kind of device, from the package lpips that only --metric lpips needs."""
    with explain("--metric lpips", Exception):  # not installed, or VGG cannot be downloaded
        import lpips
        return lpips.LPIPS(net="vgg", verbose=False).to(kind).requires_grad_(False)

def distance(a, b, metric="huber"):
    """d(a, b) of each image, (B,). huber: sqrt(|a - b|^2 + c^2) - c on the whole image, c =
    0.00054 sqrt(D) (iCT); l2, l1: means over pixels (CT); lpips: needs that package."""
    if metric == "huber":
        c = 0.00054 * a[0].numel()**0.5
        return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c
    if metric == "lpips":
        a, b = (F.interpolate(u, 224, mode="bilinear") for u in (a, b))
        return perceptual(a.device.type)(a, b).flatten()
    return ((a - b).square() if metric == "l2" else (a - b).abs()).flatten(1).mean(1)

def consistency_loss(online, target, x, t_hi, t_lo, weight, metric="huber", sigma_data=0.5,
                     t_min=0.002, stop_grad=True):
    """weight d(f(x + t_hi z, t_hi), sg f(x + t_lo z, t_lo)), mean (CT Alg. 3). Scalar.

    online, target  networks F; the same one, or its moving average. One noise z and one dropout
                    mask for both, so the global generators are seeded anew; only the noisier side
                    gets a gradient, unless stop_grad is False
    """
    z, seed = torch.randn_like(x), torch.randint(2**60, ()).item()
    torch.manual_seed(seed)
    a = consistency(online, add_noise(x, t_hi, z), t_hi, sigma_data, t_min)
    torch.manual_seed(seed)
    with torch.set_grad_enabled(not stop_grad):
        b = consistency(target, add_noise(x, t_lo, z), t_lo, sigma_data, t_min)
    weight = weight.float().to(x.device, non_blocking=True)
    return (weight * distance(a, b, metric)).mean()

def edm_loss(net, x, sigma_data=0.5, t_min=0.002):
    """EDM's loss, f is the denoiser: ln t ~ N(-1.2, 1.2^2), weight about 1 / c_out^2. Scalar."""
    t = (-1.2 + 1.2 * torch.randn(len(x), dtype=torch.float64)).exp().clamp(min=2 * t_min)
    weight = ((t**2 + sigma_data**2) / (t * sigma_data)**2).float().to(x.device, non_blocking=True)
    x_hat = consistency(net, add_noise(x, t, torch.randn_like(x)), t, sigma_data, t_min)
    return (weight * (x_hat - x).square().flatten(1).mean(1)).mean()

@torch.no_grad()
def sample_multistep(net, noise, levels, sigma_data=0.5, t_min=0.002, generator=None):
    """CT Alg. 1: f at the largest of levels (float64, descending), then noise and f again at each
    of the others. noise (B, 3, S, S) of variance 1 -> float32 in [-1, 1]."""
    x = torch.zeros_like(noise)
    for i, t in enumerate(levels):
        z = torch.randn(x.shape, generator=generator).to(x.device) if i else noise
        x = x + (t**2 - (t_min**2 if i else 0))**0.5 * z
        x = consistency(net, x, torch.full((len(x),), t, dtype=torch.float64), sigma_data, t_min)
        x = x.clamp(-1, 1)
    return x

@torch.no_grad()
def edit(net, y, project, levels, sigma_data=0.5, t_min=0.002, generator=None):
    """CT Alg. 4 for any orthogonal projector: images that agree with y (B, 3, S, S) in project(y),
    the rest generated. After every f: x <- x + P (y - x), which may leave [-1, 1]. Like y."""
    x = project(y)
    for i, t in enumerate(levels):
        z = torch.randn(x.shape, generator=generator).to(x.device)
        x = x + (t**2 - (t_min**2 if i else 0))**0.5 * z
        x = consistency(net, x, torch.full((len(x),), t, dtype=torch.float64), sigma_data, t_min)
        x = x.clamp(-1, 1)
        x = x + project(y - x)
    return x

def features(net, x_t, t, sigma_data=0.5):
    """The middle of the network at x_t (B, 3, S, S) and t (B,): mean over space, (B, C)."""
    c_in, c_noise = (1 / (t**2 + sigma_data**2).sqrt()).float().to(x_t.device), t.log().float() / 4
    return net.encode(c_in.view(-1, 1, 1, 1) * x_t, c_noise.to(x_t.device))[0].mean((2, 3))

# ---- train -----------------------------------------------------------------------------

def build(cfg):
    """The network F of this config."""
    return UNet(cfg.image_size, cfg.channels, [int(w) for w in numbers(cfg.widths)], cfg.blocks,
                cfg.attention, cfg.dropout)

def pairs(cfg, n, step):
    """t_hi, t_lo, weight, float64 (n,) each; and N, the points of the grid, or ECT's stage."""
    if cfg.method == "ect":
        stage = cfg.stages * step // cfg.steps
        return *pairs_ect(n, stage, cfg.q, t_min=cfg.t_min), stage
    count, pick = (count_ct, pairs_ct) if cfg.method == "ct" else (count_ict, pairs_ict)
    N = count(step, cfg.steps, cfg.s0, cfg.s1)
    return *pick(n, karras_grid(N, cfg.t_min, cfg.t_max)), N

def held_out_images(cfg, device, n=256):
    """This rank's part of at most n images that are not trained on, float32 (B, 3, S, S)."""
    cfg = dataclasses.replace(cfg, flip=False, seed=0, batch_size=n // WORLD * WORLD)
    data = load_images(cfg, device, "validation", n)
    size = max(1, min(n, data.size) // WORLD) * WORLD
    return batch(data, dataclasses.replace(cfg, batch_size=size), device, 0)[0]

def draw(net, y, cfg, device, path):
    """Draw 32 images in one step and, from the same noise, in all; edits of the first eight of y.
    Returns the standard deviation of the one-step samples over that of y (n, 3, S, S)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(32, 3, cfg.image_size, cfg.image_size, generator=generator).to(device)
    run = functools.partial(sample_multistep, net, noise, sigma_data=cfg.sigma_data,
                            t_min=cfg.t_min, generator=generator)
    one, all_steps = run([cfg.t_max]), run([cfg.t_max, *numbers(cfg.taus)])
    save_grid(torch.cat([one, all_steps]), f"{path}.png", columns=8)
    x, S, rows = y[:8], cfg.image_size, []
    left = (torch.arange(S, device=device) < S // 2).float().expand(S, S)
    levels = karras_grid(cfg.edit_steps, cfg.t_min, cfg.t_max).flip(0)[:-1].tolist()
    for known in (functools.partial(project_pixels, mask=left), project_luminance,
                  functools.partial(project_blocks, p=4)):
        rows += [known(x), edit(net, x, known, levels, cfg.sigma_data, cfg.t_min, generator)]
    save_grid(torch.cat([x, *rows]), f"{path}_edits.png", columns=len(x))
    return (one.std(0).mean() / y.std(0).mean()).item()

def train(cfg, data=None):
    device = setup(cfg, "steps")  # curricula depend on it
    data, held_out = data or load_images(cfg, device, "train"), held_out_images(cfg, device)
    model = build(cfg).to(device)
    if cfg.metric == "lpips":
        perceptual(device.type)  # fails here if the package is missing
    if cfg.method == "ect":  # a diffusion model first, a run of its own in <out>/diffusion
        if cfg.fresh and RANK == 0:
            Path(cfg.out, "last.pt").unlink(missing_ok=True)
        start = dataclasses.replace(cfg, method="diffusion", out=f"{cfg.out}/diffusion",
                                    steps=cfg.diffusion_steps)
        train(start, copy.copy(data))  # a copy: a streamed set starts anew
        model.load_state_dict(load_checkpoint(f"{start.out}/last.pt")["ema"])
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # for sampling; not compiled or wrapped
    target = copy.deepcopy(model).requires_grad_(False) if cfg.target_ema else model
    opt = torch.optim.RAdam(model.parameters(), cfg.lr)
    apart = {"compile": "off"} if cfg.dropout else {}  # compiled, a seed may be two dropout masks
    online = parallel(model, dataclasses.replace(cfg, **apart), device)
    state = {"model": model, "ema": ema, "opt": opt, "found": {}}  # found: the latest ratio
    state |= {"target": target} if cfg.target_ema else {}

    for step in steps(cfg, state):
        x, _ = batch(data, cfg, device, step)  # (B, 3, S, S) in [-1, 1]
        if cfg.method == "diffusion":
            N, loss = 0, edm_loss(online, x, cfg.sigma_data, cfg.t_min)
        else:
            t_hi, t_lo, weight, N = pairs(cfg, len(x), step)
            loss = consistency_loss(online, target, x, t_hi, t_lo, weight, cfg.metric,
                                    cfg.sigma_data, cfg.t_min, cfg.stop_grad)
        loss.backward()
        grad_norm = nn.utils.get_total_norm([w.grad for w in model.parameters()])
        opt.param_groups[0]["lr"] = lr = cfg.lr * (1 - step / cfg.steps * cfg.lr_decay)
        opt.step()
        opt.zero_grad()
        if cfg.target_ema:
            ct = cfg.method == "ct"
            mu = target_decay(cfg.target_ema, cfg.s0, N) if ct else cfg.target_ema
            ema_update(target, model, mu)
        ema_update(ema, model, cfg.ema_decay, step)
        if due(cfg, cfg.sample_every, step):
            path = f"{cfg.out}/samples_{step + 1:07d}"
            state["found"] = {"std_ratio": draw(ema, held_out, cfg, device, path)}
        count = {"diffusion": {}, "ect": {"stage": N}}.get(cfg.method, {"N": N})
        log(cfg, state, step, loss=loss, lr=lr, grad_norm=grad_norm, **count,
            **state["found"])

def sample(cfg):
    """Draw cfg.n images from cfg.sample, in one step and one more for each of cfg.taus."""
    device, saved = setup(cfg), load_checkpoint(cfg.sample)
    net = build(cfg).to(device).eval().requires_grad_(False)
    net.load_state_dict(saved["ema"])
    levels, parts = [cfg.t_max, *numbers(cfg.taus)], []
    for index, generator in shares(cfg.n, 250, cfg.seed):
        shape = len(index), 3, cfg.image_size, cfg.image_size
        noise = torch.randn(shape, generator=generator).to(device)
        images = sample_multistep(net, noise, levels, cfg.sigma_data, cfg.t_min, generator)
        parts.append((index, to_uint8(images)))
    images = gather(parts)
    save_grid(images[:64], f"{cfg.out}/sample.png", columns=8)
    if cfg.npz:
        save_npz(images, torch.zeros(len(images), dtype=torch.int64), f"{cfg.out}/sample.npz")

def main(argv=None):
    cfg = parse_config(Config, PRESETS, SAMPLING, argv)
    sample(cfg) if cfg.sample else train(cfg)

if __name__ == "__main__":
    main()
