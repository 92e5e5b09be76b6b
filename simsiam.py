"""SimSiam: two views of an image, one network, and a gradient that is stopped on one side.

Paper     Chen, He. Exploring Simple Siamese Representation Learning. arXiv:2011.10566v1
Here      Eq. 1 negative_cosine, Eq. 2-4 and Alg. 1 simsiam_loss, Sec. 3 SimSiam and preset paper,
          App. A augment, App. D preset cifar10, Fig. 2 (middle) embedding_std; not in the paper:
          effective_rank, token probe
Changed   crops come from the centre square that common.py loads, already of side S, bilinear, and
          sides above 1 are cut; colour jitter in one order (brightness, contrast, saturation, hue
          as a turn about the grey axis), clipped once at the end; cosine decay per step; the last
          linear map before a BatchNorm has no bias (released code: frozen), the output BatchNorm
          no affine (as released); probes are least squares on at most 10,000 images, a monitor and
          not the paper's linear evaluation; an EMA target (BYOL) ramps up to a constant decay;
          images in [-1, 1], not normalised by ImageNet's mean; bf16 where the device is fast at it
Left out  transfer to detection; warm-up for batches from 1024; cross-entropy similarity (Sec. 4.5)
          and moving-average targets per image (Sec. 5); synchronised BatchNorm without CUDA
Notation  x1, x2  two views of an image, (B, 3, S, S)   f  backbone and projector; h  predictor
          z       f(x), projection, (B, d)              p  h(z), predicts z of the other view
          online  f and h, trained                      D  negative cosine
          target  f of the other view, its gradient stopped; equal weights, or their average (BYOL)
Run       python simsiam.py                                    # kNN 0.772, 2 min, 2 CPU cores
          python simsiam.py --steps 2000 --jitter 0.3 --gray 0.1 --out runs/teacher
                                  # kNN 0.934, 12 min, 1 CPU core; assets/teacher.safetensors
          python simsiam.py --preset cifar10                   # not measured
          torchrun --nproc-per-node 8 simsiam.py --preset paper --data <folder>     # not measured
"""
import argparse
import copy
import dataclasses
import json
import math
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from common import (RANK, WORLD, autocast, batch, due, ema_update, explain, fail, gather,
                    load_checkpoint, load_images, log, parallel, parse_config, save_grid, setup,
                    steps)

