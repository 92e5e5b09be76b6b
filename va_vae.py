"""A tokenizer whose latent is aligned with a self-supervised encoder, then a diffusion transformer.

Paper     Yao, Yang, Wang. Reconstruction vs. Generation: Taming Optimization Dilemma in Latent
          Diffusion Models. arXiv:2501.01423v3 (VA-VAE, LightningDiT)
          Rombach et al. Latent Diffusion Models. arXiv:2112.10752v2 (LDM: the tokenizer)
Here      Eq. 1 Tokenizer.project, 2-3 vf_loss, 4-5 adaptive_weight: train_tokenizer;
          LightningDiT, its direction loss lightning_loss, shift and interval sample_euler: train
Changed   latents are sampled anew from the images at each step, not stored once; where flip is on,
          channel_statistics sees mirrored images, too; the teacher's images are resized bicubic,
          antialiased, with its mean and std (code: bilinear, not, [-1, 1]); --sample draws classes
          in turn (code: at random); |v_hat| counts as at least 0.1 in the direction loss: else 1e8
          is the first gradient; centre crops (code: random in the tokenizer); guidance on all
          channels (code: 3); the stages of the VF loss: one run, one Adam and discriminator; an EMA
          of the tokenizer, but in paper*; narrow GroupNorms have fewer than 32 groups; bfloat16 in
          the tokenizer, too; BatchNorm without averages; rotation of channels (i, i + D / 2).
          Default: L1, no LPIPS (VGG is a download), no GAN
Left out  projection of the teacher to the latent (not its default); the output variance that LDM's
          optimizer does not hold; dopri5; uniform t late in 800 epochs; teachers SAM and CLIP
Notation  x   image, (B, 3, S, S) in [-1, 1]         z   latent, (B, d, h, w); *_hat  by a network
          f   teacher's tokens, (B, N, D_f), N = h w z_prime  W z, as tokens (B, N, D_f)
          x0  noise, like the latent                 t   0 = noise ... 1 = data, float32 (B,)
          x1  latent, normalised by channel          xt  between them, at t; v  the velocity
          y   class, int64 (B,); `classes` = none    D   width of the transformer
Run       python va_vae.py                        # accuracy 0.774 of the judge, 5 min, 2 CPU cores
          python va_vae.py --preset cifar10       # not measured; its teacher first: see PRESETS
          torchrun --nproc-per-node 8 va_vae.py --preset paper --data <folder>        # not measured
"""
import copy
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import distributed as dist, nn

from common import (RANK, WORLD, autocast, batch, due, ema_update, explain, fail, gather,
                    load_checkpoint, load_encoder, load_images, log, mix, parallel, parse_config,
                    save_grid, save_npz, setup, shares, steps, to_uint8)

# ---- config ----------------------------------------------------------------------------

def numbers(text):
    """Numbers of a flag such as --widths 32,64: list of floats, empty for an empty text."""
    return [float(word) for word in text.split(",") if word.strip()]

