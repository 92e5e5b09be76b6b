"""Aligning a diffusion transformer with a frozen encoder: its features, and its samples.

    python -m tests.claims.repa                  # 16 minutes, 2 slow CPU cores; 2 seeds
    python -m tests.claims.repa --preset gpu     # CIFAR-10: 3 seeds, FD along the run; needs
        # python simsiam.py --data torch/cifar10 --steps 20000 --out runs/teacher-cifar10
        # python -m tests.claims.judge --data torch/cifar10 --image-size 32

Arms, with equal seeds, data order, noise, steps and the learning rate that was best for vanilla:
    vanilla   --lam 0
    REPA      --lam 0.5
    iREPA     REPA with --projector conv --spatial-norm 0.6
    random    REPA towards the same encoder with random weights, its BatchNorms calibrated on 1,000
              training images
    shuffled  REPA towards the teacher's tokens of another image of the batch
    gpu has three more, without a verdict: REPA stopped after 10,000 steps (HASTE), vanilla and REPA
    on the variance-preserving path (vp). Not trained, in both presets: probes of the teacher, of
    the random encoder, and of pixels averaged over an 8 x 8 grid.
On a CPU a patch is 8 pixels wide: 16 tokens, and the teacher's 8 x 8 are averaged over 2 x 2.
Unconditional: labels of ten classes would already hand the network what the teacher can give.
Rates tried for vanilla (cpu, 300 steps, seed 0): 5e-4, 1e-3, 2e-3, 4e-3 and 8e-3, with losses of
0.400, 0.352, 0.329, 0.317 and 0.353 over the last 50 steps. gpu has no such sweep: it takes the
rate of the script's preset.

What the paper reports (arXiv:2410.06940v1) and what counts as agreeing. The rule for two arms: A is
above B if it is at every seed and the means differ by more than the sum of the two standard
deviations over seeds; the reverse of that contradicts; all else is not resolved. (Between equal
arms it finds A above B in 11 % of cases with two seeds, in 4 % with three: one such finding says
little.) Several comparisons or conditions: as in the paper if all agree, partly if more than half
do, contradicted if none does and more than half contradict, else not resolved.

teacher    The precondition: the encoder's linear probe beats vanilla's best block at its best t and
           seed. If it does not, every other verdict is "not resolved".
probe      Fig. 3 (by layer), Tab. 7: the aligned block has better features, at every noise level
           (a run of SiT-L/2 with REPA goes from 55 to 69 %). REPA above vanilla, at each t.
cknna      Fig. 3: alignment with the encoder rises. REPA above vanilla at the aligned block, at
           each t.
best       Fig. 3 has curves over blocks, and vanilla's peak lies deeper: REPA's best block above
           vanilla's best block, the best by the mean over t at each seed, for the probe and CKNNA.
judge      Not in the paper: the same CKNNA with a network that was not used in training, a
           supervised classifier: REPA above vanilla at the aligned block, at each t, and at the
           best. Until b26b549 these were conditions of cknna (therefore partly: below vanilla at
           t = 0.1) and of best.
alignment  Eq. 8 is learned, and not only its mean or its projector. Held-out cos(y_*, h_phi)
           exceeds that of the best constant answer (the mean direction of y_* at that token, from
           other images) by more than 0.05 at t = 0.1 and by more at the first t than at the last,
           at every seed; and a ridge readout of the teacher's tokens from the aligned block, fitted
           alike in both arms, is above vanilla's at each t.
place      Eq. 8 matches token n with token n: at each t and seed the cosine of matched tokens of
           REPA is by more than 0.05 above that with the tokens of other positions in the same image
           (their mean, and each of the seven ways to turn or mirror the grid), and by more than
           0.05 above that with the same position of another image.
shuffled   No table: alignment with another image cannot teach features. Agrees if REPA's probe is
           above that of shuffled (aligned block, mean over t), and shuffled's cosine is within 0.05
           of the constant answer's at every t and seed.
random     No table has a random encoder; Tab. 2 (SiT-L/2: FID 12.5 with MAE to 9.7 with DINOv2)
           says that the encoder matters. REPA's probe (aligned block, mean over t) above random's.
fd         Tab. 3: FID 33.0 -> 24.4 (SiT-B/2, 400K steps, with classes, SDE of 250 steps), less for
           smaller networks. Here without classes, Heun's ODE. REPA's Frechet distance below.
irepa      iREPA (arXiv:2512.10794): 22.75 -> 21.40 (SiT-B/2). The same, iREPA against REPA.
speed      Fig. 1: >17.5 times faster (SiT-XL/2). gpu only. The goal is the lowest FD of vanilla's
           curve; the ratio is that of the steps after which vanilla and REPA first reach it, both
           interpolated between marks. Faster if above 1.2 at every seed, contradicted if below
           1 / 1.2 at every seed (never reached: 0), else not resolved. It says nothing about 17.5.

What was seen before these rules were set: a run of cpu at commit 6dd592d, two seeds. Its rules
asked for signs only; its random encoder had BatchNorms that saw no data (a constant answered its
tokens with cosine 0.92, the teacher's with 0.73); iREPA's CKNNA took normalised targets. Probe of
the aligned block: vanilla 0.226 and 0.219, REPA 0.255 and 0.247, random 0.232 and 0.237, iREPA
0.311 and 0.306; CKNNA with the teacher: vanilla 0.043 and 0.059, REPA 0.101 and 0.093; cosine above
the constant 0.17 at t = 0.1, 0.12 at 0.7; FD: vanilla 181 and 196, REPA 187 and 194. Its verdicts:
teacher, probe, alignment, random as in the paper, cknna partly, fd and irepa not resolved.
Set after it: the margins of probe, cknna and random, best, the readout, place, shuffled, what a
failed precondition does, and the goal and margin of speed. By them that run's probe is partly (not
resolved at t = 0.7), cknna partly (not with the judge at t = 0.1), best not resolved (only CKNNA
with the teacher is above), random as in the paper, fd and irepa not resolved.
What the run of these rules (4f35dc9) taught about them: in place, a margin of 0.05 above other
positions is too little by itself, since shuffled has 0.07 there from the mean of each position; it
has 0.002 above another image, REPA 0.2 to 0.3. And FD, which no rule compares with shuffled's, is
lowest in shuffled (161 and 156): after 700 steps it does not measure what a target teaches.
Up to there aligned arms started from other weights than vanilla, since loading the teacher drew
random numbers. With that mended, two arms at a time and not compiled: probe and shuffled as in the
paper (before: partly, not resolved), random not resolved (before: as in the paper; one of its seeds
has 0.263), the others as before. FD is lowest with the random teacher (152). That run (b26b549)
took 25 minutes with 700 steps, 5,000 images to fit and 2,500 to test on and 2,048 samples; this one
has 500, 3,000, 2,000 and 1,024, to end within 15; nothing else was changed.

probe_<block>_<t>   accuracy of ridge regression from the mean token, EMA weights, no class, same
                    noise in all arms; fitted on training images, tested on held-out ones
cknna_, judge_      with the teacher, with the judge: k = 10, mean tokens of 2,000 held-out images;
                    HSIC is the unbiased one of platonic-rep, the paper prints the biased one
probe, cknna, judge, aligned   of the aligned block, mean over t; aligned: above the constant
best_probe, best_cknna, best_judge   of the best block, mean over t
readout_<t>         mean cosine of the ridge readout, above the constant answer for the teacher
place_<t>, image_<t>   cosine of matched tokens less the best of other positions; of another image
error_<t>           held-out |v_hat - v|^2 a number
fd, fd_floor        of `samples` images (cpu 1,024, gpu 10,000); of as many held-out real images
train_s, total_s    seconds of training (gpu: and compiling); with those that the teacher took (a
                    few steps of it timed here, times its number of steps)
"""
import contextlib
import functools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import repa as script
import simsiam
from common import (autocast, fail, figure, load_checkpoint, load_encoder, load_images,
                    parse_config, setup, to_uint8)
