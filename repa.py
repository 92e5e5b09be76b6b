"""REPA: a diffusion transformer whose middle tokens are pulled towards those of a frozen encoder.

Paper     Yu et al. Representation Alignment for Generation: Training Diffusion Transformers Is
          Easier Than You Think. arXiv:2410.06940v1 (REPA)
          Ma et al. SiT: Exploring Flow and Diffusion-based Generative Models with Scalable
          Interpolant Transformers. arXiv:2401.08740; variants: iREPA 2512.10794, HASTE 2505.16792
Here      Eq. 8 repa_loss: L_REPA = -E 1/N sum_n sim(y_*[n], h_phi(h_t[n])), with y_* from
          teacher_tokens and h_phi from make_projector; Eq. 9 train: L = L_velocity + lam L_REPA;
          Eq. 1 interpolant, Eq. 4 velocity_loss, Eq. 2, 5 and 7 sample_flow; of SiT: SiT, SiTBlock;
          iREPA --projector conv --spatial-norm 0.6 (paper: lam as in REPA; its SiT config: 1);
          HASTE's early stop --stop-align
Changed   w_t = 2 sigma_t in the SDE (REPA prints sigma_t; its code and SiT's have 2); guidance on
          all channels (SiT: three of four); sampler state in float32 (authors: float64); bf16, not
          fp16; EMA with a ramp; the encoder's input is resized with antialiasing; latents are
          encoded at every step; --sample draws classes in turn (authors: at random). Default run:
          pixels instead of latents, and SimSiam on the same images as the teacher; --pool averages
          a teacher's tokens where its grid is finer: 2 x 2
Left out  NT-Xent in place of the cosine, several encoders at once, encoders read before their last
          norm (MAE, CLIP: load_encoder's norm); the authors' cache of latents; probes, CKNNA and
          all comparisons: tests/claims/repa.py
Notation  x0      clean image or latent, (B, C, H, W)    t  0 = data ... 1 = noise, float32 (B,)
          eps     noise of the same shape                y  class, int64 (B,); `classes` = no class
          xt      alpha x0 + sigma eps                   alpha, sigma  factors at t, (B, 1, 1, 1)
          v       d_alpha x0 + d_sigma eps, dxt / dt     d_*           their derivatives by t
          h       tokens after block align_depth, h_t in the paper, (B, N, D); row by row
          p       h_phi(h), (B, N, D_f)                  *_hat         predicted by the network
          y_star  f(image), y_* in the paper, like p; the paper's x_*: x0, and the image for f
          Time runs as in REPA; SiT's own code has it the other way, t = 1 for data
Run       python repa.py                          # judge accuracy 0.57, 4 min, 2 CPU cores
          python repa.py --lam 0 --out runs/sit   # the same without alignment; not measured
          python repa.py --preset cifar10         # not measured; it needs first, as its teacher,
                 python simsiam.py --data torch/cifar10 --steps 20000 --out runs/teacher-cifar10
          torchrun --nproc-per-node 8 repa.py --preset paper --data <folder>      # not measured
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from einops.layers.torch import Rearrange
from torch import nn

from common import (autocast, batch, due, ema_update, explain, fail, gather, load_checkpoint,
                    load_encoder, load_images, log, parallel, parse_config, save_grid, save_npz,
                    setup, shares, steps, to_uint8)

# ---- config ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    preset: str = ""  # cifar10 | paper | paper-l | paper-b; a flag beats its preset
    out: str = ""  # run folder; empty: runs/repa or runs/repa-<preset>
    fresh: bool = False  # start over instead of continuing the run in the folder
    seed: int = 0  # of weights, data order and noise
    device: str = "auto"  # auto | cuda | mps | cpu
    precision: str = "auto"  # auto | bf16 | fp32; auto: bf16 where the device is fast at it
    compile: str = "auto"  # auto | on | off; auto: with CUDA, or Linux and g++; takes a minute
    data: str = "shapes"  # shapes | folder or .tar of class sub-folders | torch/... hfds/... (timm)
    image_size: int = 16  # side in pixels; larger images are cropped and resized
    flip: bool = False  # mirror half of the images, the same for the encoder
    skip_bad: bool = False  # leave out images that cannot be read
    batch_size: int = 64  # images per step, summed over all GPUs
    steps: int = 3500  # optimizer steps
    lr: float = 2e-3  # AdamW, betas (0.9, 0.999), no decay, constant; the projector's, too
    ema_decay: float = 0.999  # of the weights that are sampled
    grad_clip: float = 1.0  # largest norm of the gradient (SiT alone: none)
    log_every: int = 100  # steps between two lines in metrics.jsonl
    save_every: int = 500  # steps between two checkpoints
    sample_every: int = 1750  # steps between two sample grids
    encoder: str = "assets/teacher.safetensors"  # f: a file of simsiam.py, or timm:<name>
    sample: str = ""  # draw from this checkpoint instead of training
    n: int = 80  # how many images --sample draws
    npz: bool = False  # --sample also writes them as ADM's evaluation format
    vae: str = ""  # diffuse latents of this diffusers AutoencoderKL; empty: pixels
    patch: int = 4  # side of a patch of x0, which is one token
    dim: int = 128  # width D, a multiple of 4
    depth: int = 6  # blocks
    heads: int = 4  # attention heads
    path: str = "linear"  # linear | vp: alpha, sigma = 1 - t, t; or cos and sin of pi t / 2
    label_drop: float = 0.1  # share of labels replaced by "no class"; 1: unconditional
    lam: float = 0.5  # weight of the alignment (Eq. 9); 0: SiT alone, without encoder
    align_depth: int = 2  # h is the output of this block, counted from 1
    projector: str = "mlp"  # mlp | conv: h_phi, three linear maps or one 3x3 convolution (iREPA)
    projector_dim: int = 256  # hidden width of mlp
    pool: int = 2  # the encoder's grid is this times ours, averaged over squares of this side
    spatial_norm: float = 0.0  # gamma of iREPA's normalisation of y_star, 0.6 to 0.8; 0: off
    stop_align: int = 0  # end the alignment after this many steps (HASTE); 0: never
    sampler: str = "heun"  # sde | ode | heun: Euler-Maruyama, or Euler and Heun for the ODE
    sampling_steps: int = 25  # steps of the sampler
    guidance: float = 3.0  # classifier-free guidance; 1: off
    guidance_low: float = 0.0  # guidance acts for t from here
    guidance_high: float = 0.9  # to here

    def __post_init__(self):
        for name in ("patch", "dim", "depth", "heads", "projector_dim", "pool", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "lam", "stop_align"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.grad_clip > 0:
            raise ValueError(f"grad_clip must be positive, got {self.grad_clip}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for name in ("label_drop", "spatial_norm"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        unit = self.patch * (VAE_SIDE if self.vae else 1)
        if self.image_size % unit:
            raise ValueError(f"image_size {self.image_size} is not divisible by {unit}, a patch")
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"dim {self.dim} must be a multiple of 4 and of heads {self.heads}")
        if not 1 <= self.align_depth <= self.depth:
            raise ValueError(f"align_depth {self.align_depth} must be one of 1 ... {self.depth}")
        if self.label_drop == 1 and self.guidance != 1:
            raise ValueError("label_drop 1 has no classes to guide towards: give --guidance 1")

VAE_SIDE, VAE_CHANNELS, VAE_SCALE = 8, 4, 0.18215  # Stable Diffusion 1: shrink, channels, 1 / std

PAPER = dict(  # REPA: SiT-XL/2 with DINOv2-B on ImageNet 256, 80 epochs; DINOv2 at 224 pixels
    data="data/imagenet/train", image_size=256, batch_size=256, steps=400_000, lr=1e-4,
    ema_decay=0.9999, save_every=5000, sample_every=25_000,
    encoder="timm:vit_base_patch14_dinov2.lvd142m", vae="stabilityai/sd-vae-ft-ema", patch=2,
    dim=1152, depth=28, heads=16, align_depth=8, projector_dim=2048, pool=1,
    sampler="sde", sampling_steps=250, guidance=1.0, guidance_high=0.7)  # 4M steps: guidance 1.8
PRESETS = {
    "cifar10": dict(  # SiT-S/4
        data="torch/cifar10", image_size=32, batch_size=256, steps=20_000, lr=5e-4,
        ema_decay=0.9995, save_every=2000, sample_every=5000,
        encoder="runs/teacher-cifar10/teacher.safetensors", dim=384, depth=12, heads=6,
        align_depth=4, projector_dim=2048, pool=1, guidance=1.8, guidance_high=0.7),
    "paper": PAPER,
    "paper-l": PAPER | dict(dim=1024, depth=24),
    "paper-b": PAPER | dict(dim=768, depth=12, heads=12, align_depth=4),  # 8 in Tab. 6 is a slip
}
SAMPLING = ("sampler", "sampling_steps", "guidance", "guidance_low", "guidance_high")

# ---- data ------------------------------------------------------------------------------
# common.load_images and common.batch give images (B, 3, S, S) in [-1, 1] and y (B,) of any set.

def class_rows(classes, columns=8):
    """Classes y of a grid of samples, a row each, ten at most: int64 (rows * columns,)."""
    return torch.arange(min(classes, 10)).repeat_interleave(columns)

def load_vae(name, device):
    """A frozen AutoencoderKL of diffusers, by name or folder; None without a name."""
    if not name:
        return None
    with explain(f"--vae {name}", Exception):
        from diffusers import AutoencoderKL
        return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)

@torch.no_grad()
def encode_images(vae, images):
    """x0 of images (B, 3, S, S) in [-1, 1]: they themselves, or a draw of their latent, scaled."""
    return images if vae is None else VAE_SCALE * vae.encode(images).latent_dist.sample()

@torch.no_grad()
def decode_images(vae, x0):
    """Images (B, 3, S, S) in [-1, 1] of x0, decoded 32 at a time."""
    if vae:
        x0 = torch.cat([vae.decode(part / VAE_SCALE).sample for part in x0.split(32)])
    return x0.clamp(-1, 1)

# ---- model -----------------------------------------------------------------------------

# as in the other scripts; t in [0, 1] is not scaled, in the code of SiT (a slip) and REPA as here
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

class SiTBlock(nn.Module):
    """SiT's Block: LayerNorm without affine, plain attention, GELU MLP; adaLN-Zero (DiT) from c."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def attention(self, x):  # (B, N, D) -> (B, N, D)
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))

    def mlp(self, x):  # (B, N, D) -> (B, N, D)
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def forward(self, x, c):  # (B, N, D), (B, D) -> (B, N, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)

