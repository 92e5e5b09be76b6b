"""A frozen encoder's tokens are a wide latent: what a diffusion transformer needs to live in them.

    python -m tests.claims.rae                  # 14 to 26 minutes, 2 CPU cores
    python -m tests.claims.rae --preset gpu     # 32 pixels, larger, three seeds; more than an hour

What the paper reports (arXiv:2510.11690v1) and what counts as agreeing, stated before the run.
`Above`: at every seed, and in the mean by more than both standard deviations together (report.py).
A difference that is not above, nor its opposite, is `not resolved`; some of a table's conditions:
`partly`. Seen before this run: width, shift and robust, run once with these settings, and samples
of the default run at 32 pixels. No arm of the other tables had been run.

width     One image, DiT of width d, tokens of n numbers: fails for d < n (velocity error 0.52 at d
          = 384, n = 768), works from d = n on, and depth does not help. Theory: 1 - d / n of the
          noise cannot be put out, at any time. 16 random tokens, n = 64; `net` is a token-wise MLP,
          three seeds, `DiT` the script's network, one. Reference of net, figures of a run in numpy
          made when this was planned, whose code is not kept: 0.770 0.506 0.271 0.076 0.006 at d =
          16 32 48 64 96. Agrees if the means of net are within 0.03 of it; at d < n no run is more
          than 0.005 below 1 - d / n (the theorem: else the code is wrong) and DiT less than 0.1
          above it; DiT of 96, and both of 16 with a head of 96, are below 0.15; and twice the
          blocks at d = 16 gain less than 0.02.
shift     Not shifting costs DiT-XL gFID 23.08 against 4.81. Here a toy: two modes in m dimensions,
          0.8 and 0.2, exact velocity, share of samples in the large one. The plan's integration:
          without shift 0.805 0.810 0.820 0.840 0.890 0.967 0.9995 1 at m = 16 ... 196608, with
          alpha = sqrt(m / 16) 0.805 to 0.807 (once more in tests/test_rae.py). Agrees if all are
          within 0.01.
robust    Noise in the decoder's training costs rFID (0.49 to 0.57) and gains gFID (4.81 to 4.28).
          Here PSNR of held-out reconstructions with noise of sigma on the tokens; the distances are
          under decoders. Agrees if tau = 0 is above tau = 0.8 at sigma = 0, and tau = 0.8 above
          tau = 0 by 1 dB at sigma = 0.5, 0.8 and 1.2.
widths    G1, on images: d = 48 and 96 against d = 192; n = 160. Agrees if the held-out loss falls
          from 48 to 96 to 192, and the Frechet distance, too; and d = 48 and 96 lie above d = 192
          by half of `gap` or more, what the best linear denoiser of single tokens loses when its
          output has but d dimensions. (Loss above `floor` is the theorem itself.) Twice the blocks
          at d = 96 gain less than a fifth of gap: judged where there are two seeds (gpu).
head      G4, wide head on a base narrower than n (DiT-S 215.76, DiT-DH-S 6.07, DiT-XL 4.28; that of
          the paper's 2.16 is wide enough itself, which is not tried here): d = 96 with blocks of
          192 at the multiply-adds of d = 192. Agrees if its loss and its distance are below those
          of d = 96, and the loss is nearer to that of d = 192 than of d = 96.
shifts    G2, alpha on images: 1, 1.6, 3, 6. The arms have 1.6 unless they say so: sqrt(m / 4096) at
          32 pixels, sqrt(m / 1000) at 16, where the paper's base would shift towards the data
          (0.79). Agrees if the distance at the best alpha above 1 (mean over seeds) is 5 % or more
          below that of alpha = 1, and that alpha is not the last.
decoders  G3, one set of generated tokens, two decoders. Agrees if tau = 0 has the higher distance
          of samples and the lower one of reconstructions.
encoders  G5, the same transformer on tokens of the teacher (n = 160) and on raw patches (n = 48, so
          that m is 0.3 of the others', alpha the same, and no decoder: nothing is lost). Paper:
          patches of 768 numbers, as many as DINOv2-B has: 51.09 against 4.28. Agrees if patches
          have the higher distance. At this size they have less to lose: expected is a
          contradiction, hence rfd and `above` = fd - rfd beside it.
random    Not in the paper: tokens of an untrained encoder of the teacher's architecture (n = 160),
          its BatchNorms calibrated on 1,000 training images. Agrees if its distance is above the
          teacher's. Up to cada574 a condition of encoders (therefore "partly"), not calibrated.
guidance  G6, AutoGuidance by an early, small network (1.51 to 1.13 at w = 1.42). Agrees if the
          distance at the best of w = 1.25, 1.5, 2 (mean over seeds) is 5 % or more below w = 1.
All decoders here are trained with L1 alone; d = 192 is no DiT^DH but a plain DiT.

loss         held-out flow loss a dimension, the law of t of the arm; floor: of any network of that
             width, even if it knew image and noise; gap: see widths
fd, rfd      Frechet distance of samples, of reconstructions, in features of the judge, to 10,000
             real images; fd_floor: of as many held-out ones.  fd_clean: decoder of tau = 0
psnr_<sigma> of held-out reconstructions;  probe, rank: linear probe, effective rank of tokens
"""
import argparse
import contextlib
import functools
import math
from pathlib import Path
from unittest import mock

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import rae as script
from common import autocast, fail, figure, load_checkpoint, load_images, mix, setup, to_uint8
from tests.claims.judge import accuracy, frechet, load_judge, parts, statistics
from tests.claims.repa import random_encoder
from tests.claims.report import (ROOT, arm, arm_file, attempt, conclude, cpu_cores, exceeds, mean,
                                 open_report, overall, values, verdict)