from tests.claims.judge import frechet, judge_file, load_judge, parts, statistics, to_float
from tests.claims.report import (ROOT, arm, arm_file, conclude, mean, open_report, values,
                                 verdict)

TIMES = (0.1, 0.3, 0.5, 0.7)
ARMS = {
    "vanilla": ["--lam", 0],
    "REPA": ["--lam", 0.5],
    "iREPA": ["--lam", 0.5, "--projector", "conv", "--spatial-norm", 0.6],
    "random": ["--lam", 0.5, "--encoder", "RANDOM"],
    "shuffled": ["--lam", 0.5],  # train_arm exchanges the targets
}
MORE = {  # gpu only, and without a claim: the early stop of HASTE, the other path
    "REPA, stopped": ARMS["REPA"] + ["--stop-align", 10_000],
    "vanilla, vp": ARMS["vanilla"] + ["--path", "vp"],
    "REPA, vp": ARMS["REPA"] + ["--path", "vp"],
}
SIZES = {  # marks: steps after which the Frechet distance is measured; read: images of the readout
    "cpu": dict(seeds=(0, 1), marks=(500,), fit=3000, test=2000, read=3000, samples=1024,
                real=10_000, flags=[
                    "--image-size", 32, "--lr", 4e-3, "--batch-size", 64, "--patch", 8, "--pool", 2,
                    "--dim", 192, "--heads", 3, "--log-every", 50, "--sampling-steps", 10,
                    "--compile", "off"]),  # two arms side by side, a thread each
    "gpu": dict(seeds=(0, 1, 2), marks=(1000, 2000, 4000, 7000, 10_000, 14_000, 20_000), fit=20_000,
                test=4000, read=5000, samples=10_000, real=45_000, flags=["--preset", "cifar10"]),
}


