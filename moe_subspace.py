"""A mixture of subspaces: the exact score is a gated mixture of experts, small latent networks.

Paper     Yang, Li, Jiang, Chen, Li. Multi-Subspace Multi-Modal Modeling for Diffusion Models:
          Estimation, Convergence and Mixture of Experts. arXiv:2601.01475v1
Here      data model, exact score MoLRMoG; the latent network MoGExperts (MoLRG: gauss); encoder,
          gate and decoder MoESubspaceDenoiser; Fig. 5 ExpertVAEs and --unified, one for all
          (1) log q_kl = log pi_kl + log N(z_k; s mu_kl, C_kl),  C = s^2 Sigma + g2 I
          (2) z_hat_k = sum_l softmax_l(log q_kl) [mu_kl + s Sigma C^-1 (z_k - s mu_kl)]
          (3) G_k = log w_k + log sum_l q_kl + |z_k|^2 / (2 g2) + d_k / 2 log(2 pi g2)
          (4) E[x0 | x] = c + s eta^2 / g2 (x - s c),  c = sum_k softmax_k(G) A_k z_hat_k
          (5) log p_t(x) = log sum_k exp(G_k) - |x|^2 / (2 g2) - D / 2 log(2 pi g2)
          (6) grad log p_t(x) = (s E[x0 | x] - x) / gamma^2  (Tweedie)
Changed   (1) to (6) are derived anew, numbers are ours: we read a transcription of the paper, with
          mu for A mu and two residuals swapped. Covariances are tau^2 I + V lam V^T, V^T V = I:
          with --rank 0, and so one tau an expert, its network is linear, softmax, linear; the
          default, rank 4, has quadratic logits. Noise eta off the subspaces.
          How the paper trains is not known: EM, then a loss of weight 1 + 1 / sigma^2, on latents
          that each expert scales to mean square 1; images: s = 1 only (VE)
Left out  a gate over VAEs: k is the label there, and the default run has none; ImageNet, LoRA, a
          fine-tuned VAE; the bounds
Notation  x0  data, (B, D)                      x      s x0 + gamma e, noisy
          A   bases of K subspaces, D x d_k     z      A^T x or a VAE's code, (B, K, d)
          w   shares of the subspaces, (K,)     G      logits of the gate, (B, K)
          pi  shares of m = n_k modes, (K, m)   mu     their means, (K, m, d)
          V   directions of a mode, (d, r)      lam    variances along them, beyond tau^2
          U   any root of Sigma = U U^T         d      d_k, or the largest: the rest is zeros
          g2  gamma^2 + s^2 eta^2               sigma  gamma / s: falls from noise to data
          *_hat  posterior mean
Run       python moe_subspace.py      # accuracy 0.867 of the judge, 73 s, 1 CPU core, busy
          python moe_subspace.py --preset cifar10                       # not measured
          torchrun --nproc-per-node 4 moe_subspace.py --preset cifar10  # not measured
"""
import copy
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import (RANK, WORLD, autocast, due, ema_update, fail, gather, load_checkpoint,
                    load_images, log, mix, parallel, parse_config, save_grid, save_npz, setup,
                    shares, steps, to_uint8)

