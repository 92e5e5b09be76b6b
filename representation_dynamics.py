"""How good a denoiser's features are at each noise level, and what memorisation does to them.

Paper     Li, Zhang, Li, Chen, Zhu, Wang, Qu. Understanding Representation Dynamics of Diffusion
          Models via Low-Dimensional Modeling. arXiv:2502.05743v4
          Karras et al. Elucidating the Design Space. arXiv:2206.00364v2 (EDM)
Here      images, what this script trains: EDM denoise_edm, sample_edm, Sec. 4 activations,
          logistic_probe, curve, Fig. 5 class_subspaces, Fig. 6 nearest_ratio; theory, for tests
          and claim only: Assumption 1 and Prop. 1 MoLRG (data, exact denoiser, trainable block
          model), Def. 1 snr, Theorem 1 class_confidence and snr_formula, memorising_denoiser
Changed   D_t in class_confidence has the term of psi = delta^2 / (2 sigma^2 (delta^2 + sigma^2)),
          left out in the appendix: exact for its expectation; the gate of Prop. 1 in its form for
          orthogonal subspaces; MoLRG draws its classes in turn, as many points of each.
          Images: a small U-Net, not DDPM++; EDM's noise law, weight and scaling (paper: those of
          its VP configuration); probe and SNR are fitted on held-out images and tested on others
          (paper: fitted on the training set); a sample is memorised if its nearest training image
          is 3 times as near as the next (authors: SSCD above 0.6); unimodal: up and down by two
          standard errors over test images, the peak chosen by others; AdamW, constant rate
Left out  segmentation, transfer, FID, sliced Wasserstein distance, curves during over-training;
          weight sharing, ensembles, unequal subspaces: tests/claims/representation_dynamics.py
Notation  sigma  standard deviation of the noise: 0 is data     x0   clean data
          x      x0 + sigma eps, the noisy data                 y    class, int64 (B,)
          U      [U_1 ... U_K], (n, K d) orthonormal            h    features, (B, D)
          n, d, K   dimensions of data and subspace, classes    w    posterior of y, (B, K)
          delta  standard deviation along the other classes' subspaces
Run       python representation_dynamics.py    # accuracy 0.49 at sigma 0.008, 4 min, 1 CPU core
          python representation_dynamics.py --preset cifar10     # not measured
          torchrun --nproc-per-node 8 representation_dynamics.py --preset paper     # not measured
"""
import copy
import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import (RANK, WORLD, autocast, batch, due, ema_update, explain, fail, figure, gather,
                    load_checkpoint, load_images, log, parallel, parse_config, save_grid, save_npz,
                    setup, shares, steps, to_uint8)

# ---- config ----------------------------------------------------------------------------

def levels(text):
    """Noise levels of the flag --sigmas, comma between: list of floats."""
    return [float(word) for word in text.split(",")]