# ---- config ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    preset: str = ""  # cifar10 | paper; a flag beats its preset
    out: str = ""  # run folder; empty: runs/simsiam or runs/simsiam-<preset>
    fresh: bool = False  # start over instead of continuing the run in the folder
    seed: int = 0  # of weights, data order and views
    device: str = "auto"  # auto | cuda | mps | cpu
    precision: str = "auto"  # auto | bf16 | fp32; auto: bf16 where the device is fast at it
    compile: str = "off"  # auto | on | off; on a CPU no gain; with several CUDA ranks always off
    data: str = "shapes"  # shapes | folder or .tar of class sub-folders | torch/... hfds/... (timm)
    image_size: int = 32  # side S in pixels; images are cropped to squares and resized
    flip: bool = True  # mirror half of the views
    skip_bad: bool = False  # leave out images that cannot be read
    batch_size: int = 128  # images per step, summed over all GPUs; two views of each
    steps: int = 800  # optimizer steps
    lr: float = 0.4  # SGD, momentum 0.9; times batch_size / 256; cosine, but predictor constant
    log_every: int = 50  # steps between two lines in metrics.jsonl
    save_every: int = 500  # steps between two checkpoints
    sample_every: int = 400  # steps between two kNN accuracies and pictures of neighbours
    sample: str = ""  # measure this checkpoint and write its teacher instead of training
    n: int = 10  # held-out images whose neighbours --sample draws
    backbone: str = "resnetv2_18"  # name in timm
    backbone_args: str = '{"layers": [2], "channels": [160], "stem_chs": 160}'  # JSON, for timm
    cifar_stem: bool = False  # ResNet for 32 pixels: 3x3 stem, no pooling; no teacher file (App. D)
    weight_decay: float = 5e-4  # on all parameters, also of BatchNorm (App. A, D)
    projector_layers: int = 2  # 3 for ImageNet (Sec. 3)
    dim: int = 256  # width d of the projection; hidden width of the predictor: d / 4
    crop_min: float = 0.2  # smallest area of a crop, as a share of the image (App. A)
    jitter: float = 0.4  # brightness, contrast, saturation by 1 +- this, hue by this / 4 of a turn
    gray: float = 0.2  # share of views without colour (App. A)
    blur: float = 0.0  # share of views blurred, sigma 0.1 to 2 pixels (code: 0.5; CIFAR: 0)
    stop_grad: bool = True  # stop the gradient of the target branch (Sec. 4.1)
    target_ema: float = 0.0  # decay of the target's moving average; 0: shared weights; BYOL: 0.996
    predictor: bool = True  # the predictor MLP h (Sec. 4.2)
    symmetric: bool = True  # both views take both roles (Eq. 2)

    def __post_init__(self):
        for name, least in (("projector_layers", 1), ("dim", 4), ("lr", 0), ("weight_decay", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("jitter", "gray", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.crop_min <= 1:
            raise ValueError(f"crop_min must be in (0, 1], got {self.crop_min}")
        if not 0 <= self.target_ema < 1:
            raise ValueError(f"target_ema must be in [0, 1), got {self.target_ema}")
        if self.target_ema and not self.stop_grad:
            raise ValueError("target_ema has no gradient to let through: drop --no-stop-grad")
        if not isinstance(json.loads(self.backbone_args), dict):
            raise ValueError(f"backbone_args must be a JSON object, got {self.backbone_args}")

PRESETS = {
    "cifar10": dict(  # App. D: ResNet-18, 800 epochs of 97 steps
        data="torch/cifar10", batch_size=512, steps=77_600, lr=0.03, save_every=970,
        sample_every=970, backbone="resnet18", backbone_args='{"zero_init_last": true}',
        cifar_stem=True, dim=2048, compile="auto"),
    "paper": dict(  # Sec. 3: ResNet-50 on ImageNet, 100 epochs of 2502 steps
        data="data/imagenet", image_size=224, batch_size=512, steps=250_200, lr=0.05,
        save_every=2502, sample_every=12_510, backbone="resnet50",
        backbone_args='{"zero_init_last": true}', weight_decay=1e-4, projector_layers=3, dim=2048,
        blur=0.5, compile="auto"),
}

# ---- data ------------------------------------------------------------------------------

def crop(x, area_min, flip):
    """Random resized crop of each image, half of them mirrored: (B, C, S, S) -> the same, bilinear.

    The area is uniform in [area_min, 1], the aspect ratio log-uniform in [3/4, 4/3].
    """
    n, device = len(x), x.device
    area = area_min + (1 - area_min) * torch.rand(n, device=device)
    aspect = (math.log(4 / 3) * (2 * torch.rand(n, device=device) - 1)).exp()
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], -1).clamp(max=1)  # (B, 2)
    centre = (1 - size) * (2 * torch.rand(n, 2, device=device) - 1)  # the crop stays inside
    if flip:
        size[:, 0] *= torch.randint(0, 2, (n,), device=device) * 2 - 1
    theta = torch.cat([torch.diag_embed(size), centre[:, :, None]], -1)  # (B, 2, 3)
    grid, inside = F.affine_grid(theta, x.shape, align_corners=False), 1 - 1 / x.shape[-1]
    return F.grid_sample(x, grid.clamp(-inside, inside), align_corners=False)

LUMA = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)  # every row makes grey
AXIS = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0.0]]) / 3**0.5  # v -> grey axis x v

