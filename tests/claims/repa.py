"""Aligning a diffusion transformer with a frozen encoder: its features, and its samples.

    python -m tests.claims.repa                  # 23 minutes, 1 CPU core
    python -m tests.claims.repa --preset gpu     # CIFAR-10: 3 seeds, FD along the run; needs
        # python simsiam.py --data torch/cifar10 --steps 20000 --out runs/teacher-cifar10
        # python -m tests.claims.judge --data torch/cifar10 --image-size 32

Arms, with equal seeds, data order, noise, steps and the learning rate that was best for vanilla:
    vanilla  --lam 0
    REPA     --lam 0.5
    iREPA    REPA with --projector conv --spatial-norm 0.6
    random   REPA towards the same encoder with random weights; its BatchNorms have seen no data, so
             its tokens vary little (a constant answers them with cosine 0.92, the teacher's 0.73):
             an easy control to beat
On a CPU a patch is 8 pixels wide: 16 tokens, and the teacher's 8 x 8 are averaged over 2 x 2.
Unconditional: labels of ten classes would already hand the network what the teacher can give.
The rate was chosen on vanilla on a CPU only; gpu takes the preset's.
Rates tried for vanilla (cpu, 300 steps, seed 0): 5e-4, 1e-3, 2e-3, 4e-3 and 8e-3, with losses of
0.400, 0.352, 0.329, 0.317 and 0.353 over the last 50 steps.
What the paper reports (arXiv:2410.06940v1) and what counts as agreeing, stated before the run:

teacher    The precondition: the encoder's linear probe beats vanilla's best block at its best t.
           Agrees if so at every seed; if not, the next two tables say nothing about REPA.
probe      Fig. 3, Tab. 7: the aligned block has better features (SiT-L/2 55 to 69 % on ImageNet),
           at every noise level. Agrees if the linear probe of the aligned block is above vanilla's
           at every t and seed.
cknna      Fig. 3: alignment (CKNNA) with the encoder rises. Agrees if at the aligned block it is
           above vanilla's at every t and seed, for the teacher and for a second network that was
           not used in training (the judge, a supervised classifier).
alignment  Eq. 8 is learned, not only its mean: held-out cos(y_*, h_phi) exceeds that of the best
           constant answer (the mean direction of y_* at that token, from other images) and falls
           with t. Agrees if by more than 0.05 at t = 0.1 and more at the first t than at the last,
           at every seed.
random     Tab. 2: the encoder matters. Agrees if the probe of the aligned block, mean over t, is
           higher with the teacher than with the random encoder at every seed.
fd         Tab. 3: FID 33.0 -> 24.4 (SiT-B/2, 400K steps), less for smaller networks. Agrees if
           REPA's Frechet distance is lower at every seed and the means differ by more than the sum
           of the two standard deviations; contradicted if it is higher by that rule.
irepa      iREPA (arXiv:2512.10794): 22.75 -> 21.40 (SiT-B/2). The same rule, iREPA against REPA.
speed      Fig. 1: >17.5 times faster (SiT-XL/2). gpu only. steps_ratio: vanilla's steps over those
           after which REPA is as good as vanilla at its end. Agrees if above 1 at every seed.

probe_<block>_<t>   accuracy of ridge regression from the mean token, EMA weights, no class, same
                    noise in all arms; fitted on training images, tested on held-out ones
cknna_, judge_      k = 10, n held-out images, mean tokens: with the teacher, with the judge
probe, cknna, judge, aligned   of the aligned block, mean over t; aligned: above the constant
error_<t>           held-out |v_hat - v|^2 a number      fd, fd_floor   2,048 samples; real images
train_s, total_s    seconds of training; with those that the teacher took (a few steps of it timed
                    here, times its number of steps)
"""
import functools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import repa as script
import simsiam
from common import (autocast, fail, figure, load_checkpoint, load_encoder, load_images,
                    parse_config, setup, to_uint8)