def size(report):
    """The numbers of this preset."""
    return SimpleNamespace(**SIZES[report["args"].preset])


def command(report, name, seed, folder, steps):
    """The script's command line of an arm, and its config."""
    more = [report["random"] if a == "RANDOM" else a for a in (ARMS | MORE)[name]]
    argv = ["--out", folder, "--seed", seed, "--steps", steps, "--label-drop", 1, "--guidance", 1,
            "--device", report["args"].device, "--sample-every", 10**6,
            *size(report).flags, *more]
    argv = [str(a) for a in argv]
    return argv, parse_config(script.Config, script.PRESETS, (), argv)


# ---- encoders --------------------------------------------------------------------------


def random_encoder(path, teacher, images, grid, part=250, seed=1000):
    """Write the teacher's network with random weights, as common.load_encoder reads it, its
    BatchNorms with the statistics of images, uint8 (n, 3, S, S), a part at a time, for that grid.
    """
    with safe_open(teacher, "pt") as f:
        about = {k: f.metadata()[k] for k in ("timm", "args", "mean", "std")}
    torch.manual_seed(seed)
    model = timm.create_model(about["timm"], num_classes=0, **json.loads(about["args"]))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save = lambda m: save_file({k: v.contiguous() for k, v in m.state_dict().items()}, path, about)
    save(model)
    encoder = load_encoder(str(path), grid).train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over batches
    with torch.no_grad():
        for x in images.split(part):
            encoder(to_float(x))
    save(encoder.model)


@torch.no_grad()
def tokens_of(encoder, images, side, pool=1, gamma=0.0):
    """y_star of uint8 images, float32 (n, side^2, D_f), by other means than the script's own."""
    rows = []
    for part in images.split(500):
        y = encoder(to_float(part)).float()
        maps = F.avg_pool2d(y.mT.unflatten(2, (pool * side, pool * side)), pool)
        rows.append(maps.flatten(2).mT)
    y = torch.cat(rows)
    if gamma:
        std, mean = torch.std_mean(y, 1, keepdim=True)
        y = (y - gamma * mean) / (std + 1e-6)
    return y


@functools.lru_cache(maxsize=4)
def targets(preset, data, image_size, device, spec, side, pool, gamma):
    """tokens_of the images of the readout, and of the held-out ones, for one encoder."""
    m, encoder = material(preset, data, image_size, device), load_encoder(spec, pool * side)
    encoder = encoder.to(device)
    part = lambda images: tokens_of(encoder, images, side, pool, gamma)
    return part(m.fit[:SIZES[preset]["read"]]), part(m.test)


def teacher_seconds(teacher, device):
    """Seconds that simsiam.py needs for this file: some of its steps here, times their number."""
    with safe_open(teacher, "pt") as f:
        about = f.metadata()
    argv = ["--backbone", about["timm"], "--backbone-args", about["args"]]
    cfg = parse_config(simsiam.Config, simsiam.PRESETS, (), argv)
    model = simsiam.build(cfg).to(device)
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    images = torch.rand(cfg.batch_size, 3, int(about["image_size"]), int(about["image_size"]))
    for k in range(5):
        if k == 2:
            torch.cuda.synchronize() if device.type == "cuda" else None
            start = time.perf_counter()
        views = (simsiam.augment(images.to(device) * 2 - 1) for _ in range(2))
        with autocast(cfg, device):
            simsiam.simsiam_loss(model, None, *views)[0].backward()
        opt.step()
        opt.zero_grad()
    torch.cuda.synchronize() if device.type == "cuda" else None
    return (time.perf_counter() - start) / 3 * int(about["steps"])