SEEDS = {"cpu": (0, 1), "gpu": (0, 1, 2)}
CHANNELS, TOKENS = 64, 16  # of `width`: numbers n in a token, tokens of the one image
NETS = {  # of `width`: kind, width, blocks, width of the head; reference
    "net 16": ("net", 16, 2, 0, 0.770), "net 32": ("net", 32, 2, 0, 0.506),
    "net 48": ("net", 48, 2, 0, 0.271), "net 64": ("net", 64, 2, 0, 0.076),
    "net 96": ("net", 96, 2, 0, 0.006), "net 16, deep": ("net", 16, 4, 0, None),
    "net 16 + head 96": ("net", 16, 2, 96, None), "DiT 16": ("DiT", 16, 2, 0, None),
    "DiT 48": ("DiT", 48, 2, 0, None), "DiT 96": ("DiT", 96, 2, 0, None),
    "DiT 16, deep": ("DiT", 16, 4, 0, None), "DiT 16 + head 96": ("DiT", 16, 2, 96, None)}
SHIFT = {  # of `shift`: m, share without shift, with it
    16: (0.805, 0.805), 64: (0.810, 0.806), 256: (0.820, 0.806), 1024: (0.840, 0.806),
    4096: (0.890, 0.807), 16384: (0.967, 0.806), 65536: (0.9995, 0.807), 196608: (1.0, 0.806)}
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
DECODERS = {"tau 0.8": [], "tau 0": ["--tau", 0], "tau 0.8 uniform": ["--sigma-law", "uniform"],
            "random": []}
WEAK = ["--dim", 48, "--head-depth", 1]  # of `guidance`; trained for a fifth of the steps
ARMS = {  # flags of the transformers; the head is off unless they say so
    "d 192": [], "d 48": ["--dim", 48], "d 96": ["--dim", 96], "d 96, deep": ["--dim", 96],
    "d 96 + head": ["--dim", 96], "alpha 1": ["--alpha", 1], "alpha 3": ["--alpha", 3],
    "alpha 6": ["--alpha", 6], "uniform t": ["--time-law", "uniform"], "random": [], "pixels": [],
    "weak": WEAK}
ALSO = {  # of a preset: twice the blocks, a head with which d = 96 costs as much as d = 192
    "cpu": {"d 96, deep": ["--depth", 8], "d 96 + head": ["--head-depth", 2]},
    "gpu": {"d 96, deep": ["--depth", 16], "d 96 + head": ["--head-depth", 4]}}
SWEEP = ("alpha 1", "d 192", "alpha 3", "alpha 6")  # of alpha; d 192: 1.6
GUIDANCE = (1.25, 1.5, 2.0)
FLAGS = {
    "cpu": "--image-size 16 --batch-size 64 --lr-flat 250 --ema-decay 0.99 --depth 4 --alpha 1.6 "
           "--decoder-steps 600 --sampling-steps 25 --guidance 1 --compile off",
    "gpu": "--image-size 32 --batch-size 256 --lr-flat 3000 --ema-decay 0.999 --depth 8 "
           "--alpha 1.6 --decoder-steps 4000 --decoder-batch-size 256 --decoder-dim 256 "
           "--decoder-depth 6 --decoder-mlp 1024 --decoder-ema 0.998 --sampling-steps 50 "
           "--guidance 1"}
STEPS = {"cpu": 500, "gpu": 6000}  # of a transformer
COUNT = {"cpu": 1000, "gpu": 5000}  # samples of an arm
TEACHER = "assets/teacher.safetensors"


# ---- exact -----------------------------------------------------------------------------