from tests.claims.judge import frechet, load_judge, parts, statistics, to_float
from tests.claims.report import (ROOT, arm, arm_file, conclude, mean, open_report, values,
                                 verdict)

TIMES = (0.1, 0.3, 0.5, 0.7)
ARMS = {
    "vanilla": ["--lam", 0],
    "REPA": ["--lam", 0.5],
    "iREPA": ["--lam", 0.5, "--projector", "conv", "--spatial-norm", 0.6],
    "random": ["--lam", 0.5, "--encoder", "RANDOM"],
}
MORE = {  # gpu only, and without a claim: the early stop of HASTE, the other path
    "REPA, stopped": ARMS["REPA"] + ["--stop-align", 10_000],
    "vanilla, vp": ARMS["vanilla"] + ["--path", "vp"],
    "REPA, vp": ARMS["REPA"] + ["--path", "vp"],
}
SIZES = {  # marks: steps after which the Frechet distance is measured
    "cpu": dict(seeds=(0, 1), marks=(700,), fit=5000, test=2500, samples=2048, real=10_000, flags=[
        "--image-size", 32, "--lr", 4e-3, "--batch-size", 64, "--patch", 8, "--pool", 2, "--dim",
        192, "--heads", 3,
        "--log-every", 50, "--sampling-steps", 10]),
    "gpu": dict(seeds=(0, 1, 2), marks=(1000, 2000, 4000, 7000, 10_000, 14_000, 20_000), fit=20_000,
                test=4000, samples=10_000, real=45_000, flags=["--preset", "cifar10"]),
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


def random_encoder(path, teacher):
    """Write the teacher's network with random weights, as common.load_encoder reads it."""
    with safe_open(teacher, "pt") as f:
        about = {k: f.metadata()[k] for k in ("timm", "args", "mean", "std")}
    torch.manual_seed(1000)
    model = timm.create_model(about["timm"], num_classes=0, **json.loads(about["args"]))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, about)


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


@functools.lru_cache(maxsize=1)
def material(preset, data, image_size, device):
    """What all arms are measured with: images and labels to fit and to test on, uint8 and int64;
    the judge, and the mean and covariance of its features for real images, and their floor."""
    numbers = SimpleNamespace(**SIZES[preset])
    cfg = SimpleNamespace(data=data, image_size=image_size, batch_size=1, skip_bad=False)
    train, held_out = (load_images(cfg, device, split) for split in ("train", "validation"))
    judge = load_judge(data, image_size, device=device)
    (real, _), (others, _) = parts(load_images(cfg, device))
    reference = statistics(judge, real[:numbers.real])
    floor = frechet(statistics(judge, others[:numbers.samples]), reference)
    return SimpleNamespace(
        classes=train.classes, judge=judge, reference=reference, floor=floor,
        fit=train.images[:numbers.fit], fit_y=train.labels[:numbers.fit],
        test=held_out.images[:numbers.test], test_y=held_out.labels[:numbers.test])


def get_material(report, cfg, device):
    """material() of this claim."""
    return material(report["args"].preset, cfg.data, cfg.image_size, device)


def cknna(f, g, k=10):
    """Alignment of two feature sets (n, D) and (n, D') of the same images by their k nearest
    neighbours (REPA, App. C.1): 1 if equal up to a rotation, near 0 if independent."""
    def hsic(P, Q):  # unbiased, both with zero diagonal
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


@torch.no_grad()
def tokens_of(encoder, images, cfg, device):
    """The encoder's tokens y_star as the run sees them, (n, N, D_f)."""
    side = script.input_shape(cfg)[1] // cfg.patch
    with autocast(cfg, device):
        rows = [script.teacher_tokens(encoder, to_float(x), side, cfg.pool, cfg.spatial_norm)
                for x in images.split(500)]
    return torch.cat(rows)