# ---- config ----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = ""  # cifar10 | paper; a flag beats its preset
    out: str = ""  # run folder; empty: runs/moe_subspace or runs/moe_subspace-<preset>
    fresh: bool = False  # start over instead of continuing the run in the folder
    seed: int = 0  # of weights, data order, clusters and noise
    device: str = "auto"  # auto | cuda | mps | cpu
    precision: str = "auto"  # auto | bf16 | fp32: of the VAEs; densities stay in float32
    compile: str = "auto"  # auto | on | off: of the VAEs; takes half a minute
    data: str = "shapes"  # shapes | folder or .tar of class sub-folders | torch/... hfds/... (timm)
    image_size: int = 16  # side S in pixels; larger images are cropped and resized
    skip_bad: bool = False  # leave out images that cannot be read
    batch_size: int = 320  # images per step, summed over all GPUs; with VAEs as many of each expert
    steps: int = 2000  # optimizer steps of the last stage
    lr: float = 3e-3  # Adam, of the score networks, cosine to 0
    ema_decay: float = 0.99  # of the weights that are sampled, in both stages
    log_every: int = 100  # steps between two lines in metrics.jsonl
    save_every: int = 1000  # steps between two checkpoints
    sample_every: int = 1000  # steps between two sample grids
    sample: str = ""  # draw from this checkpoint instead of training
    n: int = 80  # how many images --sample draws
    npz: bool = False  # --sample also writes them as ADM's evaluation format
    projection: str = "vae"  # vae | linear: encoder and decoder (as in experiments, in theory)
    clusters: int = 0  # experts for clusters that K-subspaces finds; 0: one expert a class
    unified: bool = False  # one VAE for all experts, the control of Fig. 5
    latent_dim: int = 16  # d
    vae_steps: int = 2000  # optimizer steps of the first stage
    vae_channels: int = 32  # of the hidden feature maps of one VAE; half as many at size S / 2
    vae_dir: str = ""  # folder of the first stage, which runs may share; empty: <out>/vae
    expert: str = "mog"  # mog | gauss | mlp: latent score; gauss is MoLRG, mlp has no density
    modes: int = 8  # n_k of mog (paper: 4, 8 and 40)
    rank: int = 4  # of a mode's covariance beside tau^2 I; 0, one tau: two-layer softmax network
    width: int = 64  # of the two hidden layers of mlp
    gate: str = "soft"  # soft | label | top1: of linear experts, in training and sampling
    learn_subspaces: bool = False  # train linear bases, too; wants lr / 10
    sampler: str = "expert"  # expert | gated: choose k, then its latent ODE; or ambient ODE, linear
    def __post_init__(self):
        linear, S, d = self.projection == "linear", self.image_size, self.latent_dim
        for ok, message in (
                (min(d, self.vae_steps, self.vae_channels, self.modes, self.width) > 0,
                 "latent_dim, vae_steps, vae_channels, modes, width: at least 1"),
                (self.lr >= 0 <= self.clusters, "lr, clusters: not negative"),
                (0 <= self.ema_decay < 1, "need 0 <= ema_decay < 1"),
                (0 <= self.rank <= d < 3 * S**2, f"need 0 <= rank <= latent_dim < {3 * S**2}"),
                (S % 4 == self.vae_channels % 2 == 0, "image_size: divisible by 4, channels: by 2"),
                (linear or (self.sampler, self.gate, self.learn_subspaces) == ("expert", "soft", 0),
                 "sampler gated, gate and learn_subspaces need projection linear"),
                (not linear or not self.unified, "unified, one VAE, needs projection vae"),
                (not linear or self.expert != "mlp" or self.gate == "label",
                 "expert mlp has no density for a gate: it needs gate label")):
            if not ok:
                raise ValueError(message)

PRESETS = {
    "cifar10": dict(data="torch/cifar10", image_size=32, batch_size=1280, steps=5000, rank=16,
                    latent_dim=64, vae_steps=20_000, vae_channels=128),
    "paper": dict(data="torch/mnist", image_size=32, batch_size=1280, steps=5000,  # as far as it
                  vae_steps=10_000, modes=4)}  # is known: a VAE a digit; n_k 4, 8 or 40
SIGMA_MIN, SIGMA_MAX, LEVELS = 0.02, 10.0, 40  # of data of mean square 1; levels of the sampler
VAE_LR, KL = 2e-3, 2e-3  # Adam, cosine to 0; 2 sd^2 is the ELBO of pixels with noise sd
VAE_FIELDS = """seed device precision compile data image_size skip_bad batch_size ema_decay
log_every save_every sample_every clusters unified latent_dim vae_channels"""

# ---- data ------------------------------------------------------------------------------

def uncentred_svd(x, d):
    """Basis of the d-dimensional subspace through 0 nearest to the rows of x (n, D): (D, d)."""
    return torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, :d]

def k_subspaces(x, K, d, restarts=10, iterations=30):
    """Assign rows of x (n, D) to the longest projection, refit, repeat; best restart: (K, D, d)."""
    found, direction = [], F.normalize(x)
    for _ in range(restarts):
        start = direction[torch.randint(len(x), (K,)).to(x.device)]  # and who is near in angle
        near = (start @ direction.T).abs().topk(2 * d).indices
        A = torch.stack([uncentred_svd(x[i], d) for i in near])
        for _ in range(iterations):
            k = (x @ A).square().sum(-1).argmax(0)  # of (K, n)
            A = torch.stack([uncentred_svd(x[k == j], d) if (k == j).sum() >= d else A[j]
                             for j in range(K)])
        found.append(((x @ A).square().sum(-1).amax(0).sum(), A))
    return max(found, key=lambda pair: pair[0])[1]

def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1