@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = ""  # cifar10 | paper | paper-b; a flag beats its preset
    out: str = ""  # run folder; empty: runs/va_vae or runs/va_vae-<preset>
    fresh: bool = False  # start over instead of continuing the run in the folder
    seed: int = 0  # of weights, data order and noise
    device: str = "auto"  # auto | cuda | mps | cpu
    precision: str = "auto"  # auto | bf16 | fp32; auto: bf16 where the device is fast at it
    compile: str = "off"  # auto | on | off: of the transformer alone; no gain for short runs
    data: str = "shapes"  # shapes | folder or .tar of class sub-folders | torch/... hfds/... (timm)
    image_size: int = 16  # side S in pixels; larger images are cropped and resized
    flip: bool = False  # mirror half of the images, in the last stage only
    skip_bad: bool = False  # leave out images that cannot be read
    batch_size: int = 64  # images per step of the transformer, summed over all GPUs
    steps: int = 3000  # optimizer steps of the transformer
    lr: float = 1e-3  # of the transformer: AdamW, betas (0.9, 0.95), no decay, constant
    ema_decay: float = 0.99  # of the transformer that is sampled
    log_every: int = 100  # steps between two lines in metrics.jsonl
    save_every: int = 1500  # steps between two checkpoints
    sample_every: int = 1500  # steps between two sample grids
    encoder: str = "assets/teacher.safetensors"  # frozen teacher: such a file, or timm:<name>
    sample: str = ""  # draw from this checkpoint instead of training
    n: int = 80  # how many images --sample draws
    npz: bool = False  # --sample also writes them as ADM's evaluation format
    latent_dim: int = 16  # channels d of the latent
    widths: str = "16,32,64"  # channels of each level of the tokenizer; the side halves in between
    blocks: int = 1  # residual blocks per level of the encoder; one more in the decoder
    tokenizer_steps: int = 3000  # optimizer steps of the tokenizer
    tokenizer_batch_size: int = 16  # images per step of the tokenizer, summed over all GPUs
    tokenizer_lr: float = 2e-3  # Adam, betas (0.5, 0.9), constant; also of the discriminator
    tokenizer_ema: float = 0.99  # of the tokenizer that encodes and decodes (paper: 0, none)
    kl: float = 1e-6  # weight of the KL term; it and the reconstruction are sums over an image
    perceptual: str = "none"  # none | lpips: added to L1 at every pixel; lpips downloads VGG
    gan: float = 0.0  # weight of the adversarial loss; 0: no discriminator
    gan_start: int = 2501  # step that begins it; the code's 5001 counts both optimizers
    vf: str = "both"  # both | mcos | mdms | none: terms of the VF loss
    vf_stages: str = "4,1,1"  # relative lengths of the stages of training, for the next three
    w_hyper: str = "0.5,0.1,0.1"  # norm of the VF gradient, in those of the reconstruction
    m1: str = "0,0,0.5"  # margin of mcos
    m2: str = "0,0,0.25"  # margin of mdms
    dim: int = 128  # width of the transformer
    depth: int = 6  # its blocks
    heads: int = 4  # attention heads; dim / heads is a multiple of 4, for the rotation
    sampling_steps: int = 50  # Euler steps
    shift: float = 0.3  # below 1: more of them near the noise; training has no shift
    guidance: float = 2.0  # classifier-free guidance; 1: off
    guidance_low: float = 0.1  # guidance acts from this t on
    guidance_channels: int = 0  # first channels of the latent that it acts on; 0: all (code: 3)

    def __post_init__(self):
        widths, S, heads = numbers(self.widths), self.image_size, max(1, self.heads)
        lists = [numbers(text) for text in (self.vf_stages, self.w_hyper, self.m1, self.m2)]
        for ok, message in (
                (min(self.latent_dim, self.blocks, self.dim, self.depth, self.heads,
                     self.sampling_steps, self.tokenizer_steps, self.tokenizer_batch_size) > 0,
                 "latent_dim, blocks, dim, depth, heads, all steps, batch sizes: at least 1"),
                (0 <= min(self.lr, self.kl, self.tokenizer_lr, self.gan, self.guidance) < math.inf,
                 "lr, kl, tokenizer_lr, gan and guidance must not be negative"),
                (0 <= self.ema_decay < 1 > self.tokenizer_ema >= 0, "need 0 <= tokenizer_ema < 1 "
                 "and 0 <= ema_decay < 1"),
                (widths and all(w > 0 == w % 4 for w in widths), "widths: multiples of 4"),
                (S % 2 ** (len(widths) - 1) == 0 and S >= 24 * (self.gan > 0),
                 f"image_size {S}: divisible by 2 for every width but one; with gan at least 24"),
                (len({len(v) for v in lists}) == 1 and min(lists[0] + lists[1], default=0) > 0
                 and min(lists[2] + lists[3]) >= 0, "vf_stages, w_hyper, m1 and m2 need as many "
                 "numbers each, of the first two positive, of the margins not negative"),
                (self.dim % heads == self.dim // heads % 4 == 0, "dim / heads: a multiple of 4"),
                (0 <= self.guidance_channels <= self.latent_dim and self.shift > 0,
                 "need shift > 0 and guidance_channels in 0 ... latent_dim")):
            if not ok:
                raise ValueError(message)

PAPER = dict(  # f16d32, DINOv2-L, LightningDiT-XL/1, 64 epochs of ImageNet 256; tokenizer 130
    compile="auto", data="data/imagenet", image_size=256, flip=True, batch_size=1024,
    steps=80_000, lr=2e-4, ema_decay=0.9999, log_every=100, save_every=5000, sample_every=20_000,
    encoder="timm:vit_large_patch14_dinov2.lvd142m", latent_dim=32, widths="128,128,256,256,512",
    blocks=2, tokenizer_steps=650_000, tokenizer_batch_size=256, tokenizer_lr=1e-4,
    tokenizer_ema=0.0, perceptual="lpips", gan=0.5, vf_stages="100,15,15",  # paper: 125 epochs
    dim=1152, depth=28, heads=16, sampling_steps=249, guidance=10.0, guidance_channels=3)
PRESETS = {
    "cifar10": dict(  # simsiam.py --data torch/cifar10 --steps 20000 --out runs/teacher-cifar10
        compile="auto", data="torch/cifar10", image_size=32, flip=True, batch_size=256, lr=5e-4,
        steps=20_000, sample_every=5000, encoder="runs/teacher-cifar10/teacher.safetensors",
        widths="64,128,256", blocks=2, gan=0.5, dim=384, depth=12, heads=6, tokenizer_steps=10_000,
        tokenizer_batch_size=128, tokenizer_lr=3e-4),
    "paper": PAPER,
    "paper-b": PAPER | dict(  # Tab. 2, 4, code: LightningDiT-B, 160 epochs; tokenizer 50
        steps=200_000, tokenizer_steps=250_000, vf_stages="1", w_hyper="0.1", m1="0.5", m2="0.25",
        dim=768, depth=12, heads=12, shift=1.0, guidance=1.0, guidance_channels=0),
}
SAMPLING = ("sampling_steps", "shift", "guidance", "guidance_low", "guidance_channels")

# ---- data ------------------------------------------------------------------------------

def held_out_images(cfg, device, n=256):
    """This rank's part of at most n images that are not trained on, float32 (B, 3, S, S)."""
    cfg = dataclasses.replace(cfg, flip=False, seed=0, batch_size=n // WORLD * WORLD)
    data = load_images(cfg, device, "validation", n)
    size = max(1, min(n, data.size) // WORLD) * WORLD
    return batch(data, dataclasses.replace(cfg, batch_size=size), device, 0)[0]

# ---- model -----------------------------------------------------------------------------

def norm(channels):
    """GroupNorm of at least four channels a group, at most 32 groups."""
    groups = next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)

class VAEAttention(nn.Module):
    """Residual self-attention of one head over the positions of a feature map."""
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
    def forward(self, x):  # (B, C, H, W) -> the same
        qkv = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b 1 (h w) c", three=3)
        a = F.scaled_dot_product_attention(*qkv)  # (B, 1, H W, C)
        return x + self.proj(rearrange(a, "b 1 (h w) c -> b c h w", h=x.shape[2]))

class VAEBlock(nn.Module):
    """Residual block of LDM's autoencoder: norm, SiLU, convolution, twice; attention if asked."""
    def __init__(self, c_in, c_out, attend=False):
        super().__init__()
        self.body = nn.Sequential(norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1),
                                  norm(c_out), nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = VAEAttention(c_out) if attend else nn.Identity()
    def forward(self, x):  # (B, C, H, W) -> (B, C', H, W)
        return self.attention(self.skip(x) + self.body(x))

def conv_encoder(latent_dim, widths, blocks):
    """Images (B, 3, S, S) -> mean and log variance, 2 d channels, side S / 2^(levels - 1)."""
    c, layers = widths[0], [nn.Conv2d(3, widths[0], 3, padding=1)]
    for level, width in enumerate(widths, 1):
        last = level == len(widths)
        layers += [VAEBlock(width if i else c, width, last) for i in range(blocks)]
        c = width
        layers += [] if last else [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2)]
    layers += [VAEBlock(c, c, True), VAEBlock(c, c), norm(c), nn.SiLU()]
    conv_out = nn.Conv2d(c, 2 * latent_dim, 3, padding=1)  # [-2]: the VF loss is weighted here
    return nn.Sequential(*layers, conv_out, nn.Conv2d(2 * latent_dim, 2 * latent_dim, 1))

def conv_decoder(latent_dim, widths, blocks):
    """Latents (B, d, h, w) -> images (B, 3, S, S), not clipped."""
    c, layers = widths[-1], [nn.Conv2d(latent_dim, latent_dim, 1)]
    layers += [nn.Conv2d(latent_dim, c, 3, padding=1), VAEBlock(c, c, True), VAEBlock(c, c)]
    for level, width in reversed(list(enumerate(widths, 1))):
        first = level == len(widths)
        layers += [] if first else [nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)]
        layers += [VAEBlock(width if i else c, width, first) for i in range(blocks + 1)]
        c = width
    conv_out = nn.Conv2d(c, 3, 3, padding=1)  # [-1]: the adversarial loss is weighted here
    return nn.Sequential(*layers, norm(c), nn.SiLU(), conv_out)