@dataclass(frozen=True)
class Config:
    preset: str = ""  # cifar10 | paper; a flag beats its preset
    out: str = ""  # run folder; empty: runs/representation_dynamics, with -<preset>
    fresh: bool = False  # start over instead of continuing the run in the folder
    seed: int = 0  # of weights, subset, data order and noise
    device: str = "auto"  # auto | cuda | mps | cpu
    precision: str = "auto"  # auto | bf16 | fp32; auto: bf16 where the device is fast at it
    compile: str = "off"  # auto | on | off; half a minute, and on a CPU no gain for convolutions
    data: str = "shapes"  # shapes | folder or .tar of class sub-folders | torch/... hfds/... (timm)
    image_size: int = 16  # side S in pixels; larger images are cropped and resized
    flip: bool = False  # mirror half of the images
    skip_bad: bool = False  # leave out images that cannot be read
    batch_size: int = 64  # images per step, summed over all GPUs
    steps: int = 2000  # optimizer steps
    lr: float = 1e-3  # AdamW, betas (0.9, 0.95), no decay; constant after the warm-up
    warmup: int = 200  # steps of linear warm-up
    ema_decay: float = 0.999  # of the weights that are sampled and probed
    log_every: int = 100  # steps between two lines in metrics.jsonl
    save_every: int = 500  # steps between two checkpoints
    sample_every: int = 2000  # steps between two curves, with samples beside their nearest images
    sample: str = ""  # draw from this checkpoint and probe it instead of training
    n: int = 64  # how many images --sample draws
    npz: bool = False  # --sample also writes them as ADM's evaluation format
    subset: int = 0  # train on this many images, drawn with the seed; 0: on all (Fig. 6)
    patch: int = 2  # squares of this side become channels on the way in, and back
    dim: int = 64  # channels at the first scale, a multiple of 8; twice as many at the others
    scales: int = 2  # the side halves in between
    blocks: int = 1  # residual blocks per scale of the encoder, and of the decoder
    layer: str = "decoder.0"  # module whose output, averaged over space, is the representation
    sigmas: str = "0.002,0.008,0.023,0.06,0.14,0.296,0.585,1.088,1.923"  # levels of the curve
    probe_images: int = 3000  # held-out images that the probe is fitted on, and as many to test

    def __post_init__(self):
        if min(self.patch, self.dim, self.scales, self.blocks, self.warmup) < 1:
            raise ValueError("patch, dim, scales, blocks and warmup must be at least 1")
        coarsest = self.patch * 2**(self.scales - 1)
        if self.image_size % coarsest or self.dim % 8:
            raise ValueError(f"image_size {self.image_size} must be divisible by {coarsest}, patch "
                             f"times 2 for every scale but the first; dim {self.dim} by 8")
        if self.subset and self.subset < self.batch_size:
            raise ValueError(f"subset {self.subset} must be 0 or at least one batch")
        if not self.lr > 0 or not 0 <= self.ema_decay < 1:
            raise ValueError(f"need lr > 0, ema_decay in [0, 1): {self.lr} and {self.ema_decay}")
        sigmas = levels(self.sigmas)
        if len(sigmas) < 3 or sigmas != sorted({*sigmas}) or not sigmas[0] > 0:
            raise ValueError(f"sigmas must be three or more, positive and rising: {self.sigmas}")

CIFAR10 = dict(compile="auto", data="torch/cifar10", image_size=32, patch=1, dim=128, scales=3,
               blocks=2, layer="decoder.3", lr=5e-4, save_every=2000, probe_images=5000)
PRESETS = {
    "cifar10": CIFAR10 | dict(batch_size=256, steps=12_000, sample_every=4000),
    "paper": CIFAR10 | dict(  # Fig. 6: UNet-64, N = 2^12 of 2^8 ... 2^15; 50 M images
        batch_size=512, steps=97_656, sample_every=12_207, subset=4096, dim=64),
}
SAMPLING = ("layer", "sigmas", "probe_images")

