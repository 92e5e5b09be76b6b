"""A two-layer ReLU denoiser: few samples are stored in a spiky code, many leave statistics.

Paper     Zhang, Li, Li, Shi, Wu, Tao, Qu. Generalization of Diffusion Models Arises with a Balanced
          Representation Space. arXiv:2512.20963v2
Here      Eq. 6 paper_loss (notebook: code_loss); Thm. 3.1, Cor. 3.3-3.4 theory_weights (centred:
          signed_weights); Cor. 3.2 mem_weights; Sec. 4 spikiness, auroc; Eq. 11 sample_ddim
Changed   Cor. 3.3 prints S + sigma I for S + sigma^2 I; the score is (f - x) / sigma^2, printed
          with the other sign. Images are centred, since the theorem asks for negative cosines; then
          directions come as pairs of columns, signed_weights, not in the paper; they are cropped,
          drawn by the seed, five picked greedily (notebook: squashed, the first, by hand). Samples
          come from closed-form weights at every level, not from a network conditioned on sigma, and
          from sigma_max 80, not 2: f(c x) = c f(x), so the noise sets their scale; concepts are
          encoded at the level of the step, not at one of their own. One parameter is used twice,
          with double decay (notebook: two over one storage, each with its own step). Participation
          ratio and L4 / L2 stand beside std, which depends on energy, too. float32 (CUDA: TF32)
Left out  EMA; Stable Diffusion, DiT; Jacobian spectra; bounds on KL and risk; untied weights
Notation  x      clean sample, (n, d)            W      W_1 = W_2, (d, p), one column a hidden unit
          y      x + sigma e, noisy              h      code relu(W^T y), (n, p)
          S      X_k^T X_k / n_k of a cluster    U, s   its eigenvectors and eigenvalues
          rho    its share n_k / n of samples    lam    lambda of Eq. 6
          v      mean code of a concept          a      strength of steering towards it
Run       python balanced_representation.py                     # 1 min, 2 CPU cores
          python balanced_representation.py --preset gpu        # not measured
          python balanced_representation.py --preset paper --data <faces>         # not measured
"""
import argparse
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import (RANK, WORLD, batch_indices, due, epoch_order, fail, figure, gather,
                    load_checkpoint, load_images, log, mix, parallel, parse_config, save_grid,
                    save_npz, setup, shares, steps, to_uint8)

# ---- config ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    preset: str = ""  # gpu | paper; a flag beats its preset
    out: str = ""  # run folder; empty: runs/balanced_representation, with -<preset>
    fresh: bool = False  # start over instead of continuing the run in the folder
    seed: int = 0  # of weights, choice and order of samples, and noise
    device: str = "auto"  # auto | cuda | mps | cpu
    compile: str = "off"  # auto | on | off; no gain for two matrix products
    data: str = "shapes"  # shapes | fields | simplex | folder or .tar | torch/... hfds/... (timm)
    image_size: int = 32  # side S in pixels; d = S^2, images are gray
    skip_bad: bool = False  # leave out images that cannot be read
    batch_size: int = 256  # samples per step, summed over all GPUs
    steps: int = 6000  # optimizer steps
    lr: float = 1e-3  # constant
    log_every: int = 200  # steps between two lines in metrics.jsonl
    save_every: int = 2000  # steps between two checkpoints
    sample_every: int = 3000  # steps between two pictures and measurements
    sample: str = ""  # draw by the closed form of this checkpoint's samples instead of training
    n: int = 64  # how many images --sample draws
    npz: bool = False  # --sample also writes them as ADM's evaluation format
    few_steps: int = 8000  # first, a run in <out>/few on few samples, see FEW; 0: none
    samples: int = 10_000  # training samples
    separated: bool = False  # those of smallest mutual cosine, greedily, of the first 10,000
    copies: int = 0  # simplex: clusters that are copies of one point (Cor. 3.4)
    center: bool = True  # subtract the mean sample
    width: int = 100  # hidden units p
    sigma: float = 0.2  # noise level; pixels lie in [-1, 1]
    loss: str = "paper"  # paper | code: Eq. 6, or mean over pixels and decay by the optimizer
    optimizer: str = "adam"  # adam | rmsprop
    weight_decay: float = 1e-4  # of the notebook; lambda = d weight_decay / 2, for either loss
    sampling_steps: int = 40  # levels of a sampler, geometric
    sigma_max: float = 80.0  # the first
    sigma_min: float = 0.02  # the last
    steer: float = 0.0  # a of Eq. 11, towards samples of the first one's class

    def __post_init__(self):
        for name in ("samples", "width", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "few_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.sigma < math.inf or not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"need sigma > 0 and sigma_max > sigma_min > 0, got {self.sigma}, "
                             f"{self.sigma_max} and {self.sigma_min}")
        if self.copies and (self.data != "simplex" or not 0 < self.copies < CLUSTERS):
            raise ValueError(f"copies needs --data simplex and 0 to {CLUSTERS - 1} clusters")
        if self.separated and self.samples > 10_000:
            raise ValueError(f"separated picks at most 10000 samples, got {self.samples}")
        if self.data == "simplex" and self.image_size < 5:
            raise ValueError("simplex needs image_size 5, for its directions")