# ---- instruments -----------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def material(preset, data, image_size, device):
    """What all arms are measured with: images and labels to fit and to test on, uint8 and int64;
    the judge, its features of the held-out images that CKNNA takes, the mean and covariance of
    those of real images, and the distance of as many held-out images as there are samples."""
    numbers = SimpleNamespace(**SIZES[preset])
    cfg = SimpleNamespace(data=data, image_size=image_size, batch_size=1, skip_bad=False)
    train, held_out = (load_images(cfg, device, split) for split in ("train", "validation"))
    judge = load_judge(data, image_size, device=device)
    (real, _), _ = parts(load_images(cfg, device))
    reference = statistics(judge, real[:numbers.real])
    if len(held_out.images) < numbers.samples:
        fail(f"{data} holds out {len(held_out.images)} images: the floor needs {numbers.samples}")
    floor = frechet(statistics(judge, held_out.images[:numbers.samples]), reference)
    test = held_out.images[:numbers.test]
    with torch.no_grad():
        judged = torch.cat([judge.features(to_float(x)) for x in test[:2000].split(500)])
    return SimpleNamespace(
        classes=train.classes, judge=judge, judged=judged, reference=reference, floor=floor,
        fit=train.images[:numbers.fit], fit_y=train.labels[:numbers.fit],
        test=test, test_y=held_out.labels[:numbers.test])


def get_material(report, cfg, device):
    """material() of this claim."""
    return material(report["args"].preset, cfg.data, cfg.image_size, device)


