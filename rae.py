"""Diffusion in the tokens of a frozen encoder: a decoder for them, and a transformer that copes.

Paper     Zheng, Ma, Tong, Xie. Diffusion Transformers with Representation Autoencoders.
          arXiv:2510.11690v1 (RAE)
Here      decoder of f + sigma e, sigma ~ |N(0, tau^2)|: ViTDecoder, noisy_tokens; its loss L1 +
          LPIPS + w_gan L_G: train_decoder, adaptive_weight; DiT, with the wide head DiT^DH: DiTDH;
          |v_hat - (eps - z)|^2: latent_flow_loss; t <- alpha t / (1 + (alpha - 1) t): shift_time,
          alpha = sqrt(N n / 4096), default 1.6: shift_factor; euler_ode; AutoGuidance: guided_flow;
          error at least 1 - d / n of a transformer of width d < n: tests/claims/rae.py
Changed   normalised queries and keys; rotary pairs (i, i + D / 2); linear maps start as Xavier's;
          one SiLU, not two, before the blocks of DiT^DH; LayerNorm of tokens with 1e-5 (DINOv2:
          1e-6); the encoder's input is resized with antialiasing; mean and variance of latents per
          channel (released: per position, no mean); alpha < 1 allowed; t not cut at 0.999, its law
          logit-normal (first code: uniform); Euler ends at 0, not 0.0069. Decoder: AdamW 0.9, 0.95
          (paper: Adam 0.5, 0.9); extra token not 0; output in [-1, 1], not the encoder's units;
          PatchGAN; 1e-4 for 1e-6 in the adaptive weight; no random crops; default: no LPIPS, no GAN
Left out  the discriminator's heads on a frozen DINO-S/8, DiffAug; upsampling decoder; 512 pixels
Notation  x    image, (B, 3, S, S) in [-1, 1]         f      tokens of the encoder, (B, N, n),
          z    f normalised by channel                       LayerNorm without weights at the end
          eps  noise like z                           t      0 = data ... 1 = noise, float32 (B,)
          v    eps - z, the velocity                  alpha  factor of the odds t / (1 - t)
          y    class, int64 (B,); `classes` = none    sigma  of the decoder's noise, scale tau
Run       python rae.py                      # accuracy 0.715 of the judge, 5 min, 2 CPU cores
          python rae.py --preset cifar10     # not measured
          torchrun --nproc-per-node 8 rae.py --preset paper --data <folder>         # not measured
          torchrun --nproc-per-node 8 -- rae.py --sample runs/rae-paper/last.pt --guidance 1.42 \\
              --weak runs/rae-paper-s/last.pt --n 50000 --npz                       # not measured
"""
import copy
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import (RANK, WORLD, autocast, batch, due, ema_update, explain, gather,
                    load_checkpoint, load_encoder, load_images, log, mix, parallel, parse_config,
                    save_grid, save_npz, setup, shares, steps, to_uint8)