CLUSTERS = 4  # of simplex
FEW = dict(  # the memorising network, published settings but for the batch: all, in copies
    few_steps=0, samples=5, separated=True, optimizer="rmsprop", lr=1e-3, weight_decay=1e-2)
PUBLISHED = dict(few_steps=50_000, steps=50_000, lr=1e-4, log_every=500, save_every=5000,
                 sample_every=10_000, loss="code")
PRESETS = {
    "gpu": PUBLISHED,
    "paper": PUBLISHED | dict(data="data/celeba", center=False),  # 10,000 faces
}
STEER = (0, 0.3, 0.5, 1)  # the sweep of a that is drawn
SAMPLING = ("sampling_steps", "sigma_max", "sigma_min", "steer")

# ---- data ------------------------------------------------------------------------------

def pick_separated(x, n):
    """Indices of n rows of x (M, d): each new one has the smallest largest cosine to those before.

    Starts from the row with the smallest cosine to any other among the first 1000.
    """
    u = F.normalize(x)
    chosen = [(u[:1000] @ u.T).amin(1).argmin().item()]
    worst = u @ u[chosen[0]]  # (M,), largest cosine to a chosen one
    while len(chosen) < n:
        worst[chosen] = math.inf
        chosen.append(worst.argmin().item())
        worst = torch.maximum(worst, u @ u[chosen[-1]])
    return torch.tensor(chosen)

def simplex_means(K, d, norm=6.0):
    """Corners of a regular simplex around 0: float32 (K, d) of this norm, cosines -1 / (K - 1)."""
    corners = torch.eye(K) - 1 / K
    return F.pad(norm * F.normalize(corners), (0, d - K))

def simplex_mog(n, d, seed, K=CLUSTERS, norm=6.0, eigenvalues=(1, 0.825, 0.65, 0.475, 0.3)):
    """Mixture of K Gaussians, means on a simplex, covariances of low rank in disjoint directions.

    returns  x (n, d), its cluster i % K for sample i, int64 (n,); d at least K (1 + rank)
    """
    g, rank = torch.Generator().manual_seed(seed), len(eigenvalues)
    labels = torch.arange(n) % K
    z = torch.randn(n, rank, generator=g) * torch.tensor(eigenvalues).sqrt()
    directions = K + labels[:, None] * rank + torch.arange(rank)  # (n, rank)
    return simplex_means(K, d, norm)[labels].scatter(1, directions, z), labels