def recolour(x, strength, gray):
    """Colour jitter on 80 % of the images, then no colour on a share `gray`: like x, in [-1, 1].

    Brightness, contrast and saturation times U(1 - strength, 1 + strength); hue turned about the
    grey axis by U(-strength / 4, strength / 4) of a circle.
    """
    n, device = len(x), x.device
    on = (torch.rand(n, 1, device=device) < 0.8) * strength
    u = on * (2 * torch.rand(n, 4, device=device) - 1)  # (B, 4)
    brightness, contrast, saturation = (1 + u[:, :3]).T[..., None, None]  # (B, 1, 1) each
    saturation = torch.where(torch.rand(n, 1, 1, device=device) < gray, 0.0, saturation)
    luma, axis = (m.to(device, non_blocking=True) for m in (LUMA, AXIS))
    angle = math.pi / 2 * u[:, 3, None, None]
    eye = torch.eye(3, device=device)
    turn = eye + angle.sin() * axis + (1 - angle.cos()) * axis @ axis  # Rodrigues, (B, 3, 3)
    colour = turn @ (saturation * eye + (1 - saturation) * luma)
    x = (x + 1) / 2 * brightness[..., None]
    mean = torch.einsum("c,bchw->b", luma[0], x)[:, None, None, None] / x[0, 0].numel()
    x = contrast[..., None] * x + (1 - contrast[..., None]) * mean
    return torch.einsum("bdc,bchw->bdhw", colour, x).clamp(0, 1) * 2 - 1

def blurred(x, share):
    """Gaussian blur of a share of the images, sigma U(0.1, 2) pixels, kernel 23: like x."""
    n, c = x.shape[:2]
    sigma = 0.1 + 1.9 * torch.rand(n, 1, device=x.device)
    kernel = (-(torch.arange(-11, 12, device=x.device) / sigma).square() / 2).exp()  # (B, 23)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # (B C, 23)
    y = F.pad(x.reshape(1, n * c, *x.shape[2:]), (11, 11, 11, 11), mode="replicate")
    y = F.conv2d(y, kernel[:, None, :, None], groups=n * c)
    y = F.conv2d(y, kernel[:, None, None, :], groups=n * c).view_as(x)
    return torch.where(torch.rand(n, 1, 1, 1, device=x.device) < share, y, x)

def augment(x, crop_min=0.2, flip=True, jitter=0.4, gray=0.2, blur=0.0):
    """One random view of each image, (B, 3, S, S) in [-1, 1] -> the same (App. A)."""
    x = recolour(crop(x, crop_min, flip), jitter, gray)
    return blurred(x, blur) if blur else x

# ---- model -----------------------------------------------------------------------------

def mlp(sizes, last_norm):
    """Linear maps with BatchNorm and ReLU between; after the last a BatchNorm without affine, or
    nothing. Maps before a BatchNorm have no bias."""
    layers = []
    for a, b in zip(sizes[:-2], sizes[1:]):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
    layers.append(nn.Linear(*sizes[-2:], bias=not last_norm))
    return nn.Sequential(*layers, *[nn.BatchNorm1d(sizes[-1], affine=False)] * last_norm)