# ---- config ----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = ""  # cifar10 | paper | paper-s | paper-dit; a flag beats its preset
    out: str = ""  # run folder; empty: runs/rae or runs/rae-<preset>
    fresh: bool = False  # start over instead of continuing the run in the folder
    seed: int = 0  # of weights, data order and noise
    device: str = "auto"  # auto | cuda | mps | cpu
    precision: str = "auto"  # auto | bf16 | fp32; auto: bf16 where fast; authors: fp32 is safer
    compile: str = "auto"  # auto | on | off; auto: CUDA, or Linux with g++; a decoder with gan: off
    data: str = "shapes"  # shapes | folder or .tar of class sub-folders | torch/... hfds/... (timm)
    image_size: int = 16  # side S in pixels; larger images are cropped and resized
    flip: bool = False  # mirror half of the images, in the last stage only
    skip_bad: bool = False  # leave out images that cannot be read
    batch_size: int = 64  # images per step of the last stage, summed over all GPUs
    steps: int = 3000  # optimizer steps of the last stage
    lr: float = 1e-3  # AdamW, betas (0.9, 0.95), no decay
    ema_decay: float = 0.995  # of the transformer that is sampled
    grad_clip: float = 1.0  # largest norm of the gradient, last stage only; 0: any
    log_every: int = 50  # steps between two lines in metrics.jsonl
    save_every: int = 500  # steps between two checkpoints
    sample_every: int = 1500  # steps between two grids of reconstructions and samples
    encoder: str = "assets/teacher.safetensors"  # file that simsiam.py makes, or timm:<name>
    sample: str = ""  # draw from this checkpoint instead of training
    n: int = 80  # how many images --sample draws
    npz: bool = False  # --sample also writes them as ADM's evaluation format
    patch: int = 4  # side in pixels of what the decoder makes of a token: N = (S / patch)^2
    dim: int = 96  # width d of the transformer; without a head at least n, the width of a token
    depth: int = 4  # blocks
    heads: int = 4  # attention heads; dim / heads is a multiple of 4, for the rotation
    head_dim: int = 192  # width of the wide head, at least n
    head_depth: int = 2  # blocks of the wide head; 0: none, plain DiT
    head_heads: int = 4  # its attention heads
    label_drop: float = 0.1  # share of labels replaced by "no class"
    lr_flat: int = 1500  # steps at lr; from there on linear to lr / 10 at the last one
    time_law: str = "logit-normal"  # logit-normal | uniform: law of t before the shift
    alpha: float = 1.6  # shift of t, in training and sampling; 0: sqrt(N n / 4096), here 0.8
    sampling_steps: int = 50  # Euler steps
    guidance: float = 3.0  # 1: off; else v_weak + w (v - v_weak)
    weak: str = ""  # last.pt of the weak network (AutoGuidance); empty: this one without class
    decoder_dir: str = ""  # folder of the first stage, which runs may share; empty: <out>/decoder
    decoder_steps: int = 3000  # optimizer steps of the first stage
    decoder_batch_size: int = 64  # images per step of the first stage
    decoder_lr: float = 1e-3  # AdamW, warm-up for 1 / 16 of the steps, cosine to a tenth
    decoder_ema: float = 0.99  # of the decoder that is used
    decoder_dim: int = 128  # width of the decoder
    decoder_depth: int = 3  # its blocks
    decoder_heads: int = 4  # its attention heads
    decoder_mlp: int = 512  # width inside its MLPs
    tau: float = 0.8  # scale of the noise on the tokens that the decoder is trained on
    sigma_law: str = "half-normal"  # half-normal | uniform: |N(0, tau^2)| (paper), U(0, tau) (code)
    perceptual: str = "none"  # none | lpips: added to L1 with weight 1; lpips downloads VGG
    gan: float = 0.0  # weight of the adversarial term; 0: none

    def __post_init__(self):
        for name in """patch dim depth heads head_dim head_heads sampling_steps decoder_steps
                decoder_batch_size decoder_dim decoder_depth decoder_heads decoder_mlp""".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in "lr decoder_lr grad_clip alpha tau gan head_depth lr_flat".split():
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("ema_decay", "decoder_ema", "label_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("dim / heads", "head_dim / head_heads", "decoder_dim / decoder_heads"):
            width, heads = (getattr(self, word) for word in name.split(" / "))
            if width % (4 * heads):
                raise ValueError(f"{name} must be a multiple of 4, got {width} / {heads}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch {self.patch}")
        if self.gan and self.image_size < 24:
            raise ValueError("the discriminator needs image_size 24 or more; or gan 0")
        if self.weak and self.guidance == 1:
            raise ValueError("weak has no effect at guidance 1")

PAPER = dict(  # ImageNet 256: 800 epochs of 1251 steps, 40 at full lr; decoder: 16 epochs of 2502
    data="data/imagenet", image_size=256, flip=True, batch_size=1024, steps=1_000_800, lr=2e-4,
    ema_decay=0.9995, grad_clip=1.0, log_every=100, save_every=5000, sample_every=25_020,
    encoder="timm:vit_base_patch14_reg4_dinov2.lvd142m", patch=16, dim=1152, depth=28, heads=16,
    head_dim=2048, head_depth=2, head_heads=16, lr_flat=50_040, alpha=0, decoder_steps=40_032,
    decoder_batch_size=512, decoder_lr=2e-4, decoder_ema=0.9978, decoder_dim=1152,
    decoder_depth=28, decoder_heads=16, decoder_mlp=4096, perceptual="lpips", gan=0.75, guidance=1)
SHARED = PAPER | dict(decoder_dir="runs/rae-paper/decoder")
PRESETS = {
    "cifar10": dict(  # the small teacher is for shapes; DINOv2-S is downloaded
        data="torch/cifar10", image_size=32, flip=True, batch_size=256, steps=20_000, lr=5e-4,
        ema_decay=0.999, log_every=100, sample_every=5000, dim=384, depth=12, heads=6, head_dim=768,
        encoder="timm:vit_small_patch14_reg4_dinov2.lvd142m", head_heads=12, lr_flat=10_000,
        alpha=0, decoder_steps=10_000, decoder_batch_size=256, decoder_lr=4e-4, decoder_ema=0.998,
        decoder_dim=384, decoder_depth=6, decoder_heads=6, decoder_mlp=1536, gan=0.75),
    "paper": PAPER,
    "paper-s": SHARED | dict(steps=17_514, dim=384, depth=12, heads=6),  # DiT^DH-S, the weak one
    "paper-dit": SHARED | dict(head_depth=0),  # DiT-XL
}
SAMPLING = ("sampling_steps", "guidance", "weak")
DECODER_FIELDS = """seed device precision compile data image_size skip_bad log_every save_every
sample_every encoder patch decoder_dim decoder_depth decoder_heads decoder_mlp tau sigma_law
perceptual gan"""

# ---- data ------------------------------------------------------------------------------

def class_rows(classes, columns=8):
    """Classes y of a grid of samples, a row each, ten at most: int64 (rows * columns,)."""
    return torch.arange(min(classes, 10)).repeat_interleave(columns)

def held_out_images(cfg, device, n=256):
    """This rank's part of at most n images that are not trained on, float32 (B, 3, S, S)."""
    cfg = dataclasses.replace(cfg, flip=False, seed=0, batch_size=n // WORLD * WORLD)
    data = load_images(cfg, device, "validation", n)
    size = max(1, min(n, data.size) // WORLD) * WORLD
    return batch(data, dataclasses.replace(cfg, batch_size=size), device, 0)[0]

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

class TokenBlock(Block):
    """Block of the wide head: its shifts, scales and gates differ from token to token."""
    def forward(self, x, c, table):  # (B, N, D), (B, N, D), (2, N, D / heads / 2) -> (B, N, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, table)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

def position_table(side, dim):
    """Fixed sin and cos of the column (first half of the channels), then the row: (side^2, dim)."""
    rate = 10000 ** (-torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(side)[:, None] * rate
    wave = torch.cat([angle.sin(), angle.cos()], -1)  # (side, dim / 2)
    column, row = wave[None].expand(side, -1, -1), wave[:, None].expand(-1, side, -1)
    return torch.cat([column, row], -1).flatten(0, 1)

class DiTDH(nn.Module):
    """Noisy latents (B, N, n), time, class -> velocity, zero at initialisation: DiT; or DiT^DH,
    whose head_depth wide blocks read the latents anew, conditioned token by token on the others."""
    def __init__(self, side, channels, classes, dim, depth, heads, head_dim=0, head_depth=0,
                 head_heads=1):
        super().__init__()
        self.classes = classes
        self.embed = nn.Linear(channels, dim)
        self.time = nn.Sequential(nn.Linear(512, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)  # the last one: no class
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head_blocks = nn.ModuleList(TokenBlock(head_dim, head_heads)
                                         for _ in range(head_depth))
        if head_depth:
            self.condition, self.head_embed = (nn.Linear(i, head_dim) for i in (dim, channels))
            table = rotary_table(side, head_dim // head_heads, 0)
            self.register_buffer("head_rotary", table, persistent=False)
        width = head_dim if head_depth else dim
        self.norm, self.modulation = RMSNorm(width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, channels)
        self.register_buffer("rate", torch.randn(256))  # of the time features, not trained
        self.register_buffer("position", position_table(side, dim), persistent=False)
        self.register_buffer("rotary", rotary_table(side, dim // heads, 0), persistent=False)
        self.initialize()
    def initialize(self):
        """Xavier for linear maps, N(0, 0.02^2) for embeddings, 0 for modulations and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.time[0].weight, self.time[2].weight, self.label.weight):
            nn.init.normal_(weight, std=0.02)
        for module in (self, *self.blocks, *self.head_blocks):
            nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.output.weight)
    def forward(self, zt, t, y):  # (B, N, n), (B,), (B,) -> (B, N, n)
        angle = 2 * math.pi * t[:, None] * self.rate  # t in [0, 1], as in the authors' code
        e_t = self.time(torch.cat([angle.sin(), angle.cos()], -1))  # (B, D)
        c = F.silu(e_t + self.label(y))
        h = self.embed(zt) + self.position  # (B, N, D)
        for block in self.blocks:
            h = block(h, c, self.rotary)
        c = c[:, None]
        if self.head_blocks:
            c = F.silu(self.condition(F.silu(e_t[:, None] + h)))  # (B, N, head_dim); class: by h
            h = self.head_embed(zt)  # without position
            for block in self.head_blocks:
                h = block(h, c, self.head_rotary)
        shift, scale = self.modulation(c).chunk(2, -1)
        return self.output(self.norm(h) * (1 + scale) + shift)

class ViTDecoder(nn.Module):
    """The decoder of MAE: tokens as the encoder gives them -> images."""
    def __init__(self, side, channels, patch, dim, depth, heads, hidden):
        super().__init__()
        self.side, self.patch = side, patch
        self.embed = nn.Linear(channels, dim)
        self.extra = nn.Parameter(0.02 * torch.randn(1, 1, dim))  # at 0 LayerNorm's slope is 1e6
        layer = dim, heads, hidden, 0.0, F.gelu, 1e-12, True, True  # batch first, norm first
        self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(*layer) for _ in range(depth)])
        self.norm, self.output = nn.LayerNorm(dim, 1e-12), nn.Linear(dim, 3 * patch**2)
        self.register_buffer("position", position_table(side, dim), persistent=False)
    def forward(self, f):  # (B, N, n) -> (B, 3, S, S)
        h, p = self.embed(f) + self.position, self.patch
        h = torch.cat([self.extra.expand(len(h), -1, -1).to(h.dtype), h], 1)  # as MAE's class token
        h = self.output(self.norm(self.blocks(h)))[:, 1:]  # (B, N, p q c)
        return rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=p, q=p)

class PatchGAN(nn.Module):
    """Discriminator of overlapping patches: images (B, 3, H, W) -> logits (B, 1, h, w).

    layers  convolutions of stride 2 before two of stride 1; with 3 a logit sees 70 x 70 pixels.
    BatchNorm always takes the statistics of its batch, so call it on real and fake ones apart.
    """

    def __init__(self, channels=64, layers=3):
        super().__init__()
        widths = [min(2**i, 8) * channels for i in range(layers + 1)]
        body = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(zip(widths, widths[1:]), 1):
            body += [nn.Conv2d(a, b, 4, 2 if i < layers else 1, 1, bias=False),
                     nn.BatchNorm2d(b, track_running_stats=False), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.body:
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)

    def forward(self, images):
        return self.body(images)

# ---- method ----------------------------------------------------------------------------
# Time runs from data, t = 0, to noise, t = 1: z_t = (1 - t) z + t eps and v = dz_t/dt = eps - z.

def load_lpips(device):
    """LPIPS with VGG, (B, 3, S, S) twice -> (B, 1, 1, 1), from a package only this needs."""
    with explain("--perceptual lpips", Exception):  # not installed, or VGG cannot be downloaded
        import lpips
        return lpips.LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)

def hinge_discriminator(real, fake):
    """(E relu(1 - D(x)) + E relu(1 + D(x_hat))) / 2 of logits of any shape. Scalar."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2

def hinge_generator(fake):
    """-E D(x_hat) of logits of any shape. Scalar."""
    return -fake.float().mean()

def adaptive_weight(reference, loss, weight, ceiling=1e4):
    """|grad reference| / (|grad loss| + 1e-4) at a parameter, at most ceiling. Scalar, no gradient.

    Times it, loss has the gradient norm of reference there. Both graphs are kept for backward().
    """
    size = [torch.autograd.grad(value, weight, retain_graph=True)[0].float().norm()
            for value in (reference, loss)]
    return (size[0] / (size[1] + 1e-4)).clamp(max=ceiling)

def noisy_tokens(f, tau, law):
    """f + sigma e for tokens f (B, N, n), one sigma an image, which the decoder is not told."""
    u = torch.rand if law == "uniform" else torch.randn
    sigma = tau * u(len(f), 1, 1, device=f.device).abs()
    return f + sigma * torch.randn_like(f)

def shift_factor(m, base=4096):
    """alpha = sqrt(m / base) for latents of m numbers: noise averages out over m of them."""
    return (m / base)**0.5

def shift_time(t, alpha):
    """alpha t / (1 + (alpha - 1) t), which multiplies the odds t / (1 - t) by alpha."""
    return alpha * t / (1 + (alpha - 1) * t)

def flow_time(size, law, alpha, device):
    """t (B,) in [0, 1], B = size, shifted: of U(0, 1) or the logistic function of N(0, 1)."""
    uniform = law == "uniform"
    t = torch.rand(size, device=device) if uniform else torch.randn(size, device=device).sigmoid()
    return shift_time(t, alpha)

def latent_flow_loss(net, z, y, t):
    """Squared error of the velocity, its mean; z (B, N, n) normalised latents, t (B,). Scalar."""
    eps, s = torch.randn_like(z), t.view(-1, 1, 1)
    v_hat = net((1 - s) * z + s * eps, t, y).float()  # float32 again: only the net runs in bf16
    return (v_hat - (eps - z)).square().mean()

def guided_flow(net, weak, zt, t, y, guidance=1.0):
    """v_weak + w (v - v_weak), v_weak of another network (AutoGuidance) or, None, of no class."""
    if guidance == 1:
        return net(zt, t, y).float()
    if weak is None:
        both = torch.cat([y, torch.full_like(y, net.classes)])
        v, v_weak = net(zt.repeat(2, 1, 1), t.repeat(2), both).float().chunk(2)
    else:
        v, v_weak = net(zt, t, y).float(), weak(zt, t, y).float()
    return v_weak + guidance * (v - v_weak)

@torch.no_grad()
def euler_ode(velocity, z, alpha, sampling_steps=50):
    """dz/dt = v(z, t) from noise z, t = 1, to t = 0: Euler steps, an even grid shifted by alpha."""
    grid = shift_time(torch.linspace(1, 0, sampling_steps + 1, dtype=torch.float64), alpha).tolist()
    for t, t_next in zip(grid, grid[1:]):
        z = z + (t_next - t) * velocity(z, z.new_full((len(z),), t))
    return z

# ---- train -----------------------------------------------------------------------------

def build(cfg, channels, classes):
    """The transformer of this config."""
    return DiTDH(cfg.image_size // cfg.patch, channels, classes, cfg.dim, cfg.depth, cfg.heads,
                 cfg.head_dim, cfg.head_depth, cfg.head_heads)

def build_decoder(cfg, channels):
    """The decoder of this config."""
    return ViTDecoder(cfg.image_size // cfg.patch, channels, cfg.patch, cfg.decoder_dim,
                      cfg.decoder_depth, cfg.decoder_heads, cfg.decoder_mlp)

@torch.no_grad()
def latent_statistics(encoder, data, cfg, device, images=10_000):
    """Mean and deviation of the tokens' channels, (2, n); of a stream, of the seed's images."""
    cfg, moments = dataclasses.replace(cfg, seed=0, flip=False), []
    for step in range(max(1, int(min(images, data.size) // cfg.batch_size))):
        with autocast(cfg, device):
            f = encoder(batch(data, cfg, device, step)[0]).float()  # (B, N, n)
        moments.append(torch.stack([f.mean((0, 1)), f.square().mean((0, 1))]).cpu().double())
    vars(data).pop("iterator", None)  # a streamed set starts anew
    mean, square = gather([(torch.tensor([RANK]), torch.stack(moments).mean(0)[None])]).mean(0)
    return torch.stack([mean, (square - mean**2).clamp(min=1e-4).sqrt()]).float().to(device)

@torch.no_grad()
def draw(net, weak, latents, y, cfg, device, generator):
    """Tokens (B, N, n) of classes y (B,), of mean and deviation latents (2, n)."""
    mean, std = latents
    shape = len(y), (cfg.image_size // cfg.patch)**2, len(mean)
    noise, y = torch.randn(shape, generator=generator).to(device), y.to(device)
    alpha = cfg.alpha or shift_factor(noise[0].numel())  # as in training
    with autocast(cfg, device):
        velocity = lambda zt, t: guided_flow(net, weak, zt, t, y, cfg.guidance)
        return euler_ode(velocity, noise, alpha, cfg.sampling_steps) * std + mean

@torch.no_grad()
def decode(decoder, f, cfg, device):
    """Images float32 (B, 3, S, S) in [-1, 1] of tokens f (B, N, n)."""
    with autocast(cfg, device):
        return decoder(f).float().clamp(-1, 1)

@torch.no_grad()
def round_trip(encoder, decoder, x, cfg, device):
    """x_hat of images x (B, 3, S, S), encoded and decoded, and its PSNR in dB, mean over B."""
    with autocast(cfg, device):
        f = torch.cat([encoder(part).float() for part in x.split(256)])
    x_hat = torch.cat([decode(decoder, part, cfg, device) for part in f.split(256)])
    return x_hat, 10 * (4 / (x_hat - x).square().flatten(1).mean(1)).log10().mean().item()

def train_decoder(cfg, encoder, data, held_out, device):
    """First stage, a run of its own in <out>/decoder or --decoder-dir: the decoder's EMA."""
    cfg = Config(**{name: getattr(cfg, name) for name in DECODER_FIELDS.split()},
                 out=cfg.decoder_dir or f"{cfg.out}/decoder", lr=cfg.decoder_lr,
                 fresh=cfg.fresh and not cfg.decoder_dir, batch_size=cfg.decoder_batch_size,
                 steps=cfg.decoder_steps, ema_decay=cfg.decoder_ema)
    setup(cfg, "steps")  # the learning rate depends on it
    if data.images is None or data.size < cfg.batch_size:  # a stream has its own batch size
        data = load_images(cfg, device, "train")  # or says that the set is too small
    lpips = load_lpips(device) if cfg.perceptual == "lpips" else None
    model = build_decoder(cfg, encoder.dim).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    adam = dict(lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0, fused=True)
    opt = torch.optim.AdamW(model.parameters(), **adam)
    plain = dataclasses.replace(cfg, compile="off")
    net = parallel(model, plain if cfg.gan else cfg, device)  # w_gan is a gradient of one layer
    state = {"model": model, "ema": ema, "opt": opt}
    if cfg.gan:
        critic = PatchGAN().to(device)
        critic_opt = torch.optim.AdamW(critic.parameters(), **adam)
        critic_net = parallel(critic, plain, device)
        state |= {"critic": critic, "critic_opt": critic_opt}
    state["found"] = {}  # the latest
    rate = lambda e: min(e, 0.55 + 0.45 * math.cos(math.pi * (e - 1) / 15))  # of lr after e epochs

    for step in steps(cfg, state):
        x, _ = batch(data, cfg, device, step)  # (B, 3, S, S) in [-1, 1]
        epoch = 16 * (step + 1) / cfg.steps  # of the paper's 16, done after this step
        with autocast(cfg, device):
            f = encoder(x).float()  # (B, N, n); the encoder is frozen
            x_hat = net(noisy_tokens(f, cfg.tau, cfg.sigma_law)).float()
        l1 = (x_hat - x).abs().mean() / 2  # of pixels in [0, 1]
        rec = l1 + lpips(x_hat, x).mean() if lpips else l1
        loss, values = rec, {"l1": l1}
        adversarial = w_gan = hinge = torch.zeros_like(l1)  # before their epochs
        if cfg.gan and epoch > 8:
            critic.requires_grad_(False)
            with autocast(cfg, device):
                adversarial = hinge_generator(critic(x_hat))
            w_gan = cfg.gan * adaptive_weight(rec, adversarial, model.output.weight)
            loss = loss + w_gan * adversarial
        loss.backward()
        grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        opt.param_groups[0]["lr"] = lr = cfg.lr * rate(epoch)
        opt.step()
        opt.zero_grad()
        if cfg.gan and epoch > 6:
            critic.requires_grad_(True)
            fake = to_uint8(decode(model, f, cfg, device)) / 127.5 - 1  # anew, from clean tokens
            with autocast(cfg, device):
                hinge = hinge_discriminator(critic_net(x), critic_net(fake))
            hinge.backward()
            critic_opt.param_groups[0]["lr"] = cfg.lr * rate(epoch - 6)  # warms up, too
            critic_opt.step()
            critic_opt.zero_grad()
        values |= {"adversarial": adversarial, "w_gan": w_gan, "hinge": hinge} if cfg.gan else {}
        ema_update(ema, model, cfg.ema_decay, step)
        if due(cfg, cfg.sample_every, step):
            x_hat, state["found"]["psnr"] = round_trip(encoder, ema, held_out, cfg, device)
            pairs = torch.cat([held_out[:8], x_hat[:8]])
            save_grid(pairs, f"{cfg.out}/samples_{step + 1:07d}.png", columns=8)
        log(cfg, state, step, loss=loss, lr=lr, grad_norm=grad_norm, **values, **state["found"])
    return ema

def load_weak(cfg, latents, device):
    """The network of --weak, for AutoGuidance, of latents alike: (2, n), mean and deviation."""
    saved = load_checkpoint(cfg.weak)
    with explain(f"--weak {cfg.weak} does not fit", KeyError, TypeError, ValueError, RuntimeError):
        theirs = Config(**saved["config"])
        for name in ("data", "image_size", "encoder", "patch"):
            if getattr(theirs, name) != getattr(cfg, name):
                raise ValueError(f"it has {name} {getattr(theirs, name)}")
        if not torch.allclose(saved["latents"], latents.cpu(), rtol=0.05, atol=0.05):
            raise ValueError("its latents have another mean or deviation")
        net = build(theirs, latents.shape[1], saved["classes"]).to(device)
        net.load_state_dict(saved["ema"])
    return net.eval().requires_grad_(False)

def train(cfg):
    device = setup(cfg, "steps")  # the learning rate depends on it
    encoder = load_encoder(cfg.encoder, cfg.image_size // cfg.patch, "plain").to(device)
    data, held_out = load_images(cfg, device, "train"), held_out_images(cfg, device)
    shown = held_out[torch.arange(20) % len(held_out)]
    mean, std = latents = latent_statistics(encoder, data, cfg, device)  # (n,) each
    weak = load_weak(cfg, latents, device) if cfg.weak else None
    if cfg.fresh and RANK == 0:
        Path(cfg.out, "last.pt").unlink(missing_ok=True)  # the first stage comes before it
    decoder = train_decoder(cfg, encoder, data, held_out, device)
    torch.manual_seed(mix(cfg.seed, 1))  # whether or not the first stage has run just now
    model = build(cfg, encoder.dim, data.classes).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # for sampling; not compiled or wrapped
    opt = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, 0.95), weight_decay=0, fused=True)
    net = parallel(model, cfg, device)
    state = {"model": model, "ema": ema, "opt": opt, "decoder": decoder, "latents": latents,
             "classes": data.classes}
    seen = round_trip(encoder, decoder, shown, cfg, device)[0]

    for step in steps(cfg, state):
        x, y = batch(data, cfg, device, step)  # (B, 3, S, S) in [-1, 1], (B,)
        y = torch.where(torch.rand(len(y), device=device) < cfg.label_drop, data.classes, y)
        with autocast(cfg, device):
            z = (encoder(x).float() - mean) / std  # (B, N, n); the encoder is frozen
            t = flow_time(len(z), cfg.time_law, cfg.alpha or shift_factor(z[0].numel()), device)
            loss = latent_flow_loss(net, z, y, t)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        late = max(0, step + 1 - cfg.lr_flat) / max(1, cfg.steps - cfg.lr_flat)  # 0 ... 1
        opt.param_groups[0]["lr"] = lr = cfg.lr * (1 - 0.9 * late)
        opt.step()
        opt.zero_grad()
        ema_update(ema, model, cfg.ema_decay, step)
        log(cfg, state, step, loss=loss, lr=lr, grad_norm=grad_norm)
        if due(cfg, cfg.sample_every, step):  # a row: two images, reconstructed; eight samples
            rows, generator = class_rows(data.classes), torch.Generator().manual_seed(0)
            f = draw(ema, weak, latents, rows, cfg, device, generator)
            images = decode(decoder, f, cfg, device).unflatten(0, (-1, 8))
            pairs = torch.stack([shown, seen], 1).view(10, 4, *shown.shape[1:])[:len(images)]
            both = torch.cat([pairs, images], 1).flatten(0, 1)
            save_grid(both, f"{cfg.out}/samples_{step + 1:07d}.png", columns=12)

def sample(cfg):
    """Draw cfg.n images from cfg.sample, image i of class i mod classes; the PNG shows ten."""
    device, saved = setup(cfg), load_checkpoint(cfg.sample, "ema", "decoder", "latents")
    latents, classes, parts = saved["latents"].to(device), saved["classes"], []
    y, n = torch.arange(cfg.n) % classes, latents.shape[1]
    nets = {"ema": build(cfg, n, classes), "decoder": build_decoder(cfg, n)}
    for name, net in nets.items():
        net.to(device).eval().requires_grad_(False).load_state_dict(saved[name])
    weak = load_weak(cfg, latents, device) if cfg.weak else None
    for i, generator in shares(cfg.n, 250, cfg.seed):
        f = draw(nets["ema"], weak, latents, y[i], cfg, device, generator)
        parts.append((i, to_uint8(decode(nets["decoder"], f, cfg, device))))
    images = gather(parts)
    columns = max(1, min(8, cfg.n // classes))
    rows = [images[y == k][:columns] for k in range(min(classes, 10))]
    save_grid(torch.cat(rows), f"{cfg.out}/sample.png", columns)
    if cfg.npz:
        save_npz(images, y, f"{cfg.out}/sample.npz")

def main(argv=None):
    cfg = parse_config(Config, PRESETS, SAMPLING, argv)
    sample(cfg) if cfg.sample else train(cfg)

if __name__ == "__main__":
    main()