def fields(n, size, seed, length=1 / 8, std=0.5):
    """Smooth periodic Gaussian fields in place of faces, clipped: (n, size^2) in [-1, 1].

    length  of the correlation exp(-r^2 / 2 length^2), as a share of the side
    """
    k = 2 * math.pi * torch.fft.fftfreq(size) * size
    gain = (-(k[:, None].square() + k.square()) * length**2 / 4).exp()  # root of the spectrum
    gain = gain / gain.square().mean().sqrt()
    noise = torch.randn(n, size, size, generator=torch.Generator().manual_seed(seed))
    field = torch.fft.ifft2(torch.fft.fft2(noise) * gain).real
    return (std * field).clamp(-1, 1).flatten(1)

def gray_images(cfg, device, split, n):
    """Up to n images of --data, in an order of the seed's: (n, S^2) in [-1, 1], labels (n,)."""
    data = load_images(cfg, device, split)
    if data.images is None:
        fail(f"--data {cfg.data}: streamed; this script needs a set that fits in memory")
    index = epoch_order(data.size, cfg.seed)[:n].to(device)
    luma = torch.tensor([0.299, 0.587, 0.114], device=device)
    x = torch.einsum("nchw,c->nhw", data.images[index].float(), luma)
    return x.flatten(1) / 127.5 - 1, data.labels[index]

def load_pool(cfg, device):
    """Samples to choose from, and to test on: namespace x (M, d), labels, test, mean (d,).

    M is at least cfg.samples and 10,000; labels tell concepts apart: classes, clusters, samples.
    """
    M, d, pool = max(cfg.samples, 10_000), cfg.image_size**2, argparse.Namespace()
    if cfg.data == "fields":
        pool.x, pool.test = (fields(m, cfg.image_size, mix(cfg.seed, i)).to(device)
                             for i, m in enumerate((M, 2000)))
        pool.labels = torch.arange(M, device=device)
    elif cfg.data == "simplex":
        pool.x, labels = simplex_mog(M, d, mix(cfg.seed, 0))
        test, others = simplex_mog(4000, d, mix(cfg.seed, 1))
        for k in range(cfg.copies):
            pool.x[labels == k] = pool.x[k].clone()
        pool.x, pool.labels = pool.x.to(device), labels.to(device)
        pool.test = test[others >= cfg.copies][:2000].to(device)  # fresh, never of a copied cluster
    else:
        pool.x, pool.labels = gray_images(cfg, device, "train", M)
        pool.test = gray_images(cfg, device, "validation", 2000)[0]
    if len(pool.x) < cfg.samples:
        fail(f"--samples {cfg.samples}: --data {cfg.data} has {len(pool.x)} to train on")
    pool.mean = pool.x.mean(0) * cfg.center
    pool.x, pool.test = pool.x - pool.mean, pool.test - pool.mean
    return pool

def choose(pool, cfg):
    """Of the pool, what one network sees: namespace x (n, d), labels (n,), stored, concept, test.

    stored   samples that it should memorise: the copies if there are any, else all
    concept  up to 50 with the first one's label, to steer towards
    """
    index = slice(cfg.samples)
    if cfg.separated:
        index = pick_separated(pool.x[:10_000], cfg.samples).to(pool.x.device)
    x, labels = pool.x[index], pool.labels[index]
    return argparse.Namespace(
        x=x, labels=labels, test=pool.test, mean=pool.mean, concept=x[labels == labels[0]][:50],
        stored=x[labels < cfg.copies] if cfg.copies else x)

# ---- model -----------------------------------------------------------------------------

def encode(W, y):
    """The code h = relu(W^T y): (d, p), (n, d) -> (n, p)."""
    return F.relu(y @ W)

def denoise(W, y, shift=0.0):
    """f(y) = W (h(y) + shift): (d, p), (n, d), (p,) -> (n, d)."""
    return (encode(W, y) + shift) @ W.T

class ReLUDAE(nn.Module):
    """Two layers without bias that share their weight: x_hat = W relu(W^T y) (Sec. 3)."""

    def __init__(self, d, p):
        super().__init__()
        self.W = nn.Parameter((2 * torch.rand(d, p) - 1) / d**0.5)  # columns of norm about 0.6

    def forward(self, y):  # (n, d) -> (n, d)
        return denoise(self.W, y)