def load_experts(cfg, device):
    """Training images by expert, uint8 (N, K, 3, S, S), the first counts (K,), the rest repeats;
    mean (D,) and scale: |(x - mean) / scale|^2 is d on average; one mean: subspaces contain 0."""
    data = load_images(cfg, device, "train")
    if data.images is None:
        fail(f"--data {cfg.data}: experts need images by index, but this set is streamed")
    some = to_float(data.images[::math.ceil(data.size / 10_000)]).flatten(1)
    labels, K, mean, some = data.labels, data.classes, some.mean(0), some - some.mean(0)
    if cfg.clusters:
        torch.manual_seed(mix(cfg.seed, 1))  # on all ranks
        K, P = cfg.clusters, uncentred_svd(some, min(4 * cfg.latent_dim, len(mean)))  # for speed
        A = P @ k_subspaces(some @ P, K, cfg.latent_dim)  # (K, D, d)
        labels = torch.cat([((to_float(x).flatten(1) - mean) @ A).square().sum(-1).argmax(0)
                            for x in data.images.split(5000)])
    index = [(labels == k).nonzero()[:, 0] for k in range(K)]
    counts = torch.tensor([len(i) for i in index], device=device)
    if counts.min() == 0 or cfg.batch_size < K * WORLD:
        fail(f"{K} experts: one has no image, or --batch-size is below {K * WORLD}")
    rows = torch.arange(counts.max(), device=device)
    images = torch.stack([data.images[i[rows % len(i)]] for i in index], 1)
    return images, counts, mean, (some.square().sum(1).mean() / cfg.latent_dim).sqrt()