def make_projector(kind, side, dim, hidden, width):
    """h_phi of Eq. 8: tokens (B, side^2, dim) -> (B, side^2, width)."""
    if kind == "conv":  # iREPA: a token sees its neighbours, and nothing is in between
        return nn.Sequential(Rearrange("b (h w) d -> b d h w", h=side),
                             nn.Conv2d(dim, width, 3, padding=1),
                             Rearrange("b d h w -> b (h w) d"))
    layers = [nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, width)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

class SiT(nn.Module):
    """Scalable Interpolant Transformer: xt, t, y -> v_hat, zero at initialisation.

    align=True returns p = h_phi(h) beside it, h being the tokens after block align_depth; without
    a projector h_phi, which build attaches, p is None.
    """

    def __init__(self, side, channels, patch, classes, dim, depth, heads, align_depth=1):
        super().__init__()
        self.side, self.patch, self.classes = side // patch, patch, classes
        self.align_depth = align_depth
        self.embed = nn.Linear(channels * patch**2, dim)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)  # the last one: no class
        self.blocks = nn.ModuleList(SiTBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, channels * patch**2)
        self.register_buffer("position", position_table(self.side, dim), persistent=False)
        self.projector = None
        self.initialize()

    def initialize(self):
        """Xavier for linear maps, N(0, 0.02^2) for embeddings, 0 for modulations and the head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.time[0].weight, self.time[2].weight, self.label.weight):
            nn.init.normal_(weight, std=0.02)
        for module in (*[block.modulation for block in self.blocks], self.modulation, self.head):
            nn.init.zeros_(module.weight)

    def forward(self, xt, t, y, align=False):  # (B, C, H, W), (B,), (B,) -> (B, C, H, W)
        c = F.silu(self.time(time_features(t)) + self.label(y))  # (B, D)
        h = rearrange(xt, "b c (h i) (w j) -> b (h w) (i j c)", i=self.patch, j=self.patch)
        h = self.embed(h) + self.position  # (B, N, D), row by row
        p = None
        for k, block in enumerate(self.blocks, 1):
            h = block(h, c)
            if k == self.align_depth and align and self.projector:
                p = self.projector(h)  # Eq. 8: h_phi(h_t[n]) of every token n, (B, N, D_f)
        shift, scale = self.modulation(c)[:, None].chunk(2, -1)
        h = self.head(self.norm(h) * (1 + scale) + shift)  # (B, N, i j c)
        v_hat = rearrange(h, "b (h w) (i j c) -> b c (h i) (w j)", h=self.side, i=self.patch,
                          j=self.patch)
        return (v_hat, p) if align else v_hat

# ---- method ----------------------------------------------------------------------------

def interpolant(path, t):
    """alpha, sigma of Eq. 1 and their derivatives by t (B,), each (B, 1, 1, 1)."""
    t = t.view(-1, 1, 1, 1)
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    half = math.pi / 2  # variance-preserving: alpha^2 + sigma^2 = 1
    angle = half * t
    return angle.cos(), angle.sin(), -half * angle.sin(), half * angle.cos()

def velocity_loss(net, x0, y, t, path="linear"):
    """Eq. 4: E |v_hat(x_t, t, y) - v|^2, and p of the same pass: scalar, (B, N, D_f) or None."""
    eps = torch.randn_like(x0)
    alpha, sigma, d_alpha, d_sigma = interpolant(path, t)
    xt = alpha * x0 + sigma * eps  # Eq. 1
    v = d_alpha * x0 + d_sigma * eps  # dxt / dt
    v_hat, p = net(xt, t, y, align=True)
    return (v_hat.float() - v).square().mean(), p  # Eq. 4 has a norm; lam = 0.5 goes with the mean

@torch.no_grad()
def teacher_tokens(encoder, images, side, pool=1, gamma=0.0):
    """y_star = f(x_*) of Eq. 8 for clean images (B, 3, S, S): float32 (B, side^2, D_f).

    pool   the encoder's grid is this times finer; squares of it are averaged
    gamma  of iREPA's normalisation over tokens n, (y_* - gamma mean_n y_*) / std_n y_*; 0: none
    """
    y_star = encoder(images).float()  # (B, N pool^2, D_f), row by row
    y_star = reduce(y_star, "b (h i w j) d -> b (h w) d", "mean", h=side, w=side, i=pool, j=pool)
    if gamma:
        y_star = (y_star - gamma * y_star.mean(1, True)) / (y_star.std(1, keepdim=True) + 1e-6)
    return y_star

def repa_loss(p, y_star):
    """Eq. 8: -E 1/N sum_n sim(y_*[n], h_phi(h_t[n])), sim the cosine: float32 in [-1, 1]."""
    return -F.cosine_similarity(y_star, p.float(), dim=-1).mean()  # Eq. 8

def guided_v(net, x, t, y, guidance):
    """Classifier-free guidance, v_null + guidance (v_y - v_null), of x's shape; v_y if it is 1.

    The drift of Eq. 5 is affine in v: guided like this it would be the same.
    """
    if guidance == 1:
        return net(x, t, y).float()
    both = torch.cat([y, torch.full_like(y, net.classes)])
    v_y, v_null = net(x.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
    return v_null + guidance * (v_y - v_null)

@torch.no_grad()
def sample_flow(net, noise, y, path="linear", sampler="sde", sampling_steps=250, guidance=1.0,
                low=0.0, high=1.0, generator=None, diffusion=2.0, last=0.04):
    """x0 from noise, both (B, C, H, W), along the reverse SDE or the ODE, from t = 1 to 0.

    sde        Eq. 5 with w_t = diffusion sigma_t, Euler-Maruyama on sampling_steps nodes from 1 to
               `last`, then a step to 0 without noise
    ode, heun  Eq. 2 by Euler, or by Heun with the last step Euler, on an even grid
    low, high  guidance acts for low <= t <= high: not at the noisiest times
    diffusion  2: SiT, and REPA's code; 1: as REPA prints it
    """
    def v_hat(x, t, start=None):  # start: t where the step begins
        guide = guidance if low <= (t if start is None else start) <= high else 1.0
        return guided_v(net, x, x.new_full((len(x),), t), y, guide)

    def drift(x, t):  # for the linear path and diffusion = 2 it is (2 - t) v + x
        v = v_hat(x, t)
        alpha, sigma, d_alpha, d_sigma = interpolant(path, x.new_full((1,), t))
        sigma_s = (alpha * v - d_alpha * x) / (d_alpha * sigma - alpha * d_sigma)  # sigma x Eq. 7
        return v - diffusion / 2 * sigma_s  # Eq. 5: v - w_t s / 2, without a division by sigma

    x = noise
    if sampler == "sde":
        nodes = torch.linspace(1, last, sampling_steps, dtype=torch.float64)
        sigmas = interpolant(path, nodes)[1].flatten().tolist()
        nodes = nodes.tolist()
        for t, t_next, sigma in zip(nodes, nodes[1:], sigmas):
            xi = torch.randn(x.shape, generator=generator).to(x)
            std = (diffusion * sigma * (t - t_next))**0.5
            x = x + drift(x, t) * (t_next - t) + std * xi  # Eq. 5
        return x - drift(x, nodes[-1]) * nodes[-1]
    nodes = torch.linspace(1, 0, sampling_steps + 1, dtype=torch.float64).tolist()
    for t, t_next in zip(nodes, nodes[1:]):
        v = v_hat(x, t)
        if sampler == "heun" and t_next > 0:
            v = (v + v_hat(x + (t_next - t) * v, t_next, t)) / 2
        x = x + (t_next - t) * v  # Eq. 2
    return x

# ---- train -----------------------------------------------------------------------------

def input_shape(cfg):
    """Channels and side of x0."""
    return (VAE_CHANNELS, cfg.image_size // VAE_SIDE) if cfg.vae else (3, cfg.image_size)

def load_teacher(cfg, device):
    """The frozen encoder f, on a grid of `pool` times ours; None without alignment."""
    if not cfg.lam:
        return None
    grid = cfg.pool * input_shape(cfg)[1] // cfg.patch
    encoder = load_encoder(cfg.encoder, grid).to(device)
    encoder.model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        count = encoder(torch.zeros(1, 3, cfg.image_size, cfg.image_size, device=device)).shape[1]
    if count != grid**2:
        fail(f"--encoder {cfg.encoder} gives {count} tokens, not pool x side squared = {grid}^2")
    return encoder

def build(cfg, classes, width):
    """The network of this config; width: of the encoder's tokens, 0 without alignment."""
    channels, side = input_shape(cfg)
    model = SiT(side, channels, cfg.patch, classes, cfg.dim, cfg.depth, cfg.heads, cfg.align_depth)
    if width:  # drawn last: with and without it the rest starts from the same weights
        model.projector = make_projector(cfg.projector, model.side, cfg.dim, cfg.projector_dim,
                                         width)
    return model