# ---- method ----------------------------------------------------------------------------

def paper_loss(net, W, x, sigma, lam):
    """Eq. 6: E |f(x + sigma e) - x|^2, summed over d, + lam (|W_1|^2 + |W_2|^2). Scalar.

    net, W  the network, and the weight that both of its layers share
    """
    x_hat = net(x + sigma * torch.randn_like(x))
    return (x_hat - x).square().sum(1).mean() + 2 * lam * W.square().sum()

def code_loss(net, x, sigma):
    """The notebook's: mean over samples and pixels; the optimizer decays each layer. Scalar."""
    return (net(x + sigma * torch.randn_like(x)) - x).square().mean()

def effective_lambda(d, weight_decay):
    """lambda of Eq. 6 for code_loss and an optimizer that adds weight_decay W_l to both layers'
    gradients (L2, not decoupled as in AdamW): its gradient is that of paper_loss over d."""
    return d * weight_decay / 2

def mem_weights(x, sigma, lam):
    """Cor. 3.2: columns r_i x_i of the samples (n, d) -> (d, n). For cosines below 0.

    r_i^2 = (|x_i|^2 - n lam) / (|x_i|^4 + sigma^2 |x_i|^2), |x|^4 the square of |x|^2; 0 for a
    sample that weight decay erases, |x_i|^2 <= n lam. A minimiser stays one if a column is split
    into parallel ones of the same sum of squares.
    """
    square = x.square().sum(1)  # (n,)
    r = ((square - len(x) * lam).clamp(min=0) / (square**2 + sigma**2 * square)).sqrt()
    return (r[:, None] * x).T

def spectrum(x, k):
    """Of S = X^T X / n, not centred, the k largest: U (d, k) and s (k,), like x (n, d).

    At most n of them if n is smaller; the first eigenvector points to the side of the mean.
    """
    if len(x) < x.shape[1]:
        U, root, _ = torch.linalg.svd(x.T, full_matrices=False)  # of X^T (d, n)
        s = root.square() / len(x)
    else:
        s, U = torch.linalg.eigh(x.T @ x / len(x))
        s, U = s.flip(0).clamp(min=0), U.flip(1)
    sign = torch.where(x.mean(0) @ U[:, :1] < 0, -1.0, 1.0)
    return torch.cat([sign * U[:, :1], U[:, 1:k]], 1), s[:k]

def spread(k, like):
    """Orthogonal (k, k), a reflection whose first column is constant, k^(-1/2)."""
    u = like.new_full((k,), k**-0.5)
    u[0] -= 1
    return torch.eye(k).to(like) - 2 * torch.outer(u, u) / u.square().sum().clamp(min=1e-30)

def theory_weights(clusters, sigma, lam):
    """Thm. 3.1: blocks W_k = U ((s - lam / rho) / (s + sigma^2))^(1/2) O^T side by side: (d, p).

    clusters  list of (U (d, p_k), s (p_k,), rho): spectrum of a cluster and its share of samples
    O         any orthogonal matrix that keeps the cluster's codes positive: here u_1, near the
              mean, is spread evenly over the p_k units
    note      Cor. 3.3 prints sigma I where sigma^2 I follows; Cor. 3.4 is the case of rank one;
              directions with s <= lam / rho are pruned
    """
    blocks = []
    for U, s, rho in clusters:
        q = ((s - lam / rho) / (s + sigma**2)).clamp(min=0)
        blocks.append(U * q.sqrt() @ spread(len(s), U).T)
    return torch.cat(blocks, 1)

def signed_weights(U, s, sigma, lam):
    """[V, -V], V = U ((s - 2 lam) / (s + sigma^2))^(1/2): (d, 2 k). Not in the paper.

    Stationary if samples are as likely as their negatives: relu(a) - relu(-a) = a, a Wiener filter
    that pays decay for two columns a direction.
    """
    V = U * ((s - 2 * lam) / (s + sigma**2)).clamp(min=0).sqrt()
    return torch.cat([V, -V], 1)