def get_targets(report, cfg, device, spec, gamma=0.0):
    """targets() of this claim."""
    return targets(report["args"].preset, cfg.data, cfg.image_size, device, spec,
                   cfg.image_size // cfg.patch, cfg.pool, gamma)


def cknna(f, g, k=10):
    """Alignment of two feature sets (n, D) and (n, D') of the same images by their k nearest
    neighbours (REPA, App. C.1): 1 if equal up to a rotation, near 0 if independent. The unbiased
    form of platonic-rep."""
    def hsic(P, Q):  # both with zero diagonal
        m = len(P)
        ends = P.sum() * Q.sum() / ((m - 1) * (m - 2)) - 2 / (m - 2) * P.sum(0) @ Q.sum(1)
        return ((P * Q.T).sum() + ends) / (m * (m - 3))

    kernels, near = [], []
    for h in (f, g):
        h = F.normalize(h.double())
        K = (h @ h.T).fill_diagonal_(-torch.inf)
        near.append(torch.zeros_like(K, dtype=torch.bool).scatter_(1, K.topk(k).indices, True))
        kernels.append(K.fill_diagonal_(0))
    (K, L), (a, b) = kernels, near
    both = hsic(K * (a & b), L * (a & b))
    return (both / (hsic(K * a, K * a) * hsic(L * b, L * b)).sqrt()).item()


def constant_answer(y_star):
    """The answer that is best without looking, one a position: (n, N, D_f) -> (N, D_f)."""
    return F.normalize(y_star, dim=-1).mean(0)


def readout(h, y_star, h_test, ridge=1e-3):
    """Ridge regression from tokens (n, N, D) to the direction of tokens (n, N, D_f), one map for
    all positions and a mean of its own at each; its answer to h_test, (m, N, D_f)."""
    y_star = F.normalize(y_star, dim=-1)
    centre, middle = h.mean(0), y_star.mean(0)
    scale = (h - centre).square().mean((0, 1)).sqrt() + 1e-6  # (D,)
    X, X_test = (((f - centre) / scale).flatten(0, 1).double() for f in (h, h_test))
    Y = (y_star - middle).flatten(0, 1).double()
    gram = X.T @ X / len(X) + ridge * torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    W = torch.linalg.solve(gram, X.T @ Y / len(X))
    return middle + (X_test @ W).float().unflatten(0, h_test.shape[:2])


def contrasts(p, y_star):
    """Mean cosine of tokens p and y_star (n, N, D_f) at matched positions; how far it is above
    that of other positions in the image, the best of their mean and the seven turned or mirrored
    grids; and how far above that of the same position in another image."""
    p, y_star = F.normalize(p, dim=-1), F.normalize(y_star, dim=-1)
    n, N, _ = p.shape
    pairs = torch.einsum("bnd,bmd->nm", p, y_star) / n  # (N, N), mean over images
    match, index = pairs.trace() / N, torch.arange(N, device=p.device)
    grid = index.view(math.isqrt(N), -1)
    turned = [torch.rot90(g, k).flatten() for g in (grid, grid.T) for k in range(4)][1:]
    others = [pairs[index, g].mean() for g in turned]
    others.append((pairs.sum() - pairs.trace()) / (N * (N - 1)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(p.device)
    another = torch.empty_like(order)
    another[order] = order.roll(1)  # none is its own
    elsewhere = (p * y_star[another]).sum(-1).mean()
    return match.item(), (match - max(others)).item(), (match - elsewhere).item()


def first_reach(marks, curve, goal):
    """Steps after which a curve, measured at marks, first is as low as the goal; inf: never."""
    for i, value in enumerate(curve):
        if value <= goal and i == 0:
            return marks[0]
        if value <= goal:
            share = (curve[i - 1] - goal) / (curve[i - 1] - value)
            return marks[i - 1] + share * (marks[i] - marks[i - 1])
    return math.inf


def speed_ratio(marks, slow, fast):
    """Steps after which one curve first is as low as it ever gets, over those of the other."""
    goal = min(slow)
    return first_reach(marks, slow, goal) / first_reach(marks, fast, goal)


@torch.no_grad()
def look(net, images, t, cfg, device, seed):
    """Of uint8 images (n, 3, S, S) at time t, without a class: mean tokens of each block (depth, n,
    D), tokens of the aligned one (n, N, D), p (n, N, D_f) or None, and the mean squared error of
    v. The noise depends on the seed."""
    kept, rows, generator = [], [], torch.Generator().manual_seed(seed)
    hooks = [block.register_forward_hook(lambda m, args, out: kept.append(out.float()))
             for block in net.blocks]
    for part in images.split(500):
        x0 = to_float(part)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        alpha, sigma, d_alpha, d_sigma = script.interpolant(cfg.path, x0.new_full((1,), t))
        y = torch.full((len(x0),), net.classes, device=device)
        kept.clear()
        with autocast(cfg, device):
            v_hat, p = net(alpha * x0 + sigma * eps, x0.new_full((len(x0),), t), y, align=True)
        error = (v_hat.float() - d_alpha * x0 - d_sigma * eps).square().mean((1, 2, 3))
        rows.append((torch.stack([h.mean(1) for h in kept]), kept[net.align_depth - 1],
                     p if p is None else p.float(), error))
    for hook in hooks:
        hook.remove()
    means, h, p, error = zip(*rows)
    p = p[0] if p[0] is None else torch.cat(p)
    return torch.cat(means, 1), torch.cat(h), p, torch.cat(error).mean().item()


def examine(report, net, cfg, device):
    """Probe and CKNNA of every block, readout, alignment and error of v, at every t."""
    m, metrics = get_material(report, cfg, device), {}
    taught, seen = get_targets(report, cfg, device, report["teacher"])
    answer = F.cosine_similarity(seen, constant_answer(taught), dim=-1).mean().item()
    n = len(m.judged)
    if cfg.lam:  # what this arm is aligned with
        given, y_star = get_targets(report, cfg, device, cfg.encoder, cfg.spatial_norm)
        constant = F.cosine_similarity(y_star, constant_answer(given), dim=-1).mean().item()
        metrics["constant"] = constant
    for i, t in enumerate(TIMES):
        fit, h_fit, _, _ = look(net, m.fit, t, cfg, device, 100 + i)
        test, h, p, metrics[f"error_{t}"] = look(net, m.test, t, cfg, device, 200 + i)
        for k, (a, b) in enumerate(zip(fit, test), 1):
            metrics[f"probe_{k}_{t}"] = simsiam.linear_probe(a, m.fit_y, b, m.test_y, m.classes)
            metrics[f"cknna_{k}_{t}"] = cknna(b[:n], seen[:n].mean(1))
            metrics[f"judge_{k}_{t}"] = cknna(b[:n], m.judged)
        read = readout(h_fit[:len(taught)], taught, h)
        metrics[f"readout_{t}"] = F.cosine_similarity(read, seen, dim=-1).mean().item() - answer
        if cfg.lam:
            cosine, metrics[f"place_{t}"], metrics[f"image_{t}"] = contrasts(p, y_star)
            metrics[f"aligned_{t}"] = cosine - constant
    for kind in ("probe", "cknna", "judge"):
        blocks = [sum(metrics[f"{kind}_{k}_{t}"] for t in TIMES) / len(TIMES)
                  for k in range(1, cfg.depth + 1)]
        metrics |= {kind: blocks[cfg.align_depth - 1], f"best_{kind}": max(blocks)}
    if cfg.lam:
        metrics["aligned"] = sum(metrics[f"aligned_{t}"] for t in TIMES) / len(TIMES)
    return metrics


# ---- arms ------------------------------------------------------------------------------


@torch.no_grad()
def draw_samples(report, net, cfg, device):
    """size.samples images, uint8, from the same noise in every arm."""
    rows = []
    for i, y in enumerate(torch.zeros(size(report).samples, dtype=torch.int64).split(256)):
        generator = torch.Generator().manual_seed(i)
        rows.append(to_uint8(script.draw(net, None, y, cfg, device, generator)))
    return torch.cat(rows)


@contextlib.contextmanager
def exchanged_targets(active):
    """In the block the script aligns each image of a batch with the tokens of the one before."""
    own = script.teacher_tokens
    if active:
        script.teacher_tokens = lambda *args: own(*args).roll(1, 0)
    try:
        yield
    finally:
        script.teacher_tokens = own


def train_arm(report, name, seed, folder):
    """Train one arm through the script's own command line; measure its EMA network."""
    metrics = {}
    for steps in size(report).marks:
        argv, cfg = command(report, name, seed, folder, steps)
        torch._dynamo.reset()  # else the ninth network of one process would run uncompiled
        with exchanged_targets(name == "shuffled"):
            script.main(argv)  # goes on from the mark before
        device, saved = setup(cfg), load_checkpoint(folder / "last.pt")
        net = script.build(cfg, saved["classes"], saved["width"]).to(device).eval()
        net.load_state_dict(saved["ema"])
        samples, m = draw_samples(report, net, cfg, device), get_material(report, cfg, device)
        metrics[f"fd_{steps}"] = frechet(statistics(m.judge, samples), m.reference)
    metrics |= {"fd": metrics[f"fd_{steps}"], "fd_floor": m.floor}
    torch.save(samples[:16].cpu(), folder / "samples.pt")
    lines = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    before = [0, *(row["step"] for row in lines)]
    metrics["train_s"] = sum((row["step"] - k) * cfg.batch_size / row["images_per_s"]
                             for row, k in zip(lines, before))
    trained = cfg.lam and cfg.encoder == report["teacher"]
    metrics["total_s"] = metrics["train_s"] + (
        report["done"]["teacher", "teacher"][0]["seconds"] if trained else 0.0)
    return metrics | examine(report, net, cfg, device)


def teacher_arm(report, kind, folder):
    """Probe of mean tokens of an encoder, or of the pixels averaged over an 8 x 8 grid."""
    _, cfg = command(report, "REPA", 0, folder, 1)
    device = setup(cfg)
    m = get_material(report, cfg, device)
    if kind == "pixels":
        f, g = (F.adaptive_avg_pool2d(to_float(x), 8).flatten(1) for x in (m.fit, m.test))
    else:
        side = cfg.image_size // cfg.patch
        encoder = load_encoder(report[kind], cfg.pool * side).to(device)
        f, g = (tokens_of(encoder, x, side, cfg.pool).mean(1) for x in (m.fit, m.test))
    metrics = {"probe": simsiam.linear_probe(f, m.fit_y, g, m.test_y, m.classes)}
    if kind == "teacher":
        metrics["seconds"] = teacher_seconds(report["file"], device)
    return metrics


# ---- verdicts --------------------------------------------------------------------------


def above(a, b):
    """Whether an arm's values a, one a seed, are above b, in conclude's words: the docstring's rule
    for two arms."""
    a, b = torch.tensor(a).double(), torch.tensor(b).double()
    gap, spread = (a.mean() - b.mean()).item(), (a.std() + b.std()).item()
    if abs(gap) > spread and ((a > b).all() if gap > 0 else (a < b).all()):
        return "as in the paper" if gap > 0 else "contradicted"
    return "not resolved"


def together(words):
    """One word for those of several comparisons {name: word}, by the docstring's rule."""
    print(words)
    agree, against = (sum(w == word for w in words.values())
                      for word in ("as in the paper", "contradicted"))
    if agree == len(words):
        return "as in the paper"
    if agree > len(words) / 2:
        return "partly"
    return "contradicted" if not agree and against > len(words) / 2 else "not resolved"


def hold(conditions):
    """The words of conditions {name: bool}."""
    return {name: "as in the paper" if ok else "contradicted" for name, ok in conditions.items()}


def judge_claims(report):
    """Hold the numbers against the docstring."""
    get = functools.partial(values, report, "arms")
    block, depth, marks = report["align_depth"], report["depth"], size(report).marks
    taught = mean(report, "teacher", "teacher", "probe")
    best = max(v for k in range(1, depth + 1) for t in TIMES
               for v in get("vanilla", f"probe_{k}_{t}"))
    print(f"probe of the teacher {taught:.3f}, of vanilla's best block {best:.3f}")
    conclude(report, "teacher", "the encoder knows more than the diffusion model (Fig. 2)",
             verdict({"above vanilla's best": taught > best}))

    def say(table, claim, word):
        conclude(report, table, claim, word if taught > best else "not resolved")

    gain = lambda metric, other="vanilla": above(get("REPA", metric), get(other, metric))
    say("probe", "aligned block: better features at every noise level (Fig. 3, Tab. 7: 55 to 69 % "
        "in the run of SiT-L/2)", together({t: gain(f"probe_{block}_{t}") for t in TIMES}))
    say("cknna", "alignment with the encoder rises at every noise level (Fig. 3)", together(
        {t: gain(f"cknna_{block}_{t}") for t in TIMES}))
    say("best", "the best block gets better (Fig. 3)", together(
        {kind: gain(f"best_{kind}") for kind in ("probe", "cknna")}))
    say("judge", "alignment rises with a network that was not used in training (no table)",
        together({t: gain(f"judge_{block}_{t}") for t in TIMES} | {"best": gain("best_judge")}))
    first, last = (get("REPA", f"aligned_{t}") for t in (TIMES[0], TIMES[-1]))
    say("alignment", "L_REPA learns more than the mean of y_*, and more than a readout (Eq. 8)",
        together(hold({"above the constant": min(first) > 0.05,
                       "falls with t": all(a > b for a, b in zip(first, last))})
                 | {("readout", t): gain(f"readout_{t}") for t in TIMES}))
    say("place", "L_REPA matches token n with token n of its own image (Eq. 8)", together(hold(
        {(kind, t): min(get("REPA", f"{kind}_{t}")) > 0.05
         for kind in ("place", "image") for t in TIMES})))
    away = max(abs(v) for t in TIMES for v in get("shuffled", f"aligned_{t}"))
    say("shuffled", "alignment with another image teaches nothing (no table)", together(
        hold({"near the constant": away < 0.05}) | {"probe": gain("probe", "shuffled")}))
    say("random", "what the encoder has learned matters (no table has a random one; Tab. 2: FID "
        "12.5 with MAE, 9.7 with DINOv2)", gain("probe", "random"))
    say("fd", "FID 33.0 -> 24.4 with SiT-B/2, 400K steps, classes and the SDE (Tab. 3)",
        above(get("vanilla", "fd"), get("REPA", "fd")))
    say("irepa", "FID 22.75 -> 21.40 with iREPA, SiT-B/2 (its paper)",
        above(get("REPA", "fd"), get("iREPA", "fd")))
    if len(marks) > 1:
        curves = lambda name: zip(*(get(name, f"fd_{s}") for s in marks))
        ratios = [speed_ratio(marks, *both) for both in zip(curves("vanilla"), curves("REPA"))]
        print("speed", *(f"{r:.2f}" for r in ratios))
        say("speed", "17.5 times faster than vanilla (Fig. 1, SiT-XL/2)", faster(ratios))


def faster(ratios):
    """The word of the docstring for ratios of steps, one a seed."""
    if min(ratios) > 1.2:
        return "as in the paper"
    return "contradicted" if max(ratios) < 1 / 1.2 else "not resolved"


def draw_figure(report):
    """Probe and CKNNA by block and by t, alignment, Frechet distance, samples of two arms."""
    block, depth, marks = report["align_depth"], report["depth"], size(report).marks
    blocks, get = range(1, depth + 1), functools.partial(values, report, "arms")
    names = list(ARMS)

    def line(ax, name, x, rows, style="o-", label=None):  # rows: for each x a list over the seeds
        rows = torch.tensor(rows)
        ax.errorbar(x, rows.mean(1), rows.std(1, correction=0), fmt=style, lw=1, ms=3,
                    label=label or name, color=f"C{names.index(name)}")

    def by_block(name, kind):  # mean over t
        rows = [[get(name, f"{kind}_{k}_{t}") for t in TIMES] for k in blocks]
        return torch.tensor(rows).mean(1).tolist()

    by_time = lambda name, kind: [get(name, f"{kind}_{t}") for t in TIMES]
    with figure(f"{report['path']}.png", 2, 4, (3.0, 2.5)) as axes:
        (a, b, c, d), (e, f, g, picture) = axes
        for name in names:
            for ax, kind in ((a, "probe"), (c, "cknna"), (d, "judge")):
                line(ax, name, blocks, by_block(name, kind))
            line(b, name, TIMES, by_time(name, f"probe_{block}"))
            line(e, name, TIMES, by_time(name, "readout"), "x:")
            if name != "vanilla":
                line(e, name, TIMES, by_time(name, "aligned"))
            if len(marks) > 1:
                line(g, name, marks, [get(name, f"fd_{s}") for s in marks])
            else:
                g.bar(name, mean(report, "arms", name, "fd"), color="0.8")
                g.plot([name] * len(get(name, "fd")), get(name, "fd"), "k.")
                g.tick_params("x", labelsize=7)
        for name in ("REPA", "shuffled"):
            line(f, name, TIMES, by_time(name, "place"), "o-", f"{name}, other position")
            line(f, name, TIMES, by_time(name, "image"), "x:", f"{name}, other image")
        a.axhline(mean(report, "teacher", "teacher", "probe"), color="0.5", ls=":")
        g.axhline(mean(report, "arms", "vanilla", "fd_floor"), color="0.5", ls=":")
        for ax, title, label in (
                (a, "linear probe, mean over t", "block"), (b, f"linear probe, block {block}", "t"),
                (c, "CKNNA with the teacher", "block"), (d, "CKNNA with the judge", "block"),
                (e, "cosine above the constant\n(dotted: ridge readout)", "t"),
                (f, "matched tokens above", "t"), (g, "Frechet distance (dotted: floor)", "")):
            ax.set_title(title, fontsize=10)
            ax.set_xlabel(label)
        a.legend(fontsize=7)
        f.set_ylim(top=1.6 * f.get_ylim()[1])
        f.legend(fontsize=6, loc="upper right")
        rows = []
        for name in ("vanilla", "REPA"):
            file = arm_file(report, "arms", name, size(report).seeds[0]).with_name("samples.pt")
            rows.append(torch.load(file, weights_only=True)[:12].unflatten(0, (4, 3)))
        images = torch.cat(rows, 1)  # (4, 6, 3, S, S)
        picture.imshow(images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1),
                       interpolation="nearest")
        picture.axvline(3 * images.shape[-1] - 0.5, color="w", lw=3)
        picture.set(xticks=[], yticks=[])
        picture.set_title("samples: vanilla | REPA", fontsize=10)


def run_arms(report, jobs):
    """Arms (name, seed), one after the other; with the cpu preset two at a time, a thread each."""
    if report["args"].preset == "gpu":
        for name, seed in jobs:
            arm(report, "arms", name, seed, functools.partial(train_arm, report, name, seed))
        return
    files = {job: arm_file(report, "arms", *job) for job in jobs}
    with mp.get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        found = {job: pool.apply_async(train_arm, (report, *job, file.parent))
                 for job, file in files.items() if not file.exists()}
        for job in jobs:
            arm(report, "arms", *job, lambda folder, job=job: found[job].get())


def main(argv=None):
    others = [Path("runs/teacher-cifar10/teacher.safetensors"), judge_file("torch/cifar10", 32)]
    report = open_report("repa", __doc__, argv, also=(
        "simsiam.py", "tests/claims/judge.py", "assets/teacher.safetensors",
        judge_file("shapes", 32), *(path.resolve() for path in others if path.exists())))
    report["random"] = str(report["arms"] / "random.safetensors")
    _, cfg = command(report, "REPA", 0, report["arms"], 1)
    file = next((p for p in (Path(cfg.encoder), ROOT / cfg.encoder) if p.exists()), None)
    if file is None:
        fail(f"{cfg.encoder} is missing: see the docstring for how to make it")
    report |= {"teacher": cfg.encoder, "file": file, "align_depth": cfg.align_depth,
               "depth": cfg.depth}
    images = get_material(report, cfg, setup(cfg)).fit[:1000].cpu()
    random_encoder(report["random"], file, images, cfg.pool * cfg.image_size // cfg.patch)
    for kind in ("teacher", "random", "pixels"):
        arm(report, "teacher", kind, 0, functools.partial(teacher_arm, report, kind))
    run_arms(report, [(name, seed) for seed in size(report).seeds for name in (
        ARMS | (MORE if report["args"].preset == "gpu" else {}))])
    judge_claims(report)
    draw_figure(report)


if __name__ == "__main__":
    main()