class Tokenizer(nn.Module):
    """KL autoencoder of LDM, and W of Eq. 1. encode and decode normalise channels, forward not."""
    def __init__(self, latent_dim, widths, blocks, teacher_dim=0):
        super().__init__()
        self.encoder = conv_encoder(latent_dim, widths, blocks)
        self.decoder = conv_decoder(latent_dim, widths, blocks)
        self.project = nn.Conv2d(latent_dim, teacher_dim, 1, bias=False) if teacher_dim else None
        self.register_buffer("shift", torch.zeros(latent_dim, 1, 1))
        self.register_buffer("scale", torch.ones(latent_dim, 1, 1))
    def posterior(self, x):
        """Mean, log variance and one sample of q(z | x): (B, d, h, w) each, float32."""
        mean, log_var = self.encoder(x).float().chunk(2, 1)
        log_var = log_var.clamp(-30, 20)
        return mean, log_var, mean + (log_var / 2).exp() * torch.randn_like(mean)
    def forward(self, x):
        """x_hat, like x; KL(q(z | x) | N(0, 1)), a sum, mean over the batch; z_prime or None."""
        mean, log_var, z = self.posterior(x)
        kl = (mean.square() + log_var.exp() - 1 - log_var).flatten(1).sum(1).mean() / 2
        z_prime = self.project(z).float().flatten(2).mT if self.project else None  # Eq. 1
        return self.decoder(z).float(), kl, z_prime
    def encode(self, x):
        return (self.posterior(x)[2] - self.shift) / self.scale  # a sample, as the paper's latents
    def decode(self, z):
        return self.decoder(z * self.scale + self.shift).float()

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

