"""A judge of samples: a small classifier trained on a data set's own labels, and Fréchet distance.

    python -m tests.claims.judge --image-size 16                  # trains assets/judge_shapes_16...
    python -m tests.claims.judge --image-size 16 --npz runs/ddpm_xpred/sample.npz        # judges
    python -m tests.claims.judge --data data/cifar10 --npz FILE --judge timm:resnet50    # as well

The judge is never the teacher of a method. Its Fréchet distances compare arms on one data set with
one judge and one number of samples; they are not the FID of Inception features. The floor beside
each is the distance between held-out real images, as many as there are samples, and the others.
"""
import argparse
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from common import batch, fail, load_encoder, load_images, setup

ROOT = Path(__file__).resolve().parents[2]


class Judge(nn.Module):
    """Convolutional classifier: images (B, 3, S, S) in [-1, 1] -> logits (B, K); 128 features."""

    def __init__(self, classes):
        super().__init__()
        def layer(a, b, stride):
            convolution = nn.Conv2d(a, b, 3, stride, 1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(b), nn.SiLU())
        self.body = nn.Sequential(layer(3, 32, 1), layer(32, 64, 2), layer(64, 64, 1),
                                  layer(64, 128, 2), layer(128, 128, 1))
        self.head = nn.Linear(128, classes)

    def features(self, images):  # (B, 3, S, S) -> (B, 128)
        return self.body(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def judge_file(data, size):
    """Where the judge of a data set lies: assets/ for shapes, else runs/judge/."""
    folder = ROOT / "assets" if data == "shapes" else Path("runs/judge")
    return folder / f"judge_{re.sub(r'[^A-Za-z0-9]+', '_', data).strip('_')}_{size}.safetensors"


def parts(data):
    """A data set in two, nine tenths and a held-out one: uint8 (n, 3, S, S) and int64 (n,) each."""
    order = torch.randperm(data.size, generator=torch.Generator().manual_seed(0))
    test, rest = order.to(data.labels.device).tensor_split([data.size // 10])
    return (data.images[rest], data.labels[rest]), (data.images[test], data.labels[test])


def train_judge(args):
    """Train on nine tenths, print the accuracy on the held-out tenth, write the file."""
    device = setup(args)
    data = load_images(args, device)
    (images, labels), test = parts(data)
    data.images, data.labels, data.size = images, labels, len(images)
    model = Judge(data.classes).to(device).train()
    opt = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, args.steps)
    for step in range(args.steps):
        torch.manual_seed(step)
        x, y = batch(data, args, device, step)
        x = x + 0.1 * torch.rand(len(x), 1, 1, 1, device=device) * torch.randn_like(x)  # some grain
        loss = F.cross_entropy(model(x), y, label_smoothing=0.05)
        loss.backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}  loss {loss.item():.3f}", flush=True)
    model.eval()
    right = accuracy(model, *test)
    path = judge_file(args.data, args.image_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"data": args.data, "image_size": args.image_size, "classes": data.classes,
            "steps": args.steps, "batch_size": args.batch_size, "accuracy": f"{right:.4f}"}
    weights = {k: v.half().contiguous() if v.is_floating_point() else v
               for k, v in model.state_dict().items()}
    save_file(weights, path, {k: str(v) for k, v in meta.items()})
    print(f"{path.name}: accuracy on {len(test[0])} held-out images {right:.4f}")


def load_judge(data, size, spec="", device="cpu"):
    """Module with features(images (B, 3, S, S) in [-1, 1]) -> (B, D); a Judge gives logits too."""
    if spec.startswith("timm:"):
        encoder = load_encoder(spec, grid=max(1, 224 // 16)).to(device)
        encoder.features = lambda images: encoder(images).mean(1)
        return encoder
    path = Path(spec) if spec else judge_file(data, size)
    if not path.exists():
        fail(f"{path} is missing: python -m tests.claims.judge --data {data} --image-size {size}")
    with safe_open(path, "pt") as f:
        meta, weights = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    model = Judge(int(meta["classes"]))
    model.load_state_dict(weights)
    return model.float().eval().requires_grad_(False).to(device)


@torch.no_grad()
def accuracy(judge, images, labels):
    """Share of images, uint8 or [-1, 1] (n, 3, S, S), that the judge puts into their class."""
    right = [(judge(to_float(x)).argmax(1) == y).float().sum()
             for x, y in zip(images.split(500), labels.split(500))]
    return (sum(right) / len(images)).item()


@torch.no_grad()
def statistics(judge, images):
    """Mean (D,) and covariance (D, D) of the judge's features, float64 on the CPU."""
    f = torch.cat([judge.features(to_float(x)).cpu() for x in images.split(500)]).double()
    return f.mean(0), f.T.cov()


def to_float(images):
    """uint8 -> [-1, 1]; float32 as it is."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def frechet(one, two):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^.5 C2 C1^.5)^.5) of pairs (mean, covariance), in float64."""
    (m1, c1), (m2, c2) = one, two
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross).item()


def judge_samples(judge, data, images, labels=None):
    """fd of samples uint8 (n, 3, S, S) to nine tenths of a set, fd_floor of as many held-out images
    (at most a tenth of the set), and with labels (n,) the accuracy on both. A dict of floats."""
    (real, _), (held, held_labels) = parts(data)
    reference, n = statistics(judge, real), min(len(images), len(held))
    result = {"fd": frechet(statistics(judge, images), reference),
              "fd_floor": frechet(statistics(judge, held[:n]), reference)}
    if labels is not None and isinstance(judge, Judge):
        result["accuracy"] = accuracy(judge, images, labels)
        result["accuracy_real"] = accuracy(judge, held, held_labels)
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--data", default="shapes", help="as in the scripts [shapes]")
    parser.add_argument("--image-size", type=int, default=32, help="side in pixels [32]")
    parser.add_argument("--npz", default="", help="judge these samples instead of training a judge")
    parser.add_argument("--judge", default="", help="timm:<name> or a judge file [that of --data]")
    parser.add_argument("--steps", type=int, default=800, help="training steps [800]")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step [128]")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--skip-bad", action="store_true", help="leave out unreadable images")
    args = parser.parse_args(argv)
    args.seed, args.flip, args.out, args.fresh, args.sample = 0, False, "", True, ""
    if not args.npz:
        return train_judge(args)
    device = setup(args)
    try:
        with np.load(args.npz) as file:
            images, labels = torch.from_numpy(file["arr_0"]), file.get("arr_1")
    except (OSError, ValueError, KeyError) as error:
        fail(f"--npz {args.npz}: {error}")
    judge = load_judge(args.data, args.image_size, args.judge, device)
    labels = None if labels is None else torch.from_numpy(labels).to(device)
    images = images.permute(0, 3, 1, 2).contiguous().to(device)
    result = judge_samples(judge, load_images(args, device), images, labels)
    numbers = "  ".join(f"{k} {v:.3f}" for k, v in result.items())
    print(f"{args.npz}: {len(images)} samples  {numbers}")


if __name__ == "__main__":
    main()