def f_emp(y, x, sigma):
    """The optimum without constraints, E[x | y] of the training samples (n, d): like y (m, d)."""
    near = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist").square()  # exact
    return (-near / (2 * sigma**2)).softmax(1) @ x

def spikiness(h):
    """How few units carry a code h (n, p) >= 0: dict of (n,), each larger for spikier codes.

    std     over the p units of a sample (the paper's detector), p in the denominator
    pr      minus the participation ratio (sum h)^2 / sum h^2, the number of active units: -1 for
            one, -p for all alike; std^2 = |h|^2 / p (1 - PR / p) mixes it with energy
    l4      |h|_4 / |h|_2: 1 for one unit, m^(-1/4) for m alike
    """
    square = h.square().sum(1).clamp(min=1e-30)
    return {"std": h.std(1, correction=0), "pr": -h.sum(1).square() / square,
            "l4": h.pow(4).sum(1).pow(1 / 4) / square.sqrt()}

def auroc(positive, negative):
    """Share of pairs in which the positive (n,) is above the negative (m,), ties half."""
    low, high = (torch.searchsorted(negative.sort().values, positive, right=right).double().mean()
                 for right in (False, True))
    return ((low + high) / 2 / len(negative)).item()

def noise_levels(count, sigma_max, sigma_min):
    """Descending, geometric: list of count floats."""
    return torch.logspace(math.log10(sigma_max), math.log10(sigma_min), count).tolist()

@torch.no_grad()
def sample_ddim(weights, noise, levels, concept=None, a=0.0, generator=None):
    """Euler steps of the flow: x <- f + (sigma' / sigma) (x - f), f at the last. Like noise.

    weights  function of sigma: W (d, p)     noise (n, d) of variance 1; levels descending
    concept  samples (m, d): f = W (h + a v), v the mean of their codes, here at sigma (Eq. 11)
    """
    x = levels[0] * noise
    for sigma, sigma_next in zip(levels, [*levels[1:], 0.0]):
        W, shift = weights(sigma), 0.0
        if a:
            e = torch.randn(concept.shape, generator=generator).to(concept)
            shift = a * encode(W, concept + sigma * e).mean(0)  # a v
        x_hat = denoise(W, x, shift)
        x = x_hat + sigma_next / sigma * (x - x_hat)
    return x

# ---- train -----------------------------------------------------------------------------

def is_signed(cfg):
    """Whether closed-form weights come in pairs of columns: many samples, centred, one cluster."""
    return cfg.center and cfg.samples > cfg.width and cfg.data != "simplex"