class LightningDiT(nn.Module):
    """DiT with RMSNorm, SwiGLU, rotary positions, adaLN-Zero; one token a position of the latent.
    xt, t and y -> v_hat, zero at initialisation. Takes the norms of q and k out of Attention."""
    def __init__(self, side, latent_dim, classes, dim, depth, heads):
        super().__init__()
        self.side, self.classes = side, classes
        self.embed = nn.Linear(latent_dim, dim)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)  # the last one: no class
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        for block in self.blocks:  # no norms of q and k in the paper; long runs may need them
            block.attention.q_norm = block.attention.k_norm = nn.Identity()
        self.norm, self.modulation = RMSNorm(dim), nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, latent_dim)
        self.register_buffer("position", position_table(side, dim), persistent=False)
        self.register_buffer("rotary", rotary_table(side, dim // heads, 0), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.time[0].weight, self.time[2].weight, self.label.weight):
            nn.init.normal_(weight, std=0.02)
        for module in (*[block.modulation for block in self.blocks], self.modulation, self.head):
            nn.init.zeros_(module.weight)
    def forward(self, xt, t, y):  # (B, d, h, w), (B,), (B,) -> (B, d, h, w)
        c = F.silu(self.time(time_features(t)) + self.label(y))  # (B, D); t is not scaled
        tokens = self.embed(rearrange(xt, "b d h w -> b (h w) d")) + self.position  # (B, N, D)
        for block in self.blocks:
            tokens = block(tokens, c, self.rotary)
        shift, scale = self.modulation(c)[:, None].chunk(2, -1)
        tokens = self.head(self.norm(tokens) * (1 + scale) + shift)
        return rearrange(tokens, "b (h w) d -> b d h w", h=self.side)

# ---- method ----------------------------------------------------------------------------

def load_lpips(device):
    """LPIPS with VGG, (B, 3, S, S) twice -> (B, 1, 1, 1), from a package only this needs."""
    with explain("--perceptual lpips", Exception):  # not installed, or VGG cannot be downloaded
        import lpips
        return lpips.LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)

def reconstruction_loss(x_hat, x, lpips=None):
    """|x_hat - x| and, at every pixel and channel, LPIPS: summed over an image, mean. Scalar."""
    error = (x_hat - x).abs() + (lpips(x_hat, x) if lpips else 0)
    return error.flatten(1).sum(1).mean()

def vf_loss(z_prime, f, m1, m2, terms="both"):
    """mcos + mdms, or one of them, of tokens (B, N, D_f): cosines of positions i, j of one image to
    the teacher's and among each other, less margins. Scalar; outside autocast, in float32."""
    z, f = F.normalize(z_prime, dim=-1), F.normalize(f, dim=-1)
    mcos = F.relu(1 - m1 - (z * f).sum(-1)).mean()  # Eq. 2, mean over i
    mdms = F.relu((z @ z.mT - f @ f.mT).abs() - m2).mean()  # Eq. 3 prints z for z' here
    return {"both": mcos + mdms, "mcos": mcos, "mdms": mdms}[terms]

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

def lightning_loss(net, x1, y, t):
    """(v_hat - v)^2, mean, and 1 - cos(v_hat, v) over channels, mean over positions. Scalars."""
    x0, t = torch.randn_like(x1), t.view(-1, 1, 1, 1)
    xt = t * x1 + (1 - t) * x0
    v = x1 - x0
    v_hat = net(xt, t.flatten(), y).float()  # float32 again: only the net runs in bf16
    u = v_hat / v_hat.norm(dim=1, keepdim=True).clamp(min=0.1)  # see Changed
    return (v_hat - v).square().mean(), 1 - (u * F.normalize(v, dim=1)).sum(1).mean()

def guided_velocity(net, xt, t, y, guidance, channels=0):
    """v_null + guidance (v_y - v_null) in the first channels (0: all), v_y in the others."""
    if guidance == 1:
        return net(xt, t, y).float()
    both = torch.cat([y, torch.full_like(y, net.classes)])
    v, v_null = net(xt.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
    k = channels or xt.shape[1]
    return torch.cat([(v_null + guidance * (v - v_null))[:, :k], v[:, k:]], 1)

@torch.no_grad()
def sample_euler(net, noise, y, sampling_steps=249, shift=0.3, guidance=1.0, low=0.0, channels=0):
    """dxt/dt = v from t = 0 to 1 by Euler steps between shifted times. Like noise, float32."""
    u = torch.linspace(0, 1, sampling_steps + 1, dtype=torch.float64)
    xt, times = noise, (shift * u / (1 + (shift - 1) * u)).tolist()
    for t, t_next in zip(times, times[1:]):
        g = guidance if t >= low else 1.0
        xt = xt + (t_next - t) * guided_velocity(net, xt, xt.new_full((len(y),), t), y, g, channels)
    return xt

# ---- train -----------------------------------------------------------------------------

def grid_side(cfg):
    """Side h = w of the latent."""
    return cfg.image_size // 2 ** (len(numbers(cfg.widths)) - 1)

def build(cfg, classes, teacher_dim=0):
    """Transformer and tokenizer of this config, untrained."""
    net = LightningDiT(grid_side(cfg), cfg.latent_dim, classes, cfg.dim, cfg.depth, cfg.heads)
    return net, Tokenizer(cfg.latent_dim, [*map(int, numbers(cfg.widths))], cfg.blocks, teacher_dim)

def vf_setting(cfg, step):
    """w_hyper, m1 and m2 at a step of the tokenizer: floats of the stage it falls into."""
    lengths = numbers(cfg.vf_stages)
    stage = sum(step * sum(lengths) >= cfg.steps * sum(lengths[:i]) for i in range(1, len(lengths)))
    return [numbers(text)[stage] for text in (cfg.w_hyper, cfg.m1, cfg.m2)]

@torch.no_grad()
def reconstruct(tokenizer, x, cfg, device):
    """x_hat of x (n, 3, S, S) from sampled latents, clipped, and its PSNR in dB, mean over n."""
    with autocast(cfg, device):
        x_hat = torch.cat([tokenizer(part)[0] for part in x.split(64)]).clamp(-1, 1)
    return x_hat, 10 * (4 / (x_hat - x).square().flatten(1).mean(1)).log10().mean().item()

def train_tokenizer(cfg, model, teacher, data, held_out, device):
    """First stage, a run of its own in <out>/tokenizer: the EMA of the tokenizer."""
    cfg = dataclasses.replace(
        cfg, out=f"{cfg.out}/tokenizer", batch_size=cfg.tokenizer_batch_size, compile="off",
        steps=cfg.tokenizer_steps, lr=cfg.tokenizer_lr, ema_decay=cfg.tokenizer_ema, flip=False)
    setup(cfg, "steps")  # the stages of the VF loss depend on it
    data = load_images(cfg, device, "train") if data.images is None else data  # own batch size
    if data.size < cfg.batch_size:
        fail(f"--tokenizer-batch-size {cfg.batch_size} is larger than the {data.size} images")
    lpips = load_lpips(device) if cfg.perceptual == "lpips" else None
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opt = torch.optim.Adam(model.parameters(), cfg.lr, (0.5, 0.9), fused=True)
    net, state = parallel(model, cfg, device), {"model": model, "ema": ema, "opt": opt, "found": {}}
    if cfg.gan:
        critic = PatchGAN().to(device)
        critic_opt = torch.optim.Adam(critic.parameters(), cfg.lr, (0.5, 0.9), fused=True)
        critic_net = parallel(critic, cfg, device)
        state |= {"critic": critic, "critic_opt": critic_opt}

    for step in steps(cfg, state):
        x, _ = batch(data, cfg, device, step)  # (B, 3, S, S) in [-1, 1]
        with autocast(cfg, device):
            x_hat, kl, z_prime = net(x)
        rec = reconstruction_loss(x_hat, x, lpips)
        loss, values = rec + cfg.kl * kl, {"rec": rec / x[0].numel(), "kl": kl}
        if teacher:
            with torch.no_grad(), autocast(cfg, device):
                f = teacher(x).float()  # (B, N, D_f)
            w_hyper, m1, m2 = vf_setting(cfg, step)
            vf = vf_loss(z_prime, f, m1, m2, cfg.vf)  # mcos + mdms
            w_adapt = adaptive_weight(rec, vf, model.encoder[-2].weight, ceiling=1e8)  # Eq. 4
            loss = loss + w_hyper * w_adapt * vf  # Eq. 5
            values |= {"vf": vf, "w_vf": w_hyper * w_adapt}
            values["cos"] = F.cosine_similarity(z_prime, f, dim=-1).mean()
        if cfg.gan and step + 1 >= cfg.gan_start:
            critic.requires_grad_(False)
            with autocast(cfg, device):
                adversarial = hinge_generator(critic(x_hat))
            w_gan = adaptive_weight(rec, adversarial, model.decoder[-1].weight)
            loss = loss + cfg.gan * w_gan * adversarial
        loss.backward()
        grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        opt.step()
        opt.zero_grad()
        if cfg.gan and step + 1 >= cfg.gan_start:
            critic.requires_grad_(True)
            with autocast(cfg, device):
                hinge = hinge_discriminator(critic_net(x), critic_net(x_hat.detach()))
            hinge.backward()
            critic_opt.step()
            critic_opt.zero_grad()
        ema_update(ema, model, cfg.ema_decay, step)
        if due(cfg, cfg.sample_every, step):
            seen, state["found"]["psnr"] = reconstruct(ema, held_out, cfg, device)
            save_grid(torch.cat([held_out[:8], seen[:8]]),
                      f"{cfg.out}/samples_{step + 1:07d}.png", columns=8)
        log(cfg, state, step, loss=loss, grad_norm=grad_norm, **values, **state["found"])
    ema.project = None  # only the VF loss needs it
    return ema

@torch.no_grad()
def channel_statistics(tokenizer, data, cfg, device, n=10_000):
    """Set shift and scale from the sampled latents of n images or an epoch, all ranks together."""
    torch.manual_seed(mix(cfg.seed, 1, RANK))
    count = max(1, int(min(data.size, n)) // cfg.batch_size)
    with autocast(cfg, device):
        z = torch.cat([tokenizer.encode(batch(data, cfg, device, i)[0]) for i in range(count)])
    moments = torch.stack([z, z.square()]).mean((1, 3, 4)) / WORLD  # (2, d)
    dist.all_reduce(moments) if WORLD > 1 else None
    mean, square = moments[:, :, None, None]
    tokenizer.shift.copy_(mean)
    tokenizer.scale.copy_((square - mean.square()).sqrt())
    vars(data).pop("iterator", None)  # a streamed set starts anew

@torch.no_grad()
def draw(net, tokenizer, y, cfg, device, generator):
    """Samples of classes y (B,), float32 (B, 3, S, S) in [-1, 1]; noise comes from generator."""
    noise = torch.randn(len(y), cfg.latent_dim, net.side, net.side, generator=generator).to(device)
    with autocast(cfg, device):
        x1 = sample_euler(net, noise, y.to(device), cfg.sampling_steps, cfg.shift, cfg.guidance,
                          cfg.guidance_low, cfg.guidance_channels)
        return tokenizer.decode(x1).clamp(-1, 1)

def train(cfg):
    device = setup(cfg)
    if cfg.fresh and RANK == 0:
        Path(cfg.out, "last.pt").unlink(missing_ok=True)  # the first stage comes before it
    data, held_out = load_images(cfg, device, "train"), held_out_images(cfg, device)
    teacher = cfg.vf != "none" and load_encoder(cfg.encoder, grid_side(cfg)).to(device)
    torch.manual_seed(cfg.seed)  # load_encoder drew numbers; plain or aligned, weights start alike
    model, tokenizer = build(cfg, data.classes, teacher.dim if teacher else 0)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model, tokenizer = model.to(device), tokenizer.to(device, memory_format=layout)
    tokenizer = train_tokenizer(cfg, tokenizer, teacher, data, held_out, device)
    channel_statistics(tokenizer, data, cfg, device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # for sampling; not compiled or wrapped
    opt = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, 0.95), weight_decay=0, fused=True)
    net = parallel(model, cfg, device)
    state = dict(model=model, ema=ema, opt=opt, tokenizer=tokenizer, classes=data.classes)
    seen, _ = reconstruct(tokenizer, held_out, cfg, device)

    for step in steps(cfg, state):
        x, y = batch(data, cfg, device, step)  # (B, 3, S, S) in [-1, 1], (B,)
        y = torch.where(torch.rand(len(y), device=device) < 0.1, data.classes, y)
        t = torch.randn(len(y), device=device).sigmoid()  # logit-normal
        with autocast(cfg, device):
            x1 = tokenizer.encode(x)  # (B, d, h, w); its parameters take no gradient
            mse, direction = lightning_loss(net, x1, y, t)
        (mse + direction).backward()
        grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        opt.step()
        opt.zero_grad()
        ema_update(ema, model, cfg.ema_decay, step)
        log(cfg, state, step, loss=mse, direction=direction, grad_norm=grad_norm)
        if due(cfg, cfg.sample_every, step):  # a row: two images, reconstructed; eight samples
            K, generator = min(data.classes, 10), torch.Generator().manual_seed(0)
            y = torch.arange(K).repeat_interleave(8)
            images = draw(ema, tokenizer, y, cfg, device, generator).unflatten(0, (K, 8))
            pairs = torch.stack([held_out, seen], 1)[torch.arange(2 * K) % len(seen)]
            save_grid(torch.cat([pairs.view(K, 4, *x.shape[1:]), images], 1).flatten(0, 1),
                      f"{cfg.out}/samples_{step + 1:07d}.png", columns=12)

def sample(cfg):
    """Draw cfg.n images from cfg.sample, image i of class i mod classes; the PNG shows ten."""
    device, saved = setup(cfg), load_checkpoint(cfg.sample, "ema", "tokenizer", "classes")
    net, tokenizer = build(cfg, saved["classes"])
    net.load_state_dict(saved["ema"])
    tokenizer.load_state_dict(saved["tokenizer"])
    net, tokenizer = (m.to(device).eval().requires_grad_(False) for m in (net, tokenizer))
    y = torch.arange(cfg.n) % saved["classes"]
    images = gather([(i, to_uint8(draw(net, tokenizer, y[i], cfg, device, generator)))
                     for i, generator in shares(cfg.n, 100, cfg.seed)])
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