# ---- data ------------------------------------------------------------------------------
def take(data, cfg, device, n):
    """Up to n images uint8 (n, 3, S, S) and labels (n,), in whole batches; same on all ranks."""
    size = cfg.batch_size if data.images is None else min(cfg.batch_size, n, data.size)
    if (size := size // WORLD * WORLD) == 0:
        fail(f"--data {cfg.data}: {data.size} images to measure on are too few for {WORLD} ranks")
    cfg, rows = dataclasses.replace(cfg, flip=False, batch_size=size), []
    data = copy.copy(data)
    vars(data).pop("iterator", None)  # where a streamed set has got to in training: start anew
    for step in range(max(1, min(n, data.size) // size)):
        x, y = batch(data, cfg, device, step)
        rows.append((step * size + RANK * len(x) + torch.arange(len(x)), to_uint8(x), y))
    return [gather([(row[0], row[i]) for row in rows]).to(device) for i in (1, 2)]

def load_data(cfg, device):
    """Training data, cfg.subset of them; images uint8 (n, 3, S, S) and labels of the probe."""
    data = load_images(cfg, device, "train")
    if cfg.subset:
        if data.images is None or data.size < cfg.subset:
            fail(f"--subset {cfg.subset}: of {data.size} images, and they have to fit in memory")
        generator = torch.Generator().manual_seed(cfg.seed)
        keep = torch.randperm(data.size, generator=generator)[:cfg.subset].to(device)
        data.images, data.labels, data.size = data.images[keep], data.labels[keep], cfg.subset
    images, y = take(load_images(cfg, device, "validation"), cfg, device, 2 * cfg.probe_images)
    if (fewest := y[:len(y) // 2].bincount(minlength=data.classes).min()) < 5:
        fail(f"--probe-images {cfg.probe_images}: a class has {fewest}, its subspace needs 5")
    return data, (images, y)

# ---- model -----------------------------------------------------------------------------
class MoLRG(nn.Module):
    """Noisy mixture of low-rank Gaussians (Assumption 1) and its optimal denoiser (Prop. 1).

    A class k of K, equally likely: x0 = U_k a + delta Ut_k e, where a and e are standard normal and
    Ut_k spans the other classes' subspaces. With the true U, forward is E[x0 | x]; with a U to be
    learned it is the paper's network: projection, a gate for each block, tied reconstruction.
    """
    def __init__(self, n, d, K, delta):
        super().__init__()
        if K * d > n or not 0 < delta < 1:
            raise ValueError(f"need K d <= n and 0 < delta < 1, got {K} {d}, {n} and {delta}")
        self.K, self.delta = K, delta
        self.weight = nn.Parameter(torch.randn(n, K * d))

    def basis(self):  # U (n, K d), orthonormal: Gram-Schmidt of the columns of weight
        Q, R = torch.linalg.qr(self.weight)
        return Q * R.diagonal().sign()  # the one U with a positive diagonal: smooth in weight

    def subspaces(self):  # (K, n, d)
        return rearrange(self.basis(), "n (k d) -> k n d", k=self.K)

    def draw(self, count, generator=None):  # -> x0 (count, n), y (count,), classes in turn
        U, y = self.basis().detach(), torch.arange(count) % self.K
        a = torch.randn(count, U.shape[1], generator=generator).to(U).unflatten(1, (self.K, -1))
        own = F.one_hot(y, self.K).bool()[..., None].to(U.device)  # (count, K, 1)
        return (a * torch.where(own, 1.0, self.delta)).flatten(1) @ U.T, y

    def features(self, x, sigma):  # (B, n), (B,) -> h (B, K d), w (B, K)
        z = rearrange(x @ self.basis(), "b (k d) -> b k d", k=self.K)
        v, dd = sigma[:, None].square(), self.delta**2
        zeta, xi = 1 / (1 + v), dd / (dd + v)
        gate = (1 - dd) / (2 * (1 + v) * (dd + v))  # (zeta - xi) / (2 sigma^2)
        w = (gate * z.square().sum(-1)).softmax(-1)  # Prop. 1
        beta = xi + (zeta - xi) * w  # gain of a block: of its own class zeta, of another xi
        return (beta[..., None] * z).flatten(1), w

    def forward(self, x, sigma):  # (B, n), (B,) -> E[x0 | x], (B, n)
        return self.features(x, sigma)[0] @ self.basis().T

class ConvBlock(nn.Module):
    """Residual block; the embedded noise level c scales and shifts between its convolutions."""
    def __init__(self, c_in, c_out, c_time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time, self.skip = nn.Linear(c_time, 2 * c_out), nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, c):  # (B, C, H, W), (B, E) -> (B, C', H, W)
        scale, shift = self.time(c)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))

class SpatialAttention(nn.Module):
    """Residual self-attention of one head between the places of a feature map."""
    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(8, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x):  # (B, C, H, W) -> (B, C, H, W)
        qkv = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b 1 (h w) c", three=3)
        a = F.scaled_dot_product_attention(*qkv)  # (B, 1, H W, C)
        return x + self.proj(rearrange(a, "b 1 (h w) c -> b c h w", h=x.shape[2]))

class DenoisingUNet(nn.Module):
    """F of EDM's denoiser, (B, 3, S, S) and c_noise (B,) -> (B, 3, S, S). Width dim, 2 dim from the
    second scale on; attention in the middle; each encoder block hands its output to the decoder."""
    def __init__(self, patch, dim, scales, blocks):
        super().__init__()
        self.patch, self.dim, self.blocks, E = patch, dim, blocks, 2 * dim
        self.time = nn.Sequential(nn.Linear(dim, E), nn.SiLU(), nn.Linear(E, E), nn.SiLU())
        self.conv_in = nn.Conv2d(3 * patch**2, dim, 3, padding=1)
        widths = [dim * (1 + (i >= blocks)) for i in range(scales * blocks)]
        self.encoder = nn.ModuleList(map(ConvBlock, [dim, *widths], widths, [E] * len(widths)))
        self.middle = ConvBlock(widths[-1], widths[-1], E)
        self.attention = SpatialAttention(widths[-1])
        before, back = [widths[-1], *widths[::-1]], widths[::-1]
        self.decoder = nn.ModuleList(ConvBlock(b + w, w, E) for b, w in zip(before, back))
        self.norm_out, self.conv_out = nn.GroupNorm(8, dim), nn.Conv2d(dim, 3 * patch**2, 1)

    def forward(self, x, c_noise):
        p, half, skips = self.patch, self.dim // 2, []
        # c_noise in about -2 ... 1 is not scaled up: so does EDM's code
        angle = c_noise[:, None] * 10000 ** (-torch.arange(half, device=x.device) / (half - 1))
        c = self.time(torch.cat([angle.cos(), angle.sin()], -1))  # (B, E)
        h = self.conv_in(rearrange(x, "b c (h p) (w q) -> b (p q c) h w", p=p, q=p))
        for i, block in enumerate(self.encoder):
            h = F.avg_pool2d(h, 2) if i and i % self.blocks == 0 else h
            h = block(h, c)
            skips.append(h)
        h = self.attention(self.middle(h, c))
        for i, block in enumerate(self.decoder):
            h = F.interpolate(h, scale_factor=2) if i and i % self.blocks == 0 else h
            h = block(torch.cat([h, skips.pop()], 1), c)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return rearrange(h, "b (p q c) h w -> b c (h p) (w q)", p=p, q=p)

# ---- method ----------------------------------------------------------------------------
def snr(h, y, bases):
    """Def. 1: mean over classes k of E |U_k U_k^T h|^2 / E |(I - U_k U_k^T) h|^2. Scalar.
    h (B, D), a denoiser's output or features; y (B,); bases U_k (K, D, d), orthonormal columns."""
    own = torch.einsum("bn,bnd->bd", h, bases[y]).square().sum(1)
    other = h.square().sum(1) - own
    return torch.stack([own[y == k].mean() / other[y == k].mean() for k in y.unique()]).mean()

def class_confidence(sigma, d, K, delta):
    """w of the true class and of another one, the mean over x taken in the exponent (Theorem 1).
    sigma (S,) -> two of (S,)."""
    v, dd = sigma.square(), delta**2
    D_t = d * (1 - dd)**2 / (2 * (1 + v) * (dd + v))  # paper: d (1 - dd) / (2 v (1 + v)), no psi
    w_plus = 1 / (1 + (K - 1) * (-D_t).exp())
    return w_plus, (1 - w_plus) / (K - 1)

def snr_formula(sigma, d, K, delta, clean=False):
    """Theorem 1: denoising rate sigma^2 / delta^2 against class confidence. Like sigma, (S,).
    Near the peak up to 7 times snr. clean: x0 without noise goes in as if it had sigma."""
    rate, dd = sigma.square() / delta**2, delta**2
    C_t = 1 / dd if clean else (1 + sigma.square()) / (dd + sigma.square())
    plus, minus = (1 + rate * ((1 - dd) * w + dd) for w in class_confidence(sigma, d, K, delta))
    return C_t / (K - 1) * (plus / minus).square()

SIGMA_DATA = 0.5  # standard deviation of images in EDM's preconditioning

def denoise_edm(net, x, sigma):
    """D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4) (EDM Eq. 7): like x (B, 3, S, S)."""
    s = sigma.view(-1, 1, 1, 1)
    root = (s**2 + SIGMA_DATA**2).sqrt()
    F_x = net(x / root, sigma.log() / 4).float()  # float32 again: only the net runs in bf16
    return SIGMA_DATA**2 / root**2 * x + s * SIGMA_DATA / root * F_x

def dae_loss(denoiser, x0, sigma, weight):
    """E weight |D(x0 + sigma eps, sigma) - x0|^2, mean over coordinates; sigma, weight (B,)."""
    x = x0 + sigma.view(-1, *[1] * (x0.ndim - 1)) * torch.randn_like(x0)
    return (weight * (denoiser(x, sigma) - x0).square().flatten(1).mean(1)).mean()

def image_loss(net, x0):
    """dae_loss of images (B, 3, S, S): ln sigma ~ N(-1.2, 1.2^2), weight 1 / c_out^2 (EDM)."""
    sigma = (-1.2 + 1.2 * torch.randn(len(x0), device=x0.device)).exp()
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA)**2
    return dae_loss(functools.partial(denoise_edm, net), x0, sigma, weight)

@torch.no_grad()
def sample_edm(net, noise, sampling_steps=18):
    """EDM Alg. 1: Heun from sigma = 80 over 0.002 to 0, rho = 7, the last step Euler. Like noise
    (B, 3, S, S), float32."""
    u = torch.linspace(0, 1, sampling_steps, dtype=torch.float64)
    sigmas = [*((80**(1 / 7) + u * (0.002**(1 / 7) - 80**(1 / 7)))**7).tolist(), 0.0]
    x = sigmas[0] * noise
    def slope(x, sigma):  # dx / dsigma
        return (x - denoise_edm(net, x, x.new_full((len(x),), sigma))) / sigma
    for a, b in zip(sigmas, sigmas[1:]):
        g = slope(x, a)
        if b > 0:
            g = (g + slope(x + (b - a) * g, b)) / 2
        x = x + (b - a) * g
    return x

def memorising_denoiser(x, sigma, points):
    """E[x0 | x] if the N training points were all there is: softmax(-|x - x_i|^2 / 2 sigma^2) x_i.
    x (B, D), sigma float, points (N, D) -> (B, D)"""
    near = torch.cdist(x, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    return (-near / (2 * sigma**2)).softmax(1) @ points

def nearest_ratio(samples, points):
    """Distance to the nearest of points (N, ...) over that to the second nearest, and the nearest's
    index: (n,) each. A sample is memorised below 1/3."""
    mode, parts = "donot_use_mm_for_euclid_dist", samples.flatten(1).split(250)  # exact for copies
    near = [torch.cdist(x, points.flatten(1), compute_mode=mode).topk(2, largest=False)
            for x in parts]
    d, index = (torch.cat(column) for column in zip(*near))
    return d[:, 0] / d[:, 1].clamp(min=1e-12), index[:, 0]

def activations(net, layer, x, sigma):
    """What module `layer` gives in D(x, sigma), mean over space: float32 (B, D)."""
    module, kept = net.get_submodule(layer), []
    with module.register_forward_hook(lambda module, args, out: kept.append(out)):
        denoise_edm(net, x, sigma)
    if kept[0].ndim != 4:
        raise ValueError(f"gives {tuple(kept[0].shape)}, not (images, channels, height, width)")
    return kept[0].float().mean((2, 3))

@torch.enable_grad()
def logistic_probe(f, y, f_test, classes, l2=1e-2):
    """Logits (m, K) of multinomial logistic regression from f (M, D) to y (M,), for f_test (m, D).
    f is standardised by its mean and std; L-BFGS on mean cross-entropy + l2 / 2 |W|^2."""
    mean, std = f.mean(0), f.std(0) + 1e-6
    X, X_test = ((u - mean) / std for u in (f, f_test))
    W = X.new_zeros(X.shape[1], classes, requires_grad=True)
    b = X.new_zeros(classes, requires_grad=True)
    opt = torch.optim.LBFGS([W, b], max_iter=200, tolerance_change=1e-8,
                            line_search_fn="strong_wolfe")
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(X @ W + b, y) + l2 / 2 * W.square().sum()
        loss.backward()
        return loss
    opt.step(closure)
    return (X_test @ W + b).detach()

def class_subspaces(f, y, classes, rank=5):
    """Mean (D,) of f / |f| and, per class, its top right singular vectors about that mean,
    (K, D, rank) (Fig. 5). They classify by energy: |U_k^T (f / |f| - mean)|^2."""
    f = F.normalize(f)
    mean = f.mean(0)
    parts = [torch.linalg.svd(f[y == k] - mean, full_matrices=False).Vh for k in range(classes)]
    return mean, torch.stack([V[:rank].T for V in parts])

def unimodality(values):
    """Where the mean of values (repeats, levels) peaks, and by how much: dict of numbers.
    rise, drop  peak minus first and last value; standard errors over the repeats. The peak of a
                repeat is that of the other half of them (even, odd): a maximum is not its own judge
    unimodal    1 if both halves peak inside and both differences exceed two standard errors
    at_end      1 if both halves peak at the first or last level
    """
    last, odd = values.shape[1] - 1, torch.arange(len(values), device=values.device) % 2
    peaks = torch.stack([values[odd == 1].mean(0), values[odd == 0].mean(0)]).argmax(1)
    best = values.gather(1, peaks[odd][:, None])  # (repeats, 1)
    ends, inside = best - values[:, [0, last]], (peaks > 0) & (peaks < last)
    (rise, drop), se = ends.mean(0).tolist(), ends.std(0) / len(values)**0.5
    sure = bool(inside.all() and (ends.mean(0) > 2 * se).all())
    return {"peak": values.mean(0).argmax().item(), "accuracy": values.mean(0).max().item(),
            "rise": rise, "rise_se": se[0].item(), "drop": drop, "drop_se": se[1].item(),
            "unimodal": int(sure), "at_end": int(not inside.any())}

# ---- train -----------------------------------------------------------------------------
@torch.no_grad()
def collect(net, images, sigma, noisy, cfg, device):
    """Features (n, D) of uint8 images at one level, the same noise at each; or of clean input."""
    parts, generator = [], torch.Generator().manual_seed(10_007)
    for x in images.split(500):
        x, s = x / 127.5 - 1, torch.full((len(x),), sigma, device=device)
        if noisy:
            x = x + sigma * torch.randn(x.shape, generator=generator).to(device)
        with autocast(cfg, device):
            parts.append(activations(net, cfg.layer, x, s))
    return torch.cat(parts)

def curve(net, images, y, classes, noisy, cfg, device):
    """Of features at each of cfg.sigmas: which test images a logistic probe and the class subspaces
    get right, 0 or 1, (n / 2, levels) each; snr (1, levels). The first half of uint8 images
    (n, 3, S, S) is fitted, the other tested."""
    half, rows = len(y) // 2, []
    for sigma in levels(cfg.sigmas):
        f = collect(net, images, sigma, noisy, cfg, device)
        mean, bases = class_subspaces(f[:half], y[:half], classes)
        h = F.normalize(f[half:]) - mean
        energy = torch.einsum("bn,knd->bkd", h, bases).square().sum(-1)
        logits = logistic_probe(f[:half], y[:half], f[half:], classes)
        right = [(u.argmax(1) == y[half:]).float() for u in (logits, energy)]
        rows.append([*right, snr(h, y[half:], bases)[None]])
    accuracy, subspace, SNR = (torch.stack(column, 1).cpu() for column in zip(*rows))
    return {"accuracy": accuracy, "subspace": subspace, "snr": SNR}

def fixed_noise_loss(net, images, cfg, device):
    """image_loss of 2000 draws from uint8 images (n, 3, S, S), the same noise for any images."""
    torch.manual_seed(20_011)
    x = images[torch.arange(2000, device=device) % len(images)] / 127.5 - 1
    with autocast(cfg, device):
        return torch.stack([image_loss(net, part) for part in x.split(500)]).mean().item()

@torch.no_grad()
def measure_features(net, data, held_out, samples, cfg, device):
    """Of samples uint8 (n, 3, S, S): pairs of them and their nearest training image; of the network
    its curves {noisy, clean: as curve}; and a dict of numbers."""
    curves = {name: curve(net, *held_out, data.classes, name == "noisy", cfg, device)
              for name in ("noisy", "clean")}
    result = unimodality(curves["noisy"]["accuracy"])
    result["peak"] = levels(cfg.sigmas)[result["peak"]]
    part = take(data, cfg, device, cfg.probe_images)[0]
    bank = part if data.images is None else data.images  # streamed: a part stands for it
    ratio, index = nearest_ratio(samples.to(device).float(), bank.float())
    result |= {} if data.images is None else {"memorised": (ratio < 1 / 3).float().mean().item()}
    result |= {"train": fixed_noise_loss(net, part, cfg, device),
               "held_out": fixed_noise_loss(net, held_out[0], cfg, device)}
    return torch.stack([samples, bank[index].cpu()], 1), curves, result

def show_curves(pairs, curves, sigmas, path):
    """Curves to the terminal, <path>_probe.json and .png; pairs to <path>_nearest.png."""
    if RANK > 0:
        return
    print(f"{'sigma':>8}" + "".join(f"{f'{k} {m}':>16}" for k in curves for m in curves[k]))
    for i, sigma in enumerate(sigmas):
        row = (m[:, i].mean() for c in curves.values() for m in c.values())
        print(f"{sigma:8.3f}" + "".join(f"{value:16.4f}" for value in row))
    lists = {k: {name: m.mean(0).tolist() for name, m in c.items()} for k, c in curves.items()}
    Path(f"{path}_probe.json").write_text(json.dumps({"sigma": sigmas} | lists))
    with figure(f"{path}_probe.png", 1, 3) as axes:
        for ax, metric in zip(axes[0], ("accuracy", "subspace", "snr")):
            for name, m in ((name, c[metric]) for name, c in curves.items()):
                error = m.std(0, correction=0) / len(m)**0.5  # of the mean over test images
                ax.errorbar(sigmas, m.mean(0), error, fmt="o-", label=name)
            ax.set(title=metric, xlabel="noise level sigma", xscale="log")
        axes[0, 0].legend(title="input", fontsize=7)
    save_grid(pairs[:32].flatten(0, 1), f"{path}_nearest.png", columns=8)

def build(cfg):
    """The network of this config; one line and the end if it has no such layer."""
    net = DenoisingUNet(cfg.patch, cfg.dim, cfg.scales, cfg.blocks)
    with explain(f"--layer {cfg.layer}", AttributeError, IndexError, ValueError), torch.no_grad():
        x = torch.zeros(1, 3, cfg.image_size, cfg.image_size)
        activations(net, cfg.layer, x, torch.ones(1))
    return net.to(memory_format=torch.channels_last)

def draw(net, n, cfg, device, seed):
    """n samples, uint8 (n, 3, S, S) on the CPU, a part on each rank."""
    parts = []
    for index, generator in shares(n, 250, seed):
        shape = len(index), 3, cfg.image_size, cfg.image_size
        noise = torch.randn(shape, generator=generator).to(device)
        with autocast(cfg, device):
            parts.append((index, to_uint8(sample_edm(net, noise))))
    return gather(parts)

def train(cfg):
    device = setup(cfg)
    data, held_out = load_data(cfg, device)
    model = build(cfg).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # not compiled or wrapped
    opt = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, 0.95), weight_decay=0, fused=True)
    net = parallel(model, cfg, device)
    state = {"model": model, "ema": ema, "opt": opt, "found": {}}  # not logged yet

    for step in steps(cfg, state):
        x0, _ = batch(data, cfg, device, step)  # (B, 3, S, S) in [-1, 1]
        with autocast(cfg, device):
            loss = image_loss(net, x0)
        loss.backward()
        grad_norm = nn.utils.get_total_norm([w.grad for w in model.parameters()])
        opt.param_groups[0]["lr"] = lr = cfg.lr * min(1, (step + 1) / cfg.warmup)
        opt.step()
        opt.zero_grad()
        ema_update(ema, model, cfg.ema_decay, step)
        if due(cfg, cfg.sample_every, step):
            path = f"{cfg.out}/samples_{step + 1:07d}"
            images = draw(ema, 128, cfg, device, seed=0)
            save_grid(images[:64], f"{path}.png", columns=8)
            *shown, state["found"] = measure_features(ema, data, held_out, images, cfg, device)
            show_curves(*shown, levels(cfg.sigmas), path)
        log(cfg, state, step, loss=loss, lr=lr, grad_norm=grad_norm, **state["found"])
        state["found"] = {} if due(cfg, cfg.log_every, step) else state["found"]  # in one line

def sample(cfg):
    """Draw cfg.n images from cfg.sample and measure its features, at any layer and levels."""
    device, saved = setup(cfg), load_checkpoint(cfg.sample)
    net = build(cfg).to(device).eval().requires_grad_(False)
    net.load_state_dict(saved["ema"])
    images, path = draw(net, cfg.n, cfg, device, cfg.seed), f"{cfg.out}/sample"
    save_grid(images[:64], f"{path}.png", columns=8)
    if cfg.npz:
        save_npz(images, torch.zeros(len(images), dtype=torch.int64), f"{path}.npz")
    cfg = dataclasses.replace(cfg, seed=saved["config"]["seed"])  # --seed is of the noise alone
    pairs, curves, result = measure_features(net, *load_data(cfg, device), images, cfg, device)
    show_curves(pairs, curves, levels(cfg.sigmas), path)
    if RANK == 0:
        print(*(f"{k} {v:.4g}" for k, v in result.items()), sep="  ")

def main(argv=None):
    cfg = parse_config(Config, PRESETS, SAMPLING, argv)
    sample(cfg) if cfg.sample else train(cfg)

if __name__ == "__main__":
    main()