@torch.no_grad()
def look(net, images, t, cfg, device, seed):
    """Of uint8 images (n, 3, S, S) at time t, without a class: mean tokens of each block (depth, n,
    D), p (n, N, D_f) or None, and the mean squared error of v. The noise depends on the seed."""
    kept, rows, generator = [], [], torch.Generator().manual_seed(seed)
    hooks = [block.register_forward_hook(lambda m, args, out: kept.append(out.float().mean(1)))
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
        rows.append((torch.stack(kept), p if p is None else p.float(), error))
    for hook in hooks:
        hook.remove()
    h, p, error = zip(*rows)
    return torch.cat(h, 1), p[0] if p[0] is None else torch.cat(p), torch.cat(error).mean().item()


def examine(report, net, cfg, device):
    """Probe, CKNNA, alignment above the constant answer and error of v, at every block and t."""
    m, metrics, n = get_material(report, cfg, device), {}, min(2000, size(report).test)
    teacher = load_encoder(report["teacher"], cfg.pool * net.side).to(device)
    with torch.no_grad():
        seen = torch.cat([teacher(to_float(x)).float().mean(1) for x in m.test[:n].split(500)])
        judged = torch.cat([m.judge.features(to_float(x)) for x in m.test[:n].split(500)])
    if cfg.lam:
        encoder = script.load_teacher(cfg, device)
        y_star = tokens_of(encoder, m.test, cfg, device)
        constant = F.normalize(tokens_of(encoder, m.fit, cfg, device), dim=-1).mean(0)  # (N, D_f)
        metrics["constant"] = F.cosine_similarity(y_star, constant, dim=-1).mean().item()
    for i, t in enumerate(TIMES):
        h_fit, _, _ = look(net, m.fit, t, cfg, device, 100 + i)
        h, p, metrics[f"error_{t}"] = look(net, m.test, t, cfg, device, 200 + i)
        for k, (a, b) in enumerate(zip(h_fit, h), 1):
            metrics[f"probe_{k}_{t}"] = simsiam.linear_probe(a, m.fit_y, b, m.test_y, m.classes)
            metrics[f"cknna_{k}_{t}"] = cknna(b[:n], seen)
            metrics[f"judge_{k}_{t}"] = cknna(b[:n], judged)
        if p is not None:
            cosine = F.cosine_similarity(p, y_star, dim=-1).mean().item()
            metrics[f"aligned_{t}"] = cosine - metrics["constant"]
    for kind in ("probe", "cknna", "judge"):
        at = [metrics[f"{kind}_{cfg.align_depth}_{t}"] for t in TIMES]
        metrics[kind] = sum(at) / len(at)
    if cfg.lam:
        metrics["aligned"] = sum(metrics[f"aligned_{t}"] for t in TIMES) / len(TIMES)
    return metrics


@torch.no_grad()
def draw_samples(report, net, cfg, device):
    """size.samples images, uint8, from the same noise in every arm."""
    rows = []
    for i, y in enumerate(torch.zeros(size(report).samples, dtype=torch.int64).split(256)):
        generator = torch.Generator().manual_seed(i)
        rows.append(to_uint8(script.draw(net, None, y, cfg, device, generator)))
    return torch.cat(rows)


def train_arm(report, name, seed, folder):
    """Train one arm through the script's own command line; measure its EMA network."""
    metrics = {}
    for steps in size(report).marks:
        argv, cfg = command(report, name, seed, folder, steps)
        torch._dynamo.reset()  # else the ninth network of one process would run uncompiled
        script.main(argv)  # goes on from the mark before
        device, saved = setup(cfg), load_checkpoint(folder / "last.pt")
        net = script.build(cfg, saved["classes"], saved["width"]).to(device).eval()
        net.load_state_dict(saved["ema"])
        samples, m = draw_samples(report, net, cfg, device), get_material(report, cfg, device)
        metrics[f"fd_{steps}"] = frechet(statistics(m.judge, samples), m.reference)
    metrics |= {"fd": metrics[f"fd_{steps}"], "fd_floor": m.floor}
    torch.save(samples[:25].cpu(), folder / "samples.pt")
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
        encoder = load_encoder(report[kind], cfg.pool * cfg.image_size // cfg.patch).to(device)
        f, g = (tokens_of(encoder, x, cfg, device).mean(1) for x in (m.fit, m.test))
    metrics = {"probe": simsiam.linear_probe(f, m.fit_y, g, m.test_y, m.classes)}
    if kind == "teacher":
        metrics["seconds"] = teacher_seconds(report["file"], device)
    return metrics


def steps_ratio(report, seed_index):
    """Vanilla's steps over those after which REPA's curve first reaches vanilla's last FD."""
    marks = size(report).marks
    curve = lambda name: [values(report, "arms", name, f"fd_{s}")[seed_index] for s in marks]
    goal, fd = curve("vanilla")[-1], curve("REPA")
    for i, value in enumerate(fd):
        if value <= goal:
            if i == 0:
                return marks[-1] / marks[0]
            share = (fd[i - 1] - goal) / (fd[i - 1] - value)
            return marks[-1] / (marks[i - 1] + share * (marks[i] - marks[i - 1]))
    return 0.0  # not within the run


def lower(report, name, other):
    """Whether the Frechet distance of an arm is lower than another's, in conclude's words."""
    a, b = (torch.tensor(values(report, "arms", k, "fd")) for k in (name, other))
    gap, spread = (b.mean() - a.mean()).item(), (a.std() + b.std()).item()
    print(f"fd of {other} minus that of {name}: {gap:.3f}; sum of the spreads {spread:.3f}")
    if (a < b).all() and gap > spread:
        return "as in the paper"
    return "contradicted" if (a > b).all() and -gap > spread else "not resolved"


def judge_claims(report):
    """Hold the numbers against the docstring."""
    get = functools.partial(values, report, "arms")
    block, depth = report["align_depth"], report["depth"]
    above = lambda kind, t: all(a > b for a, b in zip(get("REPA", f"{kind}_{block}_{t}"),
                                                      get("vanilla", f"{kind}_{block}_{t}")))
    taught = mean(report, "teacher", "teacher", "probe")
    best = max(v for k in range(1, depth + 1) for t in TIMES
               for v in get("vanilla", f"probe_{k}_{t}"))
    print(f"probe of the teacher {taught:.3f}, of vanilla's best block {best:.3f}")
    conclude(report, "teacher", "the encoder knows more than the diffusion model (Fig. 2)",
             verdict({"above vanilla's best": taught > best}))
    conclude(report, "probe", "aligned block: better features at every noise level (Fig. 3, Tab. "
             "7: 55 to 69 % in the run of SiT-L/2)",
             verdict({t: above("probe", t) for t in TIMES}))
    conclude(report, "cknna", "alignment with the encoder rises at every noise level (Fig. 3)",
             verdict({(kind, t): above(kind, t) for kind in ("cknna", "judge") for t in TIMES}))
    first, last = (get("REPA", f"aligned_{t}") for t in (TIMES[0], TIMES[-1]))
    conclude(report, "alignment", "L_REPA learns more than the mean of y_* (Eq. 8)", verdict(
        {"above the constant": min(first) > 0.05,
         "falls with t": all(a > b for a, b in zip(first, last))}))
    both = zip(get("REPA", "probe"), get("random", "probe"))
    conclude(report, "random", "what the encoder has learned matters (Tab. 2: FID 12.5 with MAE, "
             "9.7 with DINOv2)", verdict({"probe above random's": all(a > b for a, b in both)}))
    conclude(report, "fd", "FID 33.0 -> 24.4 with SiT-B/2, 400K steps (Tab. 3)",
             lower(report, "REPA", "vanilla"))
    conclude(report, "irepa", "FID 22.75 -> 21.40 with iREPA, SiT-B/2 (its paper)",
             lower(report, "iREPA", "REPA"))
    if len(size(report).marks) > 1:
        ratios = [steps_ratio(report, i) for i in range(len(size(report).seeds))]
        print("steps ratio", *(f"{r:.2f}" for r in ratios))
        conclude(report, "speed", "17.5 times faster than vanilla (Fig. 1, SiT-XL/2)",
                 verdict({i: r > 1 for i, r in enumerate(ratios)}))


def draw_figure(report):
    """Probe and CKNNA by block and by t, alignment, Frechet distance, samples of two arms."""
    block, depth, marks = report["align_depth"], report["depth"], size(report).marks
    blocks, get = range(1, depth + 1), functools.partial(values, report, "arms")
    names = list(ARMS)

    def line(ax, name, x, rows):  # rows: for each x a list over the seeds
        rows = torch.tensor(rows)
        ax.errorbar(x, rows.mean(1), rows.std(1, correction=0), fmt="o-", lw=1, ms=3, label=name,
                    color=f"C{names.index(name)}")

    def by_block(name, kind):  # mean over t
        rows = [[get(name, f"{kind}_{k}_{t}") for t in TIMES] for k in blocks]
        return torch.tensor(rows).mean(1).tolist()

    with figure(f"{report['path']}.png", 2, 4, (3.1, 2.6)) as axes:
        (a, b, c, d), (e, f, *pictures) = axes
        for name in names:
            for ax, kind in ((a, "probe"), (c, "cknna"), (d, "judge")):
                line(ax, name, blocks, by_block(name, kind))
            line(b, name, TIMES, [get(name, f"probe_{block}_{t}") for t in TIMES])
            if name != "vanilla":
                line(e, name, TIMES, [get(name, f"aligned_{t}") for t in TIMES])
            if len(marks) > 1:
                line(f, name, marks, [get(name, f"fd_{s}") for s in marks])
            else:
                f.bar(name, mean(report, "arms", name, "fd"), color="0.8")
                f.plot([name] * len(get(name, "fd")), get(name, "fd"), "k.")
        a.axhline(mean(report, "teacher", "teacher", "probe"), color="0.5", ls=":")
        f.axhline(mean(report, "arms", "vanilla", "fd_floor"), color="0.5", ls=":")
        for ax, title, label in (
                (a, "linear probe, mean over t", "block"), (b, f"linear probe, block {block}", "t"),
                (c, "CKNNA with the teacher", "block"), (d, "CKNNA with the judge", "block"),
                (e, "cosine above the constant", "t"), (f, "Frechet distance (dots: floor)", "")):
            ax.set(title=title, xlabel=label)
        a.legend(fontsize=7)
        for ax, name in zip(pictures, ("vanilla", "REPA")):
            file = arm_file(report, "arms", name, size(report).seeds[0]).with_name("samples.pt")
            images = torch.load(file, weights_only=True).unflatten(0, (5, 5))
            ax.imshow(images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1))
            ax.set(title=f"samples, {name}", xticks=[], yticks=[])


def main(argv=None):
    report = open_report("repa", __doc__, argv, also=("simsiam.py", "assets/teacher.safetensors"))
    report["random"] = str(report["arms"] / "random.safetensors")
    _, cfg = command(report, "REPA", 0, report["arms"], 1)
    file = next((p for p in (Path(cfg.encoder), ROOT / cfg.encoder) if p.exists()), None)
    if file is None:
        fail(f"{cfg.encoder} is missing: see the docstring for how to make it")
    report |= {"teacher": cfg.encoder, "file": file, "align_depth": cfg.align_depth,
               "depth": cfg.depth}
    random_encoder(report["random"], file)
    for kind in ("teacher", "random", "pixels"):
        arm(report, "teacher", kind, 0, functools.partial(teacher_arm, report, kind))
    for seed in size(report).seeds:  # a seed of every arm before the next
        for name in ARMS | (MORE if report["args"].preset == "gpu" else {}):
            arm(report, "arms", name, seed, functools.partial(train_arm, report, name, seed))
    judge_claims(report)
    draw_figure(report)


if __name__ == "__main__":
    main()