class TokenNet(nn.Module):
    """One token at a time: residual ReLU blocks of width d, gated by the time; a wide head reads
    the token anew, conditioned on their output: (B, 16, n), (B,), (B,) -> (B, 16, n)."""

    def __init__(self, n, d, blocks, head=0):
        super().__init__()
        self.register_buffer("rate", torch.randn(32))
        self.time = nn.Sequential(nn.Linear(64, 128), nn.SiLU())
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, d))
        widths = [d] * blocks + [head] * bool(head)
        self.embed = nn.ModuleList(nn.Linear(n, w) for w in dict.fromkeys(widths))
        self.condition = nn.Linear(d, 128)
        self.up, self.down, self.gate = (
            nn.ModuleList(nn.Linear(*size(w)) for w in widths)
            for size in (lambda w: (w, 4 * w), lambda w: (4 * w, w), lambda w: (128, 4 * w)))
        self.modulation, self.output = nn.Linear(128, 2 * widths[-1]), nn.Linear(widths[-1], n)
        for module in (*self.gate, self.modulation):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, zt, t, y):
        angle = 2 * math.pi * t[:, None] * self.rate
        c = self.time(torch.cat([angle.sin(), angle.cos()], -1))[:, None]  # (B, 1, 128)
        h = self.embed[0](zt) + self.position
        for up, down, gate in zip(self.up, self.down, self.gate):
            if up.in_features != h.shape[-1]:  # the head
                c, h = c + self.condition(h), self.embed[1](zt)
            h = h + down(F.relu(up(h)) * (1 + gate(c)))
        shift, scale = self.modulation(c).chunk(2, -1)
        return self.output(h * (1 + scale) + shift)