def draw(net, vae, y, cfg, device, generator):
    """Images of classes y (B,), float32 (B, 3, S, S) in [-1, 1]; noise comes from generator."""
    channels, side = input_shape(cfg)
    noise = torch.randn(len(y), channels, side, side, generator=generator).to(device)
    y = torch.full_like(y, net.classes) if cfg.label_drop == 1 else y
    with autocast(cfg, device):
        x0 = sample_flow(net, noise, y.to(device), cfg.path, cfg.sampler, cfg.sampling_steps,
                         cfg.guidance, cfg.guidance_low, cfg.guidance_high, generator)
    return decode_images(vae, x0)

def train(cfg):
    device = setup(cfg)
    vae, encoder = load_vae(cfg.vae, device), load_teacher(cfg, device)
    data = load_images(cfg, device)
    width = encoder.dim if encoder else 0
    torch.manual_seed(cfg.seed)  # load_teacher drew numbers; alike without a teacher
    model = build(cfg, data.classes, width).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # for sampling; not compiled or wrapped
    opt = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, 0.999), weight_decay=0, fused=True)
    net = parallel(model, cfg, device)
    state = {"model": model, "ema": ema, "opt": opt, "classes": data.classes, "width": width}

    for step in steps(cfg, state):
        images, y = batch(data, cfg, device, step)  # (B, 3, S, S) in [-1, 1], (B,)
        y = torch.where(torch.rand(len(y), device=device) < cfg.label_drop, data.classes, y)
        t = torch.rand(len(y), device=device)
        x0 = encode_images(vae, images)  # (B, C, H, W)
        with autocast(cfg, device):
            velocity, p = velocity_loss(net, x0, y, t, cfg.path)
            if encoder and (step < cfg.stop_align or not cfg.stop_align):
                y_star = teacher_tokens(encoder, images, model.side, cfg.pool, cfg.spatial_norm)
                align = repa_loss(p, y_star)  # Eq. 8
            else:  # logged as 0; so is the gradient of h_phi: DDP waits for every parameter
                align = 0 * (velocity if p is None else p.float().sum())
            loss = velocity + cfg.lam * align  # Eq. 9
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        opt.step()
        opt.zero_grad()
        ema_update(ema, model, cfg.ema_decay, step)
        log(cfg, state, step, loss=loss, velocity=velocity, align=align, lr=cfg.lr,
            grad_norm=grad_norm)
        if due(cfg, cfg.sample_every, step):
            rows, generator = class_rows(data.classes), torch.Generator().manual_seed(0)
            images = draw(ema, vae, rows, cfg, device, generator)
            save_grid(images, f"{cfg.out}/samples_{step + 1:07d}.png", columns=8)

def sample(cfg):
    """Draw cfg.n images from cfg.sample, image i of class i mod classes; the PNG shows ten."""
    device, saved = setup(cfg), load_checkpoint(cfg.sample, "ema", "classes", "width")
    vae = load_vae(cfg.vae, device)
    net = build(cfg, saved["classes"], saved["width"]).to(device).eval().requires_grad_(False)
    net.load_state_dict(saved["ema"])
    y = torch.arange(cfg.n) % saved["classes"]
    images = gather([(i, to_uint8(draw(net, vae, y[i], cfg, device, generator)))
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