def expert_batch(x, counts, size):
    """About `size` of x (N, K, ...), as many of every expert: (size // K, K, ...)."""
    K = len(counts)
    row = (torch.rand(size // K, K, device=x.device) * counts).long()
    return x[row, torch.arange(K, device=x.device)]

def batch_by_share(x, counts, size):
    """`size` of x (N, K, ...), each expert as often as it has data: (size, ...) and k (size,)."""
    k = torch.multinomial(counts.float(), size, replacement=True)
    row = (torch.rand(size, device=x.device) * counts[k]).long()
    return x[row, k], k

# ---- model -----------------------------------------------------------------------------

def column(v, like, ndim):
    """A float or (B,) as (1 or B, 1, ...) with ndim dimensions, of like's kind."""
    v = v.to(like) if torch.is_tensor(v) else like.new_full((1,), v)  # new_full: no waiting
    return v.reshape(-1, *[1] * (ndim - 1))

class MoGExperts(nn.Module):
    """Posterior means of K latent mixtures of m Gaussians with covariances tau^2 I + V lam V^T,
    dims d_k, padded to d = max(dims) with zeros. Rank 0: one tau an expert, which is linear,
    softmax, linear and a scaled skip: the logits are (s / v) mu^T z - s^2 |mu|^2 / 2 v + log pi
    with v = s^2 tau^2 + g2. MoLRG: zero_mean, m = 1, rank d, linear. Buffers are not learned."""
    def __init__(self, dims, m, rank=0, zero_mean=False):
        super().__init__()
        K, d = len(dims), max(dims)
        learned = lambda yes, *size: (nn.Parameter if yes else nn.Buffer)(torch.zeros(K, *size))
        self.dims = nn.Buffer(torch.tensor(dims, dtype=torch.get_default_dtype()))
        self.mu = learned(not zero_mean, m, d)
        self.logit_pi = learned(m > 1, m)
        self.log_tau2 = learned(rank < d, m if rank else 1)
        self.V = nn.Parameter(torch.eye(d, rank).repeat(K, m, 1, 1))  # orthonormal columns
        self.log_lam = nn.Parameter(torch.zeros(K, m, rank))
    def modes(self, z, s, g2):
        """log q of each mode, (B, K, m), z (B, K, d); and what forward needs: z less the mean, its
        coordinates along V, and the variances of C off V and along V."""
        s, g2 = column(s, z, 3), column(g2, z, 3)
        u = z[:, :, None] - s[..., None] * self.mu
        p = torch.einsum("bkmd,kmdr->bkmr", u, self.V)
        off = s**2 * self.log_tau2.exp() + g2  # (B, K, m or 1)
        along = off[..., None] + s[..., None]**2 * self.log_lam.exp()  # (B, K, m, r)
        maha = u.square().sum(-1) / off - (p.square() * (1 / off[..., None] - 1 / along)).sum(-1)
        logdet = (self.dims[:, None] * (2 * math.pi * off).log()
                  + (along / off[..., None]).log().sum(-1))  # of 2 pi C; maha: u^T C^-1 u
        return self.logit_pi.log_softmax(1) - (maha + logdet) / 2, u, p, off, along  # (1)
    def forward(self, z, s, g2):  # (B, K, d), float or (B,) -> z_hat (B, K, d), log density (B, K)
        log_q, u, p, off, along = self.modes(z, s, g2)
        s, tau2 = column(s, z, 4), self.log_tau2.exp()[..., None]
        gain = s * tau2 / off[..., None]  # s Sigma C^-1 off V
        more = s * (tau2 + self.log_lam.exp()) / along - gain  # and along V
        mean = self.mu + gain * u + torch.einsum("bkmr,kmdr->bkmd", more * p, self.V)
        return (log_q.softmax(2)[..., None] * mean).sum(2), log_q.logsumexp(2)  # (2)

class MLPExperts(nn.Module):
    """z_hat = posterior mean of one Gaussian (by EM, not trained) + sigma / (1 + sigma^2) MLP_k(z):
    little is left to say at low and at high noise. Two hidden layers, 0 at first. For latents of
    mean square 1. No density."""
    def __init__(self, dims, width):
        super().__init__()
        self.gauss = MoGExperts(dims, 1, max(dims)).requires_grad_(False)
        self.body = self.network(len(dims), max(dims), width)
    def network(self, K, d, width):  # (1, K (d + 1), B) -> (1, K d, B), K groups: fast on CPUs
        a, b, c = (nn.Conv1d(K * i, K * j, 1, groups=K) for i, j in
                   ((d + 1, width), (width, width), (width, d)))
        nn.init.zeros_(c.weight)
        nn.init.zeros_(c.bias)
        return nn.Sequential(a, nn.SiLU(), b, nn.SiLU(), c)
    def forward(self, z, s, g2):  # as MoGExperts, but None for the density
        z_hat, s, v = self.gauss(z, s, g2)[0], column(s, z, 3), column(g2, z, 3)
        v = v / s**2  # of the noise in z / s
        h = torch.cat([z / s / (1 + v).sqrt(), (v.log() / 8).expand(*z.shape[:2], 1)], -1)
        h = self.body(h.flatten(1).T[None])[0].T.unflatten(1, z.shape[1:])
        return z_hat + v.sqrt() / (1 + v) * h, None

class MoESubspaceDenoiser(nn.Module):
    """E[x0 | x]: projections, latent experts, exact gate, lifts; no skip connection if eta = 0.
    A     (K, D, d), orthonormal columns, those beyond d_k zero    w       (K,), sums to 1
    gate  soft: posterior | top1: most likely | label: given       eta     std off the subspaces"""
    def __init__(self, A, experts, w, eta=0.0, gate="soft", learn=False):
        super().__init__()
        self.A, self.experts, self.gate = nn.Parameter(A, requires_grad=learn), experts, gate
        self.logit_w = nn.Parameter(w.log(), requires_grad=gate == "soft")
        self.eta2 = nn.Buffer(torch.tensor(eta**2, dtype=A.dtype, device=A.device))
    def gate_logits(self, z, log_density, g2):
        """log of w_k p(z_k) N(x - A_k z_k) less what no k changes (it returns in (5)): (B, K)."""
        return (self.logit_w.log_softmax(0) + log_density + z.square().sum(-1) / (2 * g2)
                + self.experts.dims / 2 * (2 * math.pi * g2).log())  # (3)
    def forward(self, x, s, gamma, y=None):  # (B, D), float or (B,), (B,) -> x0_hat, G (B, K)
        s, g2 = column(s, x, 2), column(gamma, x, 2)**2 + column(s, x, 2)**2 * self.eta2  # (B, 1)
        z = torch.einsum("bn,knd->bkd", x, self.A)
        z_hat, log_density = self.experts(z, s[:, 0], g2[:, 0])
        G = None if log_density is None else self.gate_logits(z, log_density, g2)
        k = y if self.gate == "label" else G.argmax(1)
        share = G.softmax(1) if self.gate == "soft" else F.one_hot(k, z.shape[1]).to(z)
        c = torch.einsum("bkd,knd->bn", share[..., None] * z_hat, self.A)  # E[A z | x]
        return c + s * self.eta2 / g2 * (x - s * c), G  # (4)

class MoLRMoG(MoESubspaceDenoiser):
    """Data sum_k w_k sum_l pi_kl N(A_k mu_kl, A_k U_kl U_kl^T A_k^T) + eta e: the exact network.
    w   (K,), sums to 1    A   list of (D, d_k), orthonormal columns, at any angles
    pi  list of (n_k,)     mu  list of (n_k, d_k)       U  list of (n_k, d_k, any rank)"""
    def __init__(self, w, A, pi, mu, U, eta=0.0):
        dims = [basis.shape[1] for basis in A]
        d, m = max(dims), max(len(p) for p in pi)
        def padded(tensors, *shape):  # (K, *shape), zeros at the ends
            return torch.stack([F.pad(v, [p for n, i in zip(shape[::-1], v.shape[::-1])
                                          for p in (0, n - i)]) for v in tensors])
        lam, V = torch.linalg.eigh(padded([root @ root.mT for root in U], m, d, d))
        experts = MoGExperts(dims, m, d).to(A[0])
        experts.load_state_dict({
            "dims": experts.dims, "mu": padded(mu, m, d), "logit_pi": padded(pi, m).log(), "V": V,
            "log_lam": lam.clamp(min=0).log(), "log_tau2": experts.log_tau2 - math.inf})
        super().__init__(padded(A, *A[0].shape[:1], d), experts, w, eta)
        self.requires_grad_(False)
    def sample(self, n, generator=None):
        """x0 (n, D), its subspace k and mode l, int64 (n,)."""
        latent, like = self.experts, dict(generator=generator, dtype=self.A.dtype)
        k = torch.multinomial(self.logit_w.softmax(0), n, True, generator=generator)
        l = torch.multinomial(latent.logit_pi[k].softmax(1), 1, generator=generator)[:, 0]
        white = (latent.log_lam[k, l] / 2).exp() * torch.randn(n, latent.V.shape[-1], **like)
        z = latent.mu[k, l] + torch.einsum("nr,ndr->nd", white, latent.V[k, l])
        x0 = self.eta2.sqrt() * torch.randn(n, self.A.shape[1], **like)
        for j, basis in enumerate(self.A):
            x0[k == j] += z[k == j] @ basis.T
        return x0, k, l
    def log_prob(self, x, s, gamma):
        """log p_t of x (B, D), s and gamma floats: (B,)."""
        g2 = gamma**2 + s**2 * self.eta2
        normal = x.square().sum(1) / g2 + x.shape[1] * (2 * math.pi * g2).log()
        return self(x, s, gamma)[1].logsumexp(1) - normal / 2  # (5)
    def score(self, x, s, gamma):
        """grad log p_t, like x (B, D); s and gamma > 0 floats."""
        return (s * self(x, s, gamma)[0] - x) / gamma**2  # (6)

class ExpertVAEs(nn.Module):
    """K convolutional VAEs side by side, each a group of channels; with K = 1 one for all."""
    def __init__(self, K, size, channels, latent_dim):
        super().__init__()
        c, side, self.K = channels, size // 4, K
        def conv(a, b, kernel, stride=1, padding=0):
            return nn.Conv2d(K * a, K * b, kernel, stride, padding, groups=K)
        self.encoder = nn.Sequential(
            conv(3, c // 2, 4, 2, 1), nn.SiLU(), conv(c // 2, c, 4, 2, 1), nn.SiLU(),
            conv(c, c, 3, 1, 1), nn.SiLU(), conv(c, 2 * latent_dim, side))
        self.decoder = nn.Sequential(
            conv(latent_dim, c * side**2, 1), nn.PixelShuffle(side), nn.SiLU(),
            conv(c, c, 3, 1, 1), nn.SiLU(), conv(c, 2 * c, 3, 1, 1), nn.PixelShuffle(2), nn.SiLU(),
            conv(c // 2, 12, 3, 1, 1), nn.PixelShuffle(2))
    def encode(self, x):  # (B, experts, 3, S, S) -> mean and log variance, (B, experts, d)
        h = self.encoder(x.reshape(-1, self.K * 3, *x.shape[3:]))
        return h.reshape(*x.shape[:2], -1).float().chunk(2, -1)
    def decode(self, z):  # (B, experts, d) -> (B, experts, 3, S, S)
        x = self.decoder(z.reshape(-1, self.K * z.shape[2], 1, 1))
        return x.reshape(*z.shape[:2], 3, *x.shape[2:]).float()
    def forward(self, x):  # -> x_hat, mean, log variance
        mean, log_var = self.encode(x)
        return self.decode(mean + (log_var / 2).exp() * torch.randn_like(mean)), mean, log_var

# ---- method ----------------------------------------------------------------------------

@torch.no_grad()
def tangent_gradient(A):
    """Project A.grad on the tangent of A^T A = I: Adam would turn the rest into a rotation of A."""
    A.grad -= A @ (A.mT @ A.grad + A.grad.mT @ A) / 2

@torch.no_grad()
def qr_retraction(A):
    """Orthonormal columns again, in place: Q of A = Q R, R_ii > 0; zero columns at the end stay."""
    Q, R = torch.linalg.qr(A)
    A.copy_(Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :])

@torch.no_grad()
def fit_em(experts, z, counts, eta=0.0, iterations=40, restarts=3, floor=1e-5):
    """k-means++ and EM on latents z (N, K, d), the first counts (K,) of each expert, which keeps
    its best restart, in place. Covariances as in probabilistic PCA, less eta^2 I of known noise."""
    K, m, d, rank = experts.V.shape
    own = (torch.arange(len(z), device=z.device)[:, None] < counts).to(z)  # (N, K): not a repeat
    free, one_tau, best = isinstance(experts.mu, nn.Parameter), rank == 0, {}
    for _ in range(restarts if m > 1 else 1):
        chance, distance, mode = own, torch.full_like(own, math.inf), torch.zeros_like(own).long()
        for l in range(m):
            index = torch.multinomial((chance + 1e-12 * own).T, 1)[:, 0]  # (K,)
            new = (z - z[index, torch.arange(K, device=z.device)]).square().sum(-1)  # (N, K)
            mode = mode.masked_fill(new < distance, l)
            distance = torch.minimum(distance, new)
            chance = distance * own
        share = F.one_hot(mode, m).to(z)  # of a point's modes, (N, K, m)
        for _ in range(iterations if m > 1 else 1):
            share = share * own[..., None]
            total = share.sum(0).clamp(min=1e-6)  # (K, m)
            mu = free * torch.einsum("nkm,nkd->kmd", share, z) / total[..., None]
            u = share[..., None].sqrt() * (z[:, :, None] - mu)  # (N, K, m, d)
            covariance = torch.einsum("nkmd,nkme->kmde", u, u) / total[..., None, None]
            lam, V = (v[..., d - rank:] for v in torch.linalg.eigh(covariance))
            rest = covariance.diagonal(dim1=2, dim2=3).sum(-1) - lam.sum(-1)  # variances off V
            if one_tau:
                rest = (total * rest).sum(1, keepdim=True) / total.sum(1, keepdim=True)
            tau2 = (rest / (experts.dims[:, None] - rank).clamp(min=1) - eta**2).clamp(min=floor)
            lam = (lam - eta**2 - tau2[..., None]).clamp(min=floor)
            now = dict(mu=mu, logit_pi=total.log(), log_tau2=tau2.log(), V=V, log_lam=lam.log())
            experts.load_state_dict(now, strict=False)
            log_q = experts.modes(z, 1.0, eta**2)[0]
            share = log_q.softmax(2)
        now["score"] = (log_q.logsumexp(2) * own).sum(0)  # (K,)
        better = now["score"] > best.get("score", -math.inf)
        best = {name: torch.where(column(better, better, v.ndim), v, best.get(name, v))
                for name, v in now.items()}
    experts.load_state_dict(best, strict=False)

def vae_loss(net, x):
    """Squared error a pixel + KL weight KL(q(z | x) | N(0, I)) / D, x (B, experts, 3, S, S)."""
    x_hat, mean, log_var = net(x)
    divergence = (mean.square() + log_var.exp() - 1 - log_var).sum(-1).mean() / 2
    return (x_hat - x).square().mean() + KL * divergence / x[0, 0].numel()

def at_random_levels(x0):
    """x0 (B, ...) + sigma e, like x0, and sigma (B,), uniform in logs."""
    sigma = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN)**torch.rand(len(x0), device=x0.device)
    return x0 + column(sigma, x0, x0.ndim) * torch.randn_like(x0), sigma

def score_matching_loss(x0_hat, x0, sigma):
    """Mean of (1 + 1 / sigma^2) (x0_hat - x0)^2, EDM's weight for data of mean square 1. Scalar.
    The score's own, 1 / sigma^4, leaves low noise ill-conditioned (as sigma^-4)."""
    return ((1 + 1 / column(sigma, x0, x0.ndim)**2) * (x0_hat - x0).square()).mean()

@torch.no_grad()
def heun_ode(denoiser, noise, levels):
    """dx / dsigma = (x - x0_hat) / sigma by Heun steps between falling levels, then x0_hat at the
    last. noise of variance 1 -> like noise; denoiser(x, sigma) -> x0_hat, sigma a float."""
    x = levels[0] * noise
    for a, b in zip(levels, levels[1:]):
        slope = (x - denoiser(x, a)) / a
        y = x + (b - a) * slope
        x = x + (b - a) * (slope + (y - denoiser(y, b)) / b) / 2
    return denoiser(x, levels[-1])

@torch.no_grad()
def draw(model, vae, frame, cfg, k, generator):
    """Images (n, 3, S, S) by experts k (n,), and k; the gated sampler returns a k of its own."""
    levels = torch.logspace(math.log10(SIGMA_MAX), math.log10(SIGMA_MIN), LEVELS).tolist()
    if cfg.sampler == "gated":
        noise = torch.randn(len(k), model.A.shape[1], generator=generator).to(k.device)
        x = heun_ode(lambda x, sigma: model(x, 1.0, sigma, k)[0], noise, levels)
        k = k if cfg.gate == "label" else model(x, 1.0, SIGMA_MIN)[1].argmax(1)
    else:
        one_hot, experts = F.one_hot(k, len(frame["share"])), model if vae else model.experts
        turn = one_hot.cumsum(0)[one_hot > 0] - 1  # (n,), among the images of its expert
        shape = int(turn.max()) + 1, one_hot.shape[1], cfg.latent_dim
        noise = torch.randn(shape, generator=generator).to(k.device)
        z = heun_ode(lambda z, sigma: experts(z, 1.0, sigma**2)[0], noise, levels)
        if vae:
            return vae.decode(z * frame["scale"])[turn, k], k
        x = torch.einsum("nd,nDd->nD", z[turn, k], model.A[k])
    return (frame["mean"] + frame["scale"] * x).unflatten(1, (3, cfg.image_size, -1)), k

# ---- train -----------------------------------------------------------------------------

def build(cfg, K):
    """Score network, and VAEs (linear: None), of this config, untrained."""
    dims, d, gauss = [cfg.latent_dim] * K, cfg.latent_dim, cfg.expert == "gauss"
    experts = (MLPExperts(dims, cfg.width) if cfg.expert == "mlp" else
               MoGExperts(dims, 1 if gauss else cfg.modes, d if gauss else cfg.rank, gauss))
    if cfg.projection == "vae":
        return experts, ExpertVAEs(1 if cfg.unified else K, cfg.image_size, cfg.vae_channels, d)
    A, w = torch.eye(3 * cfg.image_size**2, d).repeat(K, 1, 1), torch.full((K,), 1 / K)
    return MoESubspaceDenoiser(A, experts, w, 0.0, cfg.gate, cfg.learn_subspaces), None

def count_parameters(model, vae):
    """Numbers in the score network, means of zero not counted, and with the VAEs: a dict."""
    own = sum(v.numel() for v in model.parameters())
    return {"parameters": own,
            "with_vaes": own + sum(v.numel() for v in vae.parameters()) if vae else own}

def train_vaes(cfg, vae, images, counts, device):
    """First stage, a run of its own in <out>/vae or --vae-dir: the EMA of the VAEs."""
    cfg = Config(**{name: getattr(cfg, name) for name in VAE_FIELDS.split()}, steps=cfg.vae_steps,
                 rank=0, out=cfg.vae_dir or f"{cfg.out}/vae", fresh=cfg.fresh and not cfg.vae_dir)
    setup(cfg, "steps")
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    opt = torch.optim.Adam(vae.parameters(), VAE_LR)
    net, shown = parallel(vae, cfg, device), to_float(images[:4])  # (4, K, 3, S, S)
    state = {"model": vae, "ema": ema, "opt": opt}
    for step in steps(cfg, state):
        x = to_float(expert_batch(images, counts, cfg.batch_size // WORLD))
        with autocast(cfg, device):
            loss = vae_loss(net, x)
        loss.backward()
        grad_norm = nn.utils.get_total_norm([v.grad for v in vae.parameters()])
        lr = opt.param_groups[0]["lr"] = VAE_LR * (1 + math.cos(math.pi * step / cfg.steps)) / 2
        opt.step()
        opt.zero_grad()
        ema_update(ema, vae, cfg.ema_decay, step)
        log(cfg, state, step, loss=loss, lr=lr, grad_norm=grad_norm)
        if due(cfg, cfg.sample_every, step):  # a row an expert: images, then their reconstructions
            both = torch.cat([shown, ema.decode(ema.encode(shown)[0])]).transpose(0, 1)
            save_grid(both.flatten(0, 1), f"{cfg.out}/samples_{step + 1:07d}.png", columns=8)
    return ema

def encode_experts(cfg, vae, images, counts, mean, scale, device):
    """What the score network sees, and what turns it back into images: latents x0 (N, K, d), of
    mean square 1 an expert, or vectors (N, K, D); and shares, mean and scale, a dict."""
    if vae:
        with torch.no_grad(), autocast(cfg, device):
            x0 = torch.cat([vae.encode(to_float(x))[0] for x in images.split(500)])
        own = torch.arange(len(x0), device=device)[:, None] < counts  # (N, K): not a repeat
        scale = ((x0.square().mean(2) * own).sum(0) / counts).sqrt()[:, None]
        x0 = x0 / scale
    else:
        x0 = (to_float(images).flatten(2) - mean) / scale
    return x0, {"share": counts / counts.sum(), "mean": mean, "scale": scale}

@torch.no_grad()
def start_from_data(cfg, model, x0, counts):
    """Bases by SVD, eta from what they leave, shares by counting, modes by EM; in place."""
    experts, z, eta = model, x0, 0.0
    if cfg.projection == "linear":
        for k, count in enumerate(counts.tolist()):
            model.A[k] = uncentred_svd(x0[:count, k], cfg.latent_dim)
        experts, z = model.experts, torch.einsum("nkD,kDd->nkd", x0, model.A)
        own = torch.arange(len(x0), device=x0.device)[:, None] < counts
        rest = ((x0.square().sum(2) - z.square().sum(2)) * own).sum() / counts.sum()
        eta = model.eta2.copy_(rest / (x0.shape[2] - cfg.latent_dim)).sqrt().item()
        model.logit_w.copy_(counts.log())
    torch.manual_seed(mix(cfg.seed, 2))  # on all ranks
    fit_em(experts.gauss if cfg.expert == "mlp" else experts, z, counts, eta)

def train(cfg):
    device = setup(cfg, "steps")  # the cosine depends on it
    if cfg.fresh and RANK == 0:
        Path(cfg.out, "last.pt").unlink(missing_ok=True)  # the first stage comes before it
    images, counts, mean, scale = load_experts(cfg, device)
    model, vae = (net and net.to(device) for net in build(cfg, len(counts)))
    if vae:
        vae = train_vaes(cfg, vae, images, counts, device)
    torch.set_float32_matmul_precision("highest")  # densities: differences of large numbers
    x0, frame = encode_experts(cfg, vae, images, counts, mean, scale, device)
    start_from_data(cfg, model, x0, counts)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    learned = {name: v for name, v in model.named_parameters() if v.requires_grad}
    bases = [name for name in learned if name.endswith(("A", "V"))]  # with orthonormal columns
    opt = torch.optim.Adam(learned.values(), cfg.lr)
    net = parallel(model, dataclasses.replace(cfg, compile="off"), device)  # seconds of work
    state = {"model": model, "ema": ema, "opt": opt, "frame": frame,
             "vae": vae.state_dict() if vae else {}}
    for step in steps(cfg, state):
        size = cfg.batch_size // WORLD  # rows of a latent of every expert, or of one image each
        clean, k = (batch_by_share(x0, counts, size) if not vae
                    else (expert_batch(x0, counts, size), None))
        noisy, sigma = at_random_levels(clean)
        x0_hat = (net(noisy, 1.0, sigma**2) if vae else net(noisy, 1.0, sigma, k))[0]
        loss = score_matching_loss(x0_hat, clean, sigma)
        loss.backward()
        for name in bases:
            tangent_gradient(learned[name])
        grad_norm = nn.utils.get_total_norm([v.grad for v in learned.values()])
        lr = opt.param_groups[0]["lr"] = cfg.lr * (1 + math.cos(math.pi * step / cfg.steps)) / 2
        opt.step()
        opt.zero_grad()
        ema_update(ema, model, cfg.ema_decay, step)
        for name in bases:
            qr_retraction(learned[name])
            qr_retraction(ema.get_parameter(name))
        log(cfg, state, step, loss=loss, lr=lr, grad_norm=grad_norm, **count_parameters(model, vae))
        if due(cfg, cfg.sample_every, step):
            k = torch.arange(len(counts), device=device)[:10].repeat_interleave(8)
            shown, k = draw(ema, vae, frame, cfg, k, torch.Generator().manual_seed(0))
            shown = shown[k.argsort(stable=True)]  # a row an expert
            save_grid(shown, f"{cfg.out}/samples_{step + 1:07d}.png", columns=8)

def sample(cfg):
    """Draw cfg.n images from cfg.sample: image i of class i mod K, or clusters by their share."""
    device, saved = setup(cfg), load_checkpoint(cfg.sample, "ema", "vae", "frame")
    torch.set_float32_matmul_precision("highest")  # as in training
    frame = {name: v.to(device) for name, v in saved["frame"].items()}
    K, generator, parts = len(frame["share"]), torch.Generator().manual_seed(cfg.seed), []
    model, vae = (net and net.to(device) for net in build(cfg, K))
    model.load_state_dict(saved["ema"])
    if vae:
        vae.load_state_dict(saved["vae"])
    k = (torch.multinomial(frame["share"].cpu(), cfg.n, True, generator=generator) if cfg.clusters
         else torch.arange(cfg.n) % K)
    for index, generator in shares(cfg.n, 250, cfg.seed):
        images, experts = draw(model, vae, frame, cfg, k[index].to(device), generator)
        parts.append((index, to_uint8(images), experts))
    images, k = (gather([(part[0], part[i]) for part in parts]) for i in (1, 2))
    rows = [images[k == j][:max(1, min(8, cfg.n // K))] for j in range(min(K, 10))]
    save_grid(torch.cat(rows), f"{cfg.out}/sample.png", columns=max(len(row) for row in rows))
    if cfg.npz:
        save_npz(images, k, f"{cfg.out}/sample.npz")

def main(argv=None):
    cfg = parse_config(Config, PRESETS, ("sampler",), argv)
    sample(cfg) if cfg.sample else train(cfg)

if __name__ == "__main__":
    main()