def width_arm(kind, d, blocks, head, seed, steps=1500):
    """Flow loss on one image of random tokens, mean of the last 100 steps, one CPU thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    image = torch.randn(1, TOKENS, CHANNELS)
    net = (TokenNet(CHANNELS, d, blocks, head) if kind == "net"
           else script.DiTDH(4, CHANNELS, 1, d, blocks, 2, head, int(head > 0), 2))
    opt, tail = torch.optim.Adam(net.parameters(), 2e-3, fused=True), []
    y = torch.zeros(32, dtype=torch.int64)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps))
        t = script.flow_time(32, "logit-normal", 1.0, "cpu")
        loss = script.latent_flow_loss(net, image.expand(32, -1, -1), y, t)
        loss.backward()
        opt.step()
        opt.zero_grad()
        tail = [*tail[-99:], loss.item()]
    return {"loss": sum(tail) / len(tail), "floor": max(0.0, 1 - max(d, head) / CHANNELS)}


def shift_arm(m, count=100_000):
    """Share of samples in the larger of two modes +-(1, ..., 1), exactly: along their direction."""
    u = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    A = m**0.5

    def velocity(u, t):  # u_t = (1 - t) s A + t eps, P(s = 1) = 0.8
        return (u - A * (A * (1 - t) * u / t**2 + 0.5 * math.log(4)).tanh()) / t

    end = {"share": 1.0, "share_shifted": script.shift_factor(m, base=16)}
    return {name: (script.euler_ode(velocity, u, alpha, 50) > 0).double().mean().item()
            for name, alpha in end.items()}


# ---- images ----------------------------------------------------------------------------


class Pixels(nn.Module):
    """Raw patches in the place of an encoder; without LayerNorm, which would lose their mean."""

    def __init__(self, patch):
        super().__init__()
        self.patch, self.dim = patch, 3 * patch**2

    def forward(self, images):
        return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)


class Unpatch(nn.Module):
    """Pixels undone, in the place of a decoder."""

    def __init__(self, patch):
        super().__init__()
        self.patch = patch

    def forward(self, f):
        side, p = math.isqrt(f.shape[1]), self.patch
        return rearrange(f, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=p, q=p)


@functools.cache
def images(size, device, split):
    """shapes, made once a process."""
    cfg = argparse.Namespace(data="shapes", image_size=size, batch_size=1)
    return load_images(cfg, device, split)


@contextlib.contextmanager
def arranged(name, patch, noisy=None):
    """The script with images made once; with the decoder of folder `noisy` in the place of a first
    stage, and, for `pixels`, without encoder and decoder."""
    load = lambda cfg, device, split="all", *limit: images(cfg.image_size, device, split)
    with contextlib.ExitStack() as stack:
        put = lambda *pair: stack.enter_context(mock.patch.object(script, *pair))
        put("load_images", load)
        if name == "pixels":
            put("load_encoder", lambda *args: Pixels(patch))
            put("train_decoder", lambda cfg, encoder, data, seen, device: Unpatch(patch).to(device))
        elif noisy:  # arms share it, and run side by side
            put("train_decoder", lambda cfg, encoder, data, seen, device: load_decoder(
                noisy, cfg, device))
        yield


@functools.cache
def reference(size, device):
    """The judge, and statistics of 10,000 real images."""
    judge = load_judge("shapes", size, device=device)
    return judge, statistics(judge, parts(images(size, device, "all"))[0][0][:10_000])


def distance(x, cfg, device):
    """Frechet distance of images x uint8 (n, 3, S, S) to real ones."""
    judge, real = reference(cfg.image_size, device)
    return frechet(statistics(judge, x), real)


def real_distance(preset, cfg, device):
    """The same of real images that nothing else is measured on, as many as an arm has samples."""
    last = images(cfg.image_size, device, "validation").images[-COUNT[preset]:]
    return distance(last, cfg, device)


def held_out(cfg, device, n=2000):
    """Images that were not trained on, (n, 3, S, S) in [-1, 1], and their labels."""
    data = images(cfg.image_size, device, "validation")
    return data.images[:n].float() / 127.5 - 1, data.labels[:n]


def parse(preset, encoder, seed, folder, device, flags):
    """Config of an arm: `encoder` as --encoder takes it."""
    argv = FLAGS[preset].split() + ["--steps", STEPS[preset], "--encoder", encoder, "--seed", seed,
                                    "--out", folder, "--device", device, "--dim", 192]
    argv += ["--head-depth", 0, "--log-every", 100, "--save-every", 10_000]
    argv += ["--sample-every", 10_000, *flags]  # the last of a flag counts
    return script.parse_config(script.Config, script.PRESETS, (), [str(a) for a in argv])


def start(preset):
    """One thread a process on a CPU, where two run side by side; nothing compiled by other arms."""
    if preset == "cpu":
        torch.set_num_threads(1)
    else:
        torch._dynamo.reset()


@torch.no_grad()
def decoder_arm(preset, encoder, seed, folder, device, flags):
    """Train a decoder in folder/decoder: PSNR at all SIGMAS, and rfd."""
    start(preset)
    cfg = parse(preset, encoder, seed, folder, device, flags)
    device = setup(cfg)
    encoder = script.load_encoder(cfg.encoder, cfg.image_size // cfg.patch, "plain").to(device)
    with arranged("", cfg.patch), torch.enable_grad():
        data, (seen, _) = images(cfg.image_size, device, "train"), held_out(cfg, device, 256)
        decoder = script.train_decoder(cfg, encoder, data, seen, device)
    x, _ = held_out(cfg, device, COUNT[preset])
    f = encode(encoder, x, cfg, device)
    noise = torch.randn(f.shape, generator=torch.Generator().manual_seed(1000)).to(device)
    result = {}
    for sigma in SIGMAS:
        x_hat = decode(decoder, f + sigma * noise, cfg, device)
        error = (x_hat.float() / 127.5 - 1 - x).square().flatten(1).mean(1)
        result[f"psnr_{sigma:g}"] = 10 * (4 / error.clamp(min=1e-9)).log10().mean().item()
        if sigma == 0:
            result["rfd"] = distance(x_hat, cfg, device)
    return result | {"fd_floor": real_distance(preset, cfg, device)}


@torch.no_grad()
def encode(encoder, x, cfg, device):
    """Tokens of images x, float32 (n, N, D)."""
    with autocast(cfg, device):
        return torch.cat([encoder(part).float() for part in x.split(250)])


def decode(decoder, f, cfg, device):
    """Images of tokens f, uint8 (n, 3, S, S)."""
    return torch.cat([to_uint8(script.decode(decoder, part, cfg, device)) for part in f.split(250)])


def load_decoder(folder, cfg, device):
    """The decoder of a decoder arm."""
    saved = load_checkpoint(folder / "decoder/last.pt")["ema"]
    decoder = script.build_decoder(cfg, saved["embed.weight"].shape[1]).to(device).eval()
    decoder.load_state_dict(saved)
    return decoder.requires_grad_(False)


def load_net(folder, device):
    """Config, EMA network and latent statistics of an image arm."""
    saved = load_checkpoint(folder / "last.pt")
    cfg, latents = script.Config(**saved["config"]), saved["latents"].to(device)
    net = script.build(cfg, latents.shape[1], saved["classes"]).to(device).eval()
    net.load_state_dict(saved["ema"])
    return cfg, net.requires_grad_(False), latents


def generate(net, weak, latents, cfg, device, n):
    """Tokens of n samples, classes in turn, the same noise for every arm of a seed."""
    y = torch.arange(n) % 10
    return torch.cat([script.draw(net, weak, latents, y[i], cfg, device, generator)
                      for i, generator in script.shares(n, 250, cfg.seed)]), y.to(device)


def linear_gap(variances, t, width):
    """Rise of the flow loss a dimension of the best linear denoiser, of single tokens, whose output
    is held to `width` dimensions: E v_hat^2 of the others. Variances (n,) of z; times t."""
    ev, t = variances.double().clamp(min=0), t.double()[:, None]
    explained = (t - (1 - t) * ev).square() / ((1 - t).square() * ev + t.square())
    return explained.mean(0).sort().values[:max(0, len(ev) - width)].sum().item() / len(ev)


@torch.no_grad()
def image_arm(preset, name, encoder, seed, folder, device, flags, noisy, clean):
    """Train a transformer; held-out loss, its bound, distances with both decoders."""
    start(preset)
    cfg = parse(preset, encoder, seed, folder, device, flags)
    device = setup(cfg)
    with arranged(name, cfg.patch, noisy), torch.enable_grad():
        script.train(cfg)
    _, net, latents = load_net(folder, device)
    with arranged(name, cfg.patch):
        encoder = script.load_encoder(cfg.encoder, cfg.image_size // cfg.patch, "plain").to(device)
    x, y = held_out(cfg, device)
    f = encode(encoder, x, cfg, device)
    z = (f - latents[0]) / latents[1]
    torch.manual_seed(1000)  # the same draws for every arm
    t = script.flow_time(len(z), cfg.time_law, cfg.alpha, device)
    with autocast(cfg, device):
        groups = zip(*(u.split(250) for u in (z, y, t)))
        loss = [script.latent_flow_loss(net, *group).item() for group in groups]
    width = cfg.head_dim if cfg.head_depth else cfg.dim
    ev = torch.linalg.eigvalsh(z.flatten(0, 1).T.cov().cpu().double())  # ascending
    rest = 1 + ev[:max(0, len(ev) - width)]  # of eps - z
    many = script.flow_time(10_000, cfg.time_law, cfg.alpha, "cpu")
    decoder = load_decoder(noisy, cfg, device) if noisy else Unpatch(cfg.patch)
    rfd = distance(decode(decoder, f[:COUNT[preset]], cfg, device), cfg, device)
    f, y = generate(net, None, latents, cfg, device, COUNT[preset])
    samples = decode(decoder, f, cfg, device)
    fd = distance(samples, cfg, device)
    result = {"loss": sum(loss) / len(loss), "floor": rest.sum().item() / len(ev),
              "gap": linear_gap(ev, many, width), "alpha": cfg.alpha, "fd": fd, "rfd": rfd,
              "above": fd - rfd, "fd_floor": real_distance(preset, cfg, device),
              "accuracy": accuracy(reference(cfg.image_size, device)[0], samples, y)}
    if clean:
        decoder = load_decoder(clean, cfg, device)
        result["fd_clean"] = distance(decode(decoder, f, cfg, device), cfg, device)
    torch.save(samples[:20].cpu(), folder / "samples.pt")
    return result


@torch.no_grad()
def guidance_arm(preset, seed, folder, device, w, strong, weak, noisy):
    """Distance of samples of one network, guided by a weaker one."""
    start(preset)
    device = setup(parse(preset, TEACHER, seed, folder, device, []))
    cfg, net, latents = load_net(strong, device)
    cfg = script.dataclasses.replace(cfg, weak=str(weak), guidance=w)
    f, y = generate(net, load_net(weak, device)[1], latents, cfg, device, COUNT[preset])
    samples = decode(load_decoder(noisy, cfg, device), f, cfg, device)
    torch.save(samples[:20].cpu(), folder / "samples.pt")
    return {"fd": distance(samples, cfg, device),
            "accuracy": accuracy(reference(cfg.image_size, device)[0], samples, y)}


@torch.no_grad()
def encoder_arm(preset, name, encoder, seed, folder, device):
    """What the tokens are like: linear probe of their mean and spread, effective rank."""
    start(preset)
    cfg = parse(preset, encoder, seed, folder, device, [])
    device = setup(cfg)
    with arranged(name, cfg.patch):
        encoder = script.load_encoder(cfg.encoder, cfg.image_size // cfg.patch, "plain").to(device)
    x, y = held_out(cfg, device, 6000)
    f = encode(encoder, x, cfg, device)
    z = torch.cat([f.mean(1), f.std(1)], 1).double()
    z = torch.cat([(z - z.mean(0)) / (z.std(0) + 1e-3), torch.ones_like(z[:, :1])], 1)
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=device)
    train, target = z[:5000], F.one_hot(y[:5000], 10).double()
    W = torch.linalg.solve(train.T @ train + 0.1 * eye, train.T @ target)
    p = torch.linalg.eigvalsh(f.flatten(0, 1).T.cov().double()).clamp(min=1e-12)
    p = p / p.sum()
    return {"probe": ((z[5000:] @ W).argmax(1) == y[5000:]).double().mean().item(),
            "rank": (-(p * p.log()).sum()).exp().item(), "n": f.shape[2]}


# ---- arms ------------------------------------------------------------------------------


def run(report, pool, jobs):
    """Do the missing arms in the pool, in the order of jobs {(table, name, seed): (f, args)}, then
    write all of them down in that order; f gets `folder` in its args as the arm's own."""
    todo = {}
    for key, (f, *args) in jobs.items():
        folder = arm_file(report, *key).parent
        if not (folder / "result.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            code = folder / "code"  # of a training that was cut off
            if code.exists() and code.read_text() != report["code"] and not report["args"].reuse:
                fail(f"{folder} was begun by other code: remove {report['arms']}, or pass --reuse")
            code.write_text(report["code"])
            args = [folder if a is FOLDER else a for a in args]
            todo[key] = pool.apply_async(attempt, [f, *args])
    for key in jobs:
        arm(report, *key, lambda folder: todo[key].get())


FOLDER = object()  # stands for the folder of the arm in the arguments of a job


def run_exact(report, pool):
    """width and shift: small networks on a CPU, and none."""
    jobs = {}
    for seed in (0, 1, 2):
        for name, (kind, d, blocks, head, _) in sorted(NETS.items(), key=lambda x: -x[1][1]):
            if kind == "net" or seed == 0:
                jobs["width", name, seed] = width_arm, kind, d, blocks, head, seed
    for m in SHIFT:
        jobs["shift", f"m {m}", 0] = shift_arm, m
    run(report, pool, jobs)


def run_images(report, pool):
    """All other tables; the decoders of the images are those of robust."""
    preset, jobs, device = report["args"].preset, {}, report["args"].device
    place = lambda *key: arm_file(report, *key).parent
    cfg = parse(preset, TEACHER, 0, report["arms"], device, [])
    some = images(cfg.image_size, torch.device("cpu"), "train").images[:1000]
    untrained = {s: report["arms"] / f"random_{s}.safetensors" for s in SEEDS[preset]}
    for seed, path in untrained.items():
        random_encoder(path, ROOT / "assets/teacher.safetensors", some, cfg.image_size // cfg.patch,
                       seed=seed)
    for seed in SEEDS[preset]:
        for name, flags in DECODERS.items():
            if preset == "cpu" and seed > 0 and name == "tau 0.8 uniform":
                continue
            encoder = untrained[seed] if name == "random" else TEACHER
            jobs["robust", name, seed] = decoder_arm, preset, encoder, seed, FOLDER, device, flags
    run(report, pool, jobs)
    jobs = {}
    for seed in SEEDS[preset]:
        file = {"teacher": TEACHER, "random": untrained[seed], "pixels": TEACHER}
        for name, flags in ARMS.items():
            if preset == "cpu" and (name == "uniform t" or (seed > 0 and name == "d 96, deep")):
                continue
            kind = name if name in ("random", "pixels") else "teacher"
            noisy = None if kind == "pixels" else place(
                "robust", "random" if kind == "random" else "tau 0.8", seed)
            clean = place("robust", "tau 0", seed) if kind == "teacher" else None
            flags = [*flags, *ALSO[preset].get(name, [])]
            flags += ["--steps", STEPS[preset] // 5] if name == "weak" else []
            jobs["images", name, seed] = (image_arm, preset, kind, file[kind], seed, FOLDER, device,
                                          flags, noisy, clean)
        for kind in file:
            jobs["encoders", kind, seed] = (encoder_arm, preset, kind, file[kind], seed, FOLDER,
                                            device)
    run(report, pool, jobs)
    jobs = {("guidance", f"w {w:g}", seed): (
        guidance_arm, preset, seed, FOLDER, device, w, place("images", "d 192", seed),
        place("images", "weak", seed), place("robust", "tau 0.8", seed))
        for seed in SEEDS[preset] for w in GUIDANCE}
    run(report, pool, jobs)


# ---- verdicts --------------------------------------------------------------------------


def judge_exact(report):
    """Hold width and shift against the docstring."""
    m, v, ok = functools.partial(mean, report), functools.partial(values, report), {}
    for name, (kind, d, blocks, head, ref) in NETS.items():
        loss, floor = v("width", name, "loss"), 1 - d / CHANNELS
        if ref is not None:
            ok[name, "reference"] = abs(m("width", name, "loss") - ref) < 0.03
        if max(d, head) < CHANNELS:
            ok[name, "floor"] = min(loss) > floor - 0.005
            if kind == "DiT":
                ok[name, "near the floor"] = max(loss) < floor + 0.1
        elif head or kind == "DiT":
            ok[name, "works"] = max(loss) < 0.15
        if blocks == 4:
            shallow = v("width", f"{kind} {d}", "loss")
            ok[name, "depth"] = all(b > a - 0.02 for a, b in zip(shallow, loss))
    conclude(report, "width", "fails for d < n: 0.52 at 384 of 768; depth does not help; a head "
             "wider than n does (single image)", verdict(ok))
    ok = {(dim, i): abs(m("shift", f"m {dim}", metric) - share[i]) < 0.01
          for dim, share in SHIFT.items() for i, metric in enumerate(("share", "share_shifted"))}
    conclude(report, "shift", "gFID 23.08 without the shift, 4.81 with it; here two modes: "
             "without it the smaller one is lost", verdict(ok))


def judge_images(report):
    """Hold the other tables against the docstring."""
    v = lambda name, metric, table="images": values(report, table, name, metric)
    psnr = lambda tau, sigma: v(f"tau {tau}", f"psnr_{sigma:g}", "robust")
    least = lambda name, metric, share: share * mean(report, "images", name, metric)
    found = {0.0: exceeds(psnr(0, 0), psnr(0.8, 0))}
    found |= {s: exceeds(psnr(0.8, s), psnr(0, s), 1) for s in SIGMAS if s >= 0.5}
    conclude(report, "robust", "tau = 0.8 costs a clean reconstruction little (rFID 0.49 to 0.57) "
             "and stands noise (gFID 4.81 to 4.28); here PSNR", overall(found))
    found = {(metric, a): exceeds(v(a, metric), v(b, metric))
             for metric in ("loss", "fd") for a, b in (("d 48", "d 96"), ("d 96", "d 192"))}
    for name in ("d 48", "d 96"):
        found["gap", name] = exceeds(v(name, "loss"), v("d 192", "loss"), least(name, "gap", 0.5))
    deep = [loss + least("d 96", "gap", 0.2) for loss in v("d 96, deep", "loss")]
    if len(deep) > 1:
        found["depth"] = exceeds(deep, v("d 96", "loss"))
    conclude(report, "widths", "DiT needs d >= n (Tab. of single images, and DiT-S 215.76 against "
             "DiT-XL 23.08)", overall(found))
    found = {metric: exceeds(v("d 96", metric), v("d 96 + head", metric))
             for metric in ("loss", "fd")}
    middle = [(a + b) / 2 for a, b in zip(v("d 96", "loss"), v("d 192", "loss"))]
    found["nearer to d 192"] = exceeds(middle, v("d 96 + head", "loss"))
    conclude(report, "head", "DiT-S 215.76, with a wide head 6.07, DiT-XL 4.28 (80 epochs)",
             overall(found))
    best = min(SWEEP[1:], key=lambda name: mean(report, "images", name, "fd"))
    found = {f"gain by {best}": exceeds(v("alpha 1", "fd"), v(best, "fd"),
                                        least("alpha 1", "fd", 0.05)),
             "inside": "not resolved" if best == SWEEP[-1] else "as in the paper"}
    gain = found[f"gain by {best}"]  # without it there is nothing to be inside of
    conclude(report, "shifts", "gFID 23.08 to 4.81 by the shift, 6.93 there",
             overall(found) if gain == "as in the paper" else gain)
    found = {"gfd": exceeds(v("d 192", "fd_clean"), v("d 192", "fd")),
             "rfd": exceeds(v("tau 0.8", "rfd", "robust"), v("tau 0", "rfd", "robust"))}
    conclude(report, "decoders", "gFID 4.81 to 4.28, rFID 0.49 to 0.57", overall(found))
    more = lambda name: exceeds(v(name, "fd"), v("d 192", "fd"))
    conclude(report, "encoders", "pixels 51.09, DINOv2-B 4.28", more("pixels"))
    conclude(report, "random", "what the encoder has learned matters (no table)", more("random"))
    best = min(GUIDANCE, key=lambda w: mean(report, "guidance", f"w {w:g}", "fd"))
    conclude(report, "guidance", "1.51 to 1.13 by AutoGuidance at 1.42",
             exceeds(v("d 192", "fd"), v(f"w {best:g}", "fd", "guidance"),
                     least("d 192", "fd", 0.05)))


def draw_figure(report):
    """Exact tests, the tables of images, and samples of seed 0."""
    m, v = functools.partial(mean, report), functools.partial(values, report)
    seeds = SEEDS[report["args"].preset]
    with figure(f"{report['path']}.png", 3, 4, (2.6, 2.3)) as axes:
        ax = axes[0, 0]
        ax.plot([0, CHANNELS, 96], [1, 0, 0], color="0.7", label="1 - d / n")
        for i, kind in enumerate(("net", "DiT")):
            names = [k for k, (a, _, blocks, head, _) in NETS.items()
                     if a == kind and blocks == 2 and not head]
            ax.plot([NETS[k][1] for k in names], [m("width", k, "loss") for k in names], f"C{i}o-",
                    label=kind)
            for name, mark in ((f"{kind} 16, deep", "x"), (f"{kind} 16 + head 96", "s")):
                ax.plot(16, m("width", name, "loss"), f"C{i}{mark}",
                        label=f"{kind}, {'deep' if mark == 'x' else 'head'}")
        ax.set(title="one image, n = 64", xlabel="width d", ylabel="flow loss")
        ax = axes[0, 1]
        for i, metric in enumerate(("share", "share_shifted")):
            ax.semilogx([*SHIFT], [m("shift", f"m {dim}", metric) for dim in SHIFT], f"C{i}o-",
                        label="shifted" if i else "not shifted")
        ax.axhline(0.8, color="0.7", lw=1)
        ax.set(title="share of the large mode", xlabel="dimensions m")
        ax = axes[0, 2]
        for i, name in enumerate(("tau 0", "tau 0.8", "tau 0.8 uniform")):
            ax.plot(SIGMAS, [m("robust", name, f"psnr_{s:g}") for s in SIGMAS], f"C{i}o-",
                    label=name)
        ax.set(title="PSNR of the decoder", xlabel="noise on the tokens")
        ax = axes[0, 3]
        names = ["d 48", "d 96", "d 96, deep", "d 96 + head", "d 192"]
        ax.bar(names, [m("images", k, "loss") for k in names], color="C0")
        for i, name in enumerate(names):
            ax.plot([i - 0.4, i + 0.4], [m("images", name, "floor")] * 2, "k", lw=1)
        ax.set(title="images: loss, floor (line)")
        ax = axes[1, 0]
        names.remove("d 96, deep")  # of one seed on a CPU
        ax.bar(names, [m("images", k, "fd") for k in names], color="C1")
        ax.set(title="images: Fréchet distance")
        ax, alphas = axes[1, 1], [m("images", name, "alpha") for name in SWEEP]
        for seed, row in zip(seeds, zip(*(v("images", name, "fd") for name in SWEEP))):
            ax.plot(alphas, row, "o-", label=f"seed {seed}")
        ax.set(title="distance by shift", xlabel="alpha")
        ax = axes[1, 2]
        bars = {"decoder\ntau 0.8": ("d 192", "fd"), "decoder\ntau 0": ("d 192", "fd_clean"),
                "random\nencoder": ("random", "fd"), "pixels": ("pixels", "fd")}
        rfd = [m("robust", k, "rfd") for k in ("tau 0.8", "tau 0", "random")]
        rfd.append(m("images", "pixels", "rfd"))
        ax.bar([*bars], [m("images", *key) for key in bars.values()], color="C1")
        ax.plot(range(4), rfd, "k_", ms=14, label="reconstructions")
        ax.set(title="distance, d = 192")
        ax = axes[1, 3]
        curves = [v("images", "d 192", "fd"), *(v("guidance", f"w {w:g}", "fd") for w in GUIDANCE)]
        for seed, row in zip(seeds, zip(*curves)):
            ax.plot([1, *GUIDANCE], row, "o-", label=f"seed {seed}")
        ax.set(title="distance by AutoGuidance", xlabel="w")
        for ax, name in zip(axes[2], ("d 96", "d 96 + head", "d 192", "pixels")):
            path = arm_file(report, "images", name, 0).with_name("samples.pt")
            grid = torch.load(path, weights_only=True)
            ax.imshow(rearrange(grid, "(r k) c h w -> (r h) (k w) c", k=5))
            ax.set(xticks=[], yticks=[], title=name)
        for ax in axes.flat:
            ax.title.set_fontsize(8)
            ax.tick_params(labelsize=6)
            ax.xaxis.label.set_fontsize(7)
            ax.yaxis.label.set_fontsize(7)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize=5)
        for ax in (axes[0, 3], axes[1, 0]):
            ax.tick_params(axis="x", labelrotation=30)


def main(argv=None):
    report = open_report("rae", __doc__, argv, also=[
        TEACHER, *(f"assets/judge_shapes_{size}.safetensors" for size in (16, 32))])
    cores = min(2, cpu_cores())  # one thread each
    with mp.get_context("spawn").Pool(cores) as pool:
        run_exact(report, pool)
    with mp.get_context("spawn").Pool(cores if report["args"].preset == "cpu" else 1) as pool:
        run_images(report, pool)
    judge_exact(report)
    judge_images(report)
    draw_figure(report)


if __name__ == "__main__":
    main()