def statistics(data, cfg):
    """What closed-form weights need: U (d, R), s (R,), and the sizes and shares of their blocks.

    A block per sample if the units suffice, else one per cluster of simplex, one for all images.
    """
    parts = [data.x]
    if len(data.x) <= cfg.width:
        parts = list(data.x[:, None])
    elif cfg.data == "simplex":
        parts = [data.x[data.labels == k] for k in range(CLUSTERS)]
    k = max(1, cfg.width // (len(parts) * (1 + is_signed(cfg))))
    spectra = [spectrum(part, k) for part in parts]
    return {"U": torch.cat([U for U, _ in spectra], 1), "s": torch.cat([s for _, s in spectra]),
            "sizes": [len(s) for _, s in spectra],
            "rho": [len(part) / len(data.x) for part in parts]}

def closed_form(stats, cfg, sigma):
    """Weights (d, p) at a noise level, from `statistics`."""
    lam = effective_lambda(len(stats["U"]), cfg.weight_decay)
    if is_signed(cfg):
        return signed_weights(stats["U"], stats["s"], sigma, lam)
    U, s = stats["U"].split(stats["sizes"], 1), stats["s"].split(stats["sizes"])
    return theory_weights(list(zip(U, s, stats["rho"])), sigma, lam)

def nearest(W, x):
    """Columns of norm above 0.1, largest first, (d, m); their best cosines to a sample of x (n, d),
    and which, (m,) each."""
    norm = W.norm(dim=0)
    W = W[:, norm.argsort(descending=True)[:(norm > 0.1).sum()]]
    return W, *(F.normalize(W, dim=0).T @ F.normalize(x).T).max(1)

@torch.no_grad()
def measure_codes(W, data, cfg):
    """Squared error a pixel at the training sigma, beside that of f_emp; columns; spikiness of the
    codes of stored and of fresh samples, noisy alike, and its AUROC in telling them apart."""
    g, count = torch.Generator().manual_seed(0), torch.arange(2000, device=W.device)
    x, test, stored = (u[count % len(u)] for u in (data.x, data.test, data.stored))
    noisy = lambda u: u + cfg.sigma * torch.randn(u.shape, generator=g).to(u)
    error = lambda x_hat, x: (x_hat - x).square().mean().item()
    y, y_test, (_, cosine, _) = noisy(x), noisy(test), nearest(W, data.x)
    result = {"mse": error(denoise(W, y), x), "mse_test": error(denoise(W, y_test), test),
              "mse_test_emp": error(f_emp(y_test, data.x, cfg.sigma), test),
              "live": len(cosine), "cosine": cosine.median().item() if len(cosine) else 0.0}
    spiky, fresh = (spikiness(encode(W, u)) for u in (noisy(stored), y_test))
    for k in spiky:
        result |= {k: abs(spiky[k].mean().item()), f"{k}_test": abs(fresh[k].mean().item()),
                   f"auroc_{k}": auroc(spiky[k].cpu(), fresh[k].cpu())}
    return result

def show(ax, image, title):
    """A vector (S^2,) as a picture, scaled to its largest entry."""
    side = math.isqrt(len(image))
    image = (image / image.abs().max().clamp(min=1e-9)).view(side, side).cpu().numpy()
    ax.imshow(image, cmap="gray", vmin=-1, vmax=1)
    ax.set_title(title, fontsize=7)

@torch.no_grad()
def draw(networks, path):
    """Three rows for each of networks, (W, data, stats, cfg): the largest columns of W_1; training
    samples nearest to them; a concept, one sample steered towards it, three more samples. On the
    right the code of one training sample, and active units of training and of fresh ones."""
    if RANK > 0:
        return
    with figure(path, 3 * len(networks), 8, (1.5, 1.6)) as axes:
        for ax in axes.flat:
            ax.set_axis_off()
        for rows, (W, data, stats, cfg) in zip(axes.reshape(-1, 3, 8), networks):
            columns, cosine, index = nearest(W, data.x)
            for j in range(min(7, len(cosine))):
                what = f"{cfg.samples} samples\n" if j == 0 else ""
                show(rows[0, j], columns[:, j], f"{what}column, norm {columns[:, j].norm():.2f}")
                show(rows[1, j], data.x[index[j]], f"nearest, cosine {cosine[j]:.2f}")
            g = torch.Generator().manual_seed(0)
            levels = noise_levels(cfg.sampling_steps, cfg.sigma_max, cfg.sigma_min)
            weights = functools.partial(closed_form, stats, cfg)
            noise = torch.randn(4, len(W), generator=g).to(W)
            show(rows[2, 0], data.concept.mean(0), "concept")
            for ax, a in zip(rows[2, 1:5], STEER):
                x = sample_ddim(weights, noise[:1], levels, data.concept, a, g)
                show(ax, x[0], f"steered, a = {a}" if a else "closed form: sample")
            for ax, x in zip(rows[2, 5:], sample_ddim(weights, noise[1:], levels)):
                show(ax, x, "another sample")
            sets = data.x[torch.arange(500) % len(data.x)], data.test[:500]
            codes = [encode(W, x + cfg.sigma * torch.randn(x.shape, generator=g).to(x)).cpu()
                     for x in sets]
            active = [-spikiness(h)["pr"].numpy() for h in codes]
            rows[0, 7].bar(range(W.shape[1]), codes[0][0].numpy(), width=1)
            rows[1, 7].hist(active, 20, label=["training", "fresh"])
            rows[1, 7].legend(fontsize=6)
            for ax, title in zip(rows[:, 7], ("code of a training sample", "active units")):
                ax.set_axis_on()
                ax.set_title(title, fontsize=7)
                ax.set_yticks([])
                ax.tick_params(labelsize=6)

def train(cfg, pool=None):
    device = setup(cfg)
    pool = pool or load_pool(cfg, device)
    model = ReLUDAE(cfg.image_size**2, cfg.width).to(device)
    networks = []
    if cfg.few_steps:  # few samples first, a run of its own in <out>/few
        if cfg.fresh and RANK == 0:
            Path(cfg.out, "last.pt").unlink(missing_ok=True)
        few = dataclasses.replace(cfg, out=f"{cfg.out}/few", steps=cfg.few_steps, **FEW)
        networks = train(few, pool)
    data = choose(pool, cfg)
    stats, lam = statistics(data, cfg), effective_lambda(len(model.W), cfg.weight_decay)
    kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[cfg.optimizer]
    decay = 2 * cfg.weight_decay if cfg.loss == "code" else 0.0  # one parameter for two layers
    opt = kind(model.parameters(), cfg.lr, weight_decay=decay)
    net = parallel(model, cfg, device)
    state = {"model": model, "opt": opt, "stats": stats, "mean": data.mean, "concept": data.concept,
             "found": {}}  # of a measurement, until it is logged
    networks.append((model.W.detach(), data, stats, cfg))
    repeat = math.ceil(cfg.batch_size / cfg.samples)  # few samples are all in every batch

    for step in steps(cfg, state):
        index = batch_indices(cfg.samples * repeat, cfg, step) % cfg.samples
        x = data.x[index.to(device, non_blocking=True)]  # (B, d)
        loss = (paper_loss(net, model.W, x, cfg.sigma, lam) if cfg.loss == "paper"
                else code_loss(net, x, cfg.sigma))
        loss.backward()
        grad_norm = model.W.grad.norm()
        opt.step()
        opt.zero_grad()
        if due(cfg, cfg.sample_every, step):
            state["found"] = measure_codes(model.W, data, cfg)
            draw(networks, f"{cfg.out}/samples_{step + 1:07d}.png")
        log(cfg, state, step, loss=loss, grad_norm=grad_norm, **state["found"])
        state["found"] = {} if due(cfg, cfg.log_every, step) else state["found"]
    return networks

def sample(cfg):
    """Draw cfg.n images with the closed-form weights of the samples that cfg.sample was trained on;
    the network itself knows one noise level."""
    device, saved = setup(cfg), load_checkpoint(cfg.sample)
    stats = {k: v.to(device) if torch.is_tensor(v) else v for k, v in saved["stats"].items()}
    mean, concept = saved["mean"].to(device), saved["concept"].to(device)
    levels = noise_levels(cfg.sampling_steps, cfg.sigma_max, cfg.sigma_min)
    weights, parts = functools.partial(closed_form, stats, cfg), []
    for index, generator in shares(cfg.n, 250, cfg.seed):
        noise = torch.randn(len(index), len(mean), generator=generator).to(device)
        x = sample_ddim(weights, noise, levels, concept, cfg.steer, generator) + mean
        parts.append((index, to_uint8(x.view(-1, 1, cfg.image_size, cfg.image_size))))
    images = gather(parts)
    save_grid(images[:64], f"{cfg.out}/sample.png", columns=8)
    if cfg.npz:
        labels = torch.zeros(len(images), dtype=torch.int64)
        save_npz(images.expand(-1, 3, -1, -1), labels, f"{cfg.out}/sample.npz")

def main(argv=None):
    cfg = parse_config(Config, PRESETS, SAMPLING, argv)
    sample(cfg) if cfg.sample else train(cfg)

if __name__ == "__main__":
    main()