class SimSiam(nn.Module):
    """Backbone and projector f, predictor h (Sec. 3); the timm backbone has C = num_features."""

    def __init__(self, backbone, dim, projector_layers=2, predictor=True):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp([backbone.num_features] + [dim] * projector_layers, last_norm=True)
        self.predictor = mlp([dim, dim // 4, dim], last_norm=False) if predictor else nn.Identity()

    def tokens(self, x):  # (B, 3, S, S) -> (B, N, C)
        x = self.backbone.forward_features(x.contiguous(memory_format=torch.channels_last))
        return x[:, self.backbone.num_prefix_tokens:] if x.ndim == 3 else x.flatten(2).mT

    def forward(self, *views):  # each (B, 3, S, S) -> of each z (B, d) and p (B, d)
        z = [self.projector(self.tokens(x).mean(1)) for x in views]  # BatchNorm sees a view at once
        return [(z_i, self.predictor(z_i)) for z_i in z]

# ---- method ----------------------------------------------------------------------------

def negative_cosine(p, z):
    """D(p, z) = -<p / |p|, z / |z|>, mean over the batch (Eq. 1), float32. Scalar in [-1, 1]."""
    return -F.cosine_similarity(p.float(), z.float()).mean()

def simsiam_loss(online, target, x1, x2, stop_grad=True, symmetric=True):
    """D(p1, z2) / 2 + D(p2, z1) / 2, z without gradient (Alg. 1): scalar; and z of x1, (B, d).

    online, target  maps of (x1, x2) to (z1, p1), (z2, p2); target None: the online branch's own z
    stop_grad       False: gradient flows through both sides, and the network collapses (Sec. 4.1)
    symmetric       False: x1 predicts x2 only (Sec. 4.6)
    """
    (z1, p1), (z2, p2) = online(x1, x2)
    (t1, _), (t2, _) = target(x1, x2) if target else ((z1, None), (z2, None))
    if stop_grad:
        t1, t2 = t1.detach(), t2.detach()  # Eq. 3
    if not symmetric:
        return negative_cosine(p1, t2), z1
    return negative_cosine(p1, t2) / 2 + negative_cosine(p2, t1) / 2, z1  # Eq. 4

def embedding_std(z):
    """Standard deviation of z / |z| over the batch, mean of channels, times sqrt(d) (Sec. 4.1).

    z (B, d); 0: all outputs equal, 1: as isotropic as a Gaussian. With BatchNorm on z it can stay
    near 1 when the outputs fall onto a line, if both signs are as frequent: see effective_rank.
    """
    return F.normalize(z.float()).std(0).mean() * z.shape[1]**0.5

def effective_rank(z):
    """exp of the entropy of the normalised covariance spectrum of z / |z|: 1 ... min(B - 1, d).

    z (B, d), of one process. Outputs that vary in a few directions have few, whatever their std.
    """
    unit = F.normalize(z.detach().cpu().double()).nan_to_num()  # svdvals raises; log tells of NaN
    spectrum = torch.linalg.svdvals(unit - unit.mean(0)).square()
    share = spectrum / spectrum.sum().clamp(min=1e-30)
    return torch.special.entr(share).sum().exp().item()

# ---- train -----------------------------------------------------------------------------

def build(cfg):
    """The network of this config: SimSiam around a timm backbone without classifier, untrained."""
    with explain(f"--backbone {cfg.backbone} --backbone-args {cfg.backbone_args}", Exception):
        backbone = timm.create_model(cfg.backbone, num_classes=0, **json.loads(cfg.backbone_args))
        if cfg.cifar_stem and not isinstance(backbone, timm.models.resnet.ResNet):
            raise ValueError("--cifar-stem needs a ResNet")
        if cfg.cifar_stem:
            backbone.conv1, backbone.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        model = SimSiam(backbone, cfg.dim, cfg.projector_layers, cfg.predictor).eval()
        tokens = model.tokens(torch.zeros(2, 3, cfg.image_size, cfg.image_size))
        if tokens.shape[2] != backbone.num_features:
            raise ValueError(f"features {tuple(tokens.shape)} are not (images, tokens, channels)")
    tokens.sum().backward()
    for w in backbone.parameters():
        w.requires_grad_(w.grad is not None)  # timm heads keep some that forward_features skips
        w.grad = None
    return model.train().to(memory_format=torch.channels_last)

def knn_accuracy(bank, bank_labels, queries, labels, classes, k=20, temperature=0.1):
    """Share of queries (m, C) whose class has most votes exp(cosine / temperature) of the k nearest
    of bank (M, C)."""
    near, index = (F.normalize(queries) @ F.normalize(bank).T).topk(min(k, len(bank)))  # (m, k)
    votes = torch.zeros(len(queries), classes, device=near.device)
    votes.scatter_add_(1, bank_labels[index], (near / temperature).exp())
    return (votes.argmax(1) == labels).float().mean().item()

def linear_probe(features, labels, test, test_labels, classes, ridge=1e-3):
    """Accuracy on test (m, C) of least squares from standardised features (M, C) to one-hot
    classes."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    X, X_test = ((f - mean) / std for f in (features, test))
    X, X_test = (F.pad(f, (0, 1), value=1.0).double() for f in (X, X_test))  # and a bias
    gram = X.T @ X / len(X) + ridge * torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    W = torch.linalg.solve(gram, X.T @ F.one_hot(labels, classes).double() / len(X))  # (C + 1, K)
    return ((X_test @ W).argmax(1) == test_labels).float().mean().item()

@torch.no_grad()
def embed(model, data, cfg, device, n, pool):
    """Images uint8 (n, 3, S, S), tokens (n, N, C) or, pooled, their mean (n, C), and labels (n,)
    of n images, rounded down to whole batches; the parts of all ranks, on the CPU."""
    size = cfg.batch_size if data.images is None else min(cfg.batch_size, n, data.size)
    size = size // WORLD * WORLD
    if size == 0:
        fail(f"--data {cfg.data}: {data.size} images to measure on are too few for {WORLD} ranks")
    cfg = dataclasses.replace(cfg, flip=False, batch_size=size)
    data = argparse.Namespace(**{k: v for k, v in vars(data).items() if k != "iterator"})  # anew
    rows = []
    for step in range(max(1, min(n, data.size) // size)):
        x, y = batch(data, cfg, device, step)
        with autocast(cfg, device):
            tokens = model.tokens(x).float()
        index = step * size + torch.arange(len(x)) * WORLD + RANK
        images = ((x + 1) * 127.5).round().to(torch.uint8)
        rows.append((index, images, tokens.mean(1) if pool else tokens, y))
    return [gather([(row[0], row[i]) for row in rows]) for i in (1, 2, 3)]

def measure(model, data, held_out, cfg, device, path, n):
    """Accuracies on held-out images: kNN and linear probe of pooled features, linear probe of
    single tokens. Draws n of the images, a row each: the image and its neighbours in the data."""
    model.eval()
    images, f, labels = embed(model, data, cfg, device, 10_000, pool=True)
    queries, f_test, y = embed(model, held_out, cfg, device, 5000, pool=True)
    result = {"knn": knn_accuracy(f, labels, f_test, y, data.classes),
              "probe": linear_probe(f, labels, f_test, y, data.classes)}
    tokens, token_labels = [], []
    for part, m in ((data, 2000), (held_out, 1000)):
        _, h, k = embed(model, part, cfg, device, m, pool=False)
        tokens.append(h.flatten(0, 1))
        token_labels.append(k.repeat_interleave(h.shape[1]))
    result["token_probe"] = linear_probe(tokens[0], token_labels[0], tokens[1], token_labels[1],
                                         data.classes)
    model.train()
    rows = [(y == k).nonzero()[:, 0][:math.ceil(n / data.classes)] for k in range(data.classes)]
    rows = torch.cat(rows)[:n]
    near = F.normalize(f_test[rows]) @ F.normalize(f).T  # (n, M)
    near = near.topk(min(7, len(f))).indices
    grid = torch.cat([queries[rows, None], images[near]], 1)
    save_grid(grid.flatten(0, 1), path, columns=grid.shape[1])
    return result

def save_teacher(backbone, cfg, done, result):
    """Write <out>/teacher.safetensors as common.load_encoder reads it: weights in half precision,
    all that is known about them as text. None for cifar_stem, which timm cannot build by name."""
    if cfg.cifar_stem or RANK > 0:
        return
    about = {"timm": cfg.backbone, "args": cfg.backbone_args, "mean": [0.5] * 3, "std": [0.5] * 3,
             "data": cfg.data, "image_size": cfg.image_size, "steps": done, "seed": cfg.seed,
             "jitter": cfg.jitter, "gray": cfg.gray}
    about |= {name: round(value, 4) for name, value in result.items()}
    about = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    weights = {name: (w.half() if w.ndim > 1 else w).cpu().contiguous()
               for name, w in backbone.state_dict().items()}
    with explain(f"--out {cfg.out}", OSError, SafetensorError):
        save_file(weights, f"{cfg.out}/teacher.safetensors", about)

def train(cfg):
    device = setup(cfg, "steps")  # the cosine depends on it
    if cfg.batch_size // WORLD < 2:
        fail(f"--batch-size {cfg.batch_size}: BatchNorm needs two images on each of {WORLD} ranks")
    data, held_out = load_images(cfg, device, "train"), load_images(cfg, device, "validation")
    model = build(cfg).to(device)
    if WORLD > 1 and device.type == "cuda":
        model = timm.layers.convert_sync_batchnorm(model)  # torch's own drops timm's activations
    target = copy.deepcopy(model).requires_grad_(False) if cfg.target_ema else None
    groups = [{"params": [*model.backbone.parameters(), *model.projector.parameters()]},
              {"params": [*model.predictor.parameters()]}]  # its rate stays constant (Sec. 4.2)
    rate = cfg.lr * cfg.batch_size / 256
    opt = torch.optim.SGD(groups, rate, momentum=0.9, weight_decay=cfg.weight_decay)
    apart = {"compile": "off"} if WORLD > 1 and device.type == "cuda" else {}  # SyncBN breaks it
    online = parallel(model, dataclasses.replace(cfg, **apart), device)
    state = {"model": model, "opt": opt} | ({"target": target} if target else {})
    state["found"] = {}  # the latest measurement

    for step in steps(cfg, state):
        x, _ = batch(data, cfg, device, step)  # (B, 3, S, S) in [-1, 1]
        x1, x2 = (augment(x, cfg.crop_min, cfg.flip, cfg.jitter, cfg.gray, cfg.blur)
                  for _ in range(2))
        with autocast(cfg, device):
            loss, z = simsiam_loss(online, target, x1, x2, cfg.stop_grad, cfg.symmetric)
        loss.backward()
        grads = [w.grad for w in model.parameters() if w.requires_grad]
        grad_norm = nn.utils.get_total_norm(grads)
        opt.param_groups[0]["lr"] = lr = rate * (1 + math.cos(math.pi * step / cfg.steps)) / 2
        opt.step()
        opt.zero_grad()
        if target:
            ema_update(target, model, cfg.target_ema, step)
        if due(cfg, cfg.sample_every, step):
            path = f"{cfg.out}/samples_{step + 1:07d}.png"
            found = state["found"] = measure(model, data, held_out, cfg, device, path, n=10)
            save_teacher(model.backbone, cfg, step + 1, found)  # before last.pt: a kill redoes both
        rank = effective_rank(z) if due(cfg, cfg.log_every, step) else 0  # of this batch
        log(cfg, state, step, loss=loss, std=embedding_std(z), effective_rank=rank, lr=lr,
            grad_norm=grad_norm, **state["found"])

def sample(cfg):
    """Measure cfg.sample, draw cfg.n held-out images with their neighbours, write the teacher."""
    device, saved = setup(cfg), load_checkpoint(cfg.sample)
    model = build(cfg).to(device)
    model.load_state_dict(saved["model"])
    data, held_out = load_images(cfg, device, "train"), load_images(cfg, device, "validation")
    result = measure(model, data, held_out, cfg, device, f"{cfg.out}/sample.png", cfg.n)
    if RANK == 0:
        print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))
    save_teacher(model.backbone, cfg, saved["step"], result)

def main(argv=None):
    cfg = parse_config(Config, PRESETS, (), argv)
    sample(cfg) if cfg.sample else train(cfg)

if __name__ == "__main__":
    main()
