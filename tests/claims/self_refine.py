"""Does predict-and-perturb bring videos nearer to the law of motion, at equal compute?

    python -m tests.claims.self_refine                  # about 15 minutes, 2 CPU cores
    python -m tests.claims.self_refine --preset gpu     # pixels, 3 seeds, mask, shift, lengths

What the paper reports (arXiv:2601.18577v1) and what counts as agreeing, stated before the run. Its
evidence is human preference (73 % against the default sampler, 74 % against twice the steps) and
benchmarks in part (VideoPhy2 +1.1 points); here the error against exact physics is measured. 256
held-out conditions, the same initial noise in all arms of a seed, 95 % bootstrap intervals over the
conditions of the difference to Euler at the same number of network evaluations (NFE = 32).

controls Real clips, real clips through the autoencoder, frozen and shuffled clips in every metric.
sweep    Five windows of t, K iterations in each of their steps, N steps so that N + sum K <= 32.
         Paper: better than Euler with as many or twice as many evaluations, whose doubling does
         nothing. The best window and K are those with the fewest teleports and bad frames on the
         even conditions (sum of the shares, mean of the seeds); they are judged on the odd ones.
         Agrees if there, for every seed, the intervals of teleports and of residual both lie below
         0, speed_ratio >= 0.9, bad videos are not more frequent, and if Euler 60 lowers neither
         teleports nor residual by a tenth.
early    Paper: early steps, t < 0.2, give nearly all of the gain. Agrees if the window 0-0.2 at its
         best K has at least half of the best window's gain in teleports. Pilots at toy scale found
         no gain there: the place moves up as the dimension falls. The plan of the authors' code
         (N = 40, shift 3, 60 NFE) stands in the table beside Euler with 60.
planner  Paper: local search, it finds no solution that the prior does not hold. First speeds from
         1.6 to 2.4, which training has not seen. Agrees if the best arm of sweep does not lower the
         distance to the simulator (position) by a tenth of Euler's.
spread   Mean spread over four samples of a condition, Euler and the best arm: reported.
modes    Paper: mode-seeking (Fig. 21). A mixture of eight Gaussians in the plane, exact velocity.
         Agrees if the entropy of the modes falls from Euler over K = 1, 3 to 8 in the window
         0.4-0.6, if it is lower for the window 0-1 than for any fifth of it at K = 3, and if one
         iteration at t = 0.5 takes the variance that theory says (t^2 E Cov(z1 | z)), to 1 %.
frames   Paper: one iteration changes an image's content, a video's hardly. Networks for clips of 16
         frames and for single ones, no condition, equal steps. change = RMS difference to Euler's
         sample of the same noise over that of two samples. Agrees if, for every seed, it is larger
         for single frames at K = 3 in 0-0.2 and in 0.4-0.6.
mask     (gpu) Paper: without mask the background over-saturates with K and guidance, with it not.
         Clips with a texture, guidance 4, K = 5 in 0.2-0.6. drift = median change, against Euler,
         of places that no real ball comes near. Agrees if tau at the median of U at least halves
         it, and the AUC of U for places that balls cross is above 0.6.
shift    (gpu) The window 0-0.2 and the best one at shift 1, 3, 5: reported, no claim.
lengths  (gpu) Euler and the best arm after a quarter, half and all of the training: reported.

A sampler that slows balls down or freezes them is not nearer to physics: see speed_ratio.
"""
import dataclasses
import functools
import math
import os
from types import SimpleNamespace

import torch
import torch.multiprocessing as mp

import self_refine as script
from common import (autocast, bouncing_balls, draw_balls, figure, load_checkpoint, mix, save_gif,
                    simulate_balls)
from tests.claims import physics
from tests.claims.report import arm, arm_file, conclude, mean, open_report, values, verdict

CONDITIONS, NFE = 256, 32
WINDOWS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
CODE_PLAN = "0.013-0.05:3,0.05-0.145:1"  # of the authors' Wan script: 20 more at N = 40, shift 3
TRAIN = {"cpu": ["--compile", "off"], "gpu": ["--preset", "gpu"]}
SEEDS = {"cpu": (0, 1), "gpu": (0, 1, 2)}
KS = {"cpu": (1, 3, 5), "gpu": (1, 2, 3, 5, 8)}


# ---- arms ------------------------------------------------------------------------------


def steps_for(nfe, plan, shift=1.0):
    """The largest N with N + sum K <= nfe; a plan as text."""
    windows = script.parse_plan(plan)
    for N in range(nfe, 0, -1):
        if N + sum(script.plan_steps(windows, script.flow_times(N, shift)).values()) <= nfe:
            return N


def sweep_arms(preset):
    """{name: sampler flags} of the table sweep, Euler first."""
    arms = {f"Euler {N}": dict(plan="", sampling_steps=N) for N in (32, 20, 60)}
    for low, high in WINDOWS:
        for K in KS[preset]:
            plan = f"{low:g}-{high:g}:{K}"
            arms[f"t {low:g}-{high:g} K {K}"] = dict(plan=plan, sampling_steps=steps_for(NFE, plan))
    arms["t 0-1 K 1"] = dict(plan="0-1:1", sampling_steps=steps_for(NFE, "0-1:1"))
    arms["authors' plan, shift 3"] = dict(plan=CODE_PLAN, sampling_steps=40, shift=3.0)
    arms["Euler 60, shift 3"] = dict(plan="", sampling_steps=60, shift=3.0)
    return arms


def conditions(cfg, kind="held out", n=CONDITIONS):
    """Clips that no training has seen: held out, or fast with first speeds of 1.6 to 2.4."""
    clips = bouncing_balls(n, cfg.frames, cfg.image_size, mix(2, 0), cfg.texture)
    if kind == "fast":
        v = clips.tracks[:, 0, :, 2:]
        speed = 1.6 + 0.8 * torch.rand(n, 3, 1, generator=torch.Generator().manual_seed(mix(3, 0)))
        v = speed * torch.nn.functional.normalize(v, dim=-1)
        clips.tracks = simulate_balls(clips.tracks[:, 0, :, :2], v, clips.radius, cfg.frames)
        clips.videos = (255 * draw_balls(clips.tracks, clips.radius, cfg.image_size)).round().byte()
    return clips


def load(folder, device):
    """Config, EMA network and codec of a run folder."""
    saved = load_checkpoint(folder / "last.pt")
    cfg = script.Config(**saved["config"])
    net, codec = (module.to(device).eval().requires_grad_(False) for module in script.build(cfg))
    net.load_state_dict(saved["ema"])
    codec.load_state_dict(saved["codec"])
    return cfg, net, codec


def train(folder, flags):
    """Train through the script's own command line, or go on where it stopped."""
    script.main([*flags, "--out", str(folder), "--sample-every", "1000000"])


@torch.no_grad()
def continued(folder, flags, clips, device, index=None):
    """Videos (n, 3, F, S, S) in [-1, 1] that continue clips, drawn with these sampler flags."""
    cfg, net, codec = load(folder, device)
    cfg = dataclasses.replace(cfg, **flags)
    real = clips.videos.float() / 127.5 - 1
    index = range(len(real)) if index is None else index
    parts = [script.draw(net, codec, real[i : i + 64], clips.labels[i : i + 64], index[i : i + 64],
                         cfg, device, script.parse_plan(cfg.plan)).cpu()
             for i in range(0, len(real), 64)]
    return torch.cat(parts)


def nfe(flags):
    """Evaluations of the velocity of these sampler flags; guidance doubles the network's."""
    times = script.flow_times(flags["sampling_steps"], flags.get("shift", 1.0))
    steps = script.plan_steps(script.parse_plan(flags["plan"]), times)
    return len(times) - 1 + sum(steps.values())


def evaluate(folder, flags, kind, kept, device):
    """Draw and measure an arm; leaves measure.pt and the first clips in the folder `kept`."""
    clips = conditions(load(folder, device)[0], kind)
    videos = continued(folder, flags, clips, device)
    m = physics.measure(videos, clips)
    torch.save(m, kept / "measure.pt")
    torch.save(videos[:6].clone(), kept / "videos.pt")
    metrics = physics.summary(m) | {"nfe": nfe(flags)}
    if nfe(flags) <= NFE:
        metrics["distance"] = physics.distance(m, clips, videos.shape[-1]).nanmedian().item()
    return metrics


def spread_of(folder, flags, kind, kept, device):
    """Spread in pixels of four samples for each of 64 conditions."""
    cfg = load(folder, device)[0]
    clips, tracks = conditions(cfg, n=64), []
    for seed in range(4):
        videos = continued(folder, flags, clips, device, index=range(1000 * seed, 1000 * seed + 64))
        tracks.append(physics.measure(videos, clips)["tracks"])
    return {"spread": physics.spread(tracks, cfg.given, cfg.image_size).nanmean().item(),
            "nfe": nfe(flags)}


def difference(metric):
    """Statistic for physics.interval: an arm's metric minus that of Euler."""
    def statistic(m, euler):
        one, two = (x[metric].nanmedian() if metric == "residual" else x[metric].nanmean()
                    for x in (m, euler))
        return (one - two).item()
    return statistic


def measured(report, table, name, seed, part=slice(None)):
    """What evaluate left, of all conditions or of a part."""
    m = torch.load(arm_file(report, table, name, seed).with_name("measure.pt"))
    return {k: v[part] for k, v in m.items()}


def run_arms(report, table, arms, seeds, work, kind, pool, base="Euler 32"):
    """The arms of a table on the main networks; beside each its intervals to the arm `base`."""
    jobs = {}
    for seed in seeds:
        for name, flags in arms.items():
            kept = arm_file(report, table, name, seed)
            kept.parent.mkdir(parents=True, exist_ok=True)
            if not kept.exists():
                folder = report["arms"] / f"network_{seed}"
                jobs[seed, name] = pool(work, (folder, flags, kind, kept.parent, report["device"]))

    def measure(seed, name, folder):
        metrics = jobs[seed, name].get()
        if work is evaluate and name != base:
            pair = measured(report, table, name, seed), measured(report, table, base, seed)
            for metric in ("teleports", "residual"):
                low, value, high = physics.interval(difference(metric), *pair, draws=300)
                metrics |= {f"{metric}_diff": value, f"{metric}_low": low, f"{metric}_high": high}
        return metrics

    for seed in seeds:
        for name in arms:
            arm(report, table, name, seed, functools.partial(measure, seed, name))


# ---- mode-seeking on a mixture, exactly ------------------------------------------------

WEIGHTS = torch.tensor([0.40, 0.16, 0.12, 0.09, 0.065, 0.055, 0.055, 0.055], dtype=torch.float64)
ANGLES = torch.arange(8, dtype=torch.float64) * math.pi / 4
CENTRES, STD = 1.4 * torch.stack([ANGLES.cos(), ANGLES.sin()], -1), 0.15


def mixture_velocity(z, t):
    """E[z1 - z0 | z] for the mixture; z (1, 2, n, 1, 1), its "frames" being independent points."""
    x = z[0, :, :, 0, 0].T  # (n, 2)
    variance = t**2 * STD**2 + (1 - t) ** 2
    log_p = WEIGHTS.log() - torch.cdist(x, t * CENTRES).square() / (2 * variance)
    share = log_p.softmax(1)  # (n, 8): which mode it came from
    gain = t * STD**2 / variance
    mean = share @ (CENTRES * (1 - gain * t)) + gain * x  # E[z1 | z]
    u = (mean - x) / (1 - t)
    return u.T[None, :, :, None, None]


def modes(plan, n=20_000):
    """Entropy of the modes of samples, share of the first mode and of the three rare ones."""
    N = steps_for(NFE, plan)
    generator = torch.Generator().manual_seed(mix(0, 0))
    z0 = torch.randn(1, 2, n, 1, 1, dtype=torch.float64, generator=generator)
    times = script.flow_times(N)
    steps = script.plan_steps(script.parse_plan(plan), times)
    z, _ = script.pnp_sample(mixture_velocity, z0, times, steps, [torch.Generator().manual_seed(1)])
    x = z[0, :, :, 0, 0].T
    share = torch.bincount(torch.cdist(x, CENTRES).argmin(1), minlength=8).double() / n
    return {"entropy": -torch.special.xlogy(share, share).sum().item(), "top": share[0].item(),
            "rare": share[5:].mean().item(), "nfe": N + sum(steps.values())}


def lost_variance(t=0.5, n=400_000):
    """Relative error of Cov z' = Cov z - t^2 E Cov(z1 | z) after one iteration, its trace."""
    g = torch.Generator().manual_seed(0)
    mode = torch.multinomial(WEIGHTS, n, True, generator=g)
    z1 = CENTRES[mode] + STD * torch.randn(n, 2, dtype=torch.float64, generator=g)
    z = t * z1 + (1 - t) * torch.randn(n, 2, dtype=torch.float64, generator=g)
    u = mixture_velocity(z.T[None, :, :, None, None], t)[0, :, :, 0, 0].T
    x_hat = z + (1 - t) * u
    posterior = (z1 - x_hat).square().sum(1).mean()  # trace of E Cov(z1 | z)
    z_new = t * x_hat + (1 - t) * torch.randn(n, 2, dtype=torch.float64, generator=g)
    before, after = (v.var(0).sum() for v in (z, z_new))
    return {"error": ((after - (before - t**2 * posterior)) / before).abs().item(),
            "lost": (1 - after / before).item()}


# ---- single frames against clips -------------------------------------------------------


def change(folder, flags, device):
    """RMS difference to Euler's sample of the same noise, over that of two of Euler's samples."""
    cfg = load(folder, device)[0]
    clips = conditions(cfg, n=64)
    euler, other = (continued(folder, dict(plan="", sampling_steps=32), clips, device, index)
                    for index in (range(64), range(1000, 1064)))
    videos = continued(folder, flags, clips, device, range(64))
    rms = lambda a, b: (a - b).square().mean().sqrt()
    return {"change": (rms(videos, euler) / rms(other, euler)).item(), "nfe": nfe(flags)}


# ---- mask, shift and training length: gpu preset ---------------------------------------


def background(folder, flags, kept, device):
    """Drift of places that no ball comes near, contrast of them, and how U marks moving places.

    flags["tau"] < 0: take the median of U as tau, found on the first 64 clips without mask
    """
    cfg, net, codec = load(folder, device)
    clips = conditions(cfg)
    cover = draw_balls(clips.tracks, clips.radius, cfg.image_size)
    moving = (cover[:64] > 0.3).any(2).any(1)[:, None].expand(-1, cfg.frames - cfg.given, -1, -1)
    still = (cover.amax((1, 2)) < 0.02)[:, None, None].expand(-1, 3, cfg.frames, -1, -1)
    real = clips.videos.float() / 127.5 - 1
    z1, y = codec.encode(real[:64].to(device)), clips.labels[:64].to(device)
    velocity = script.conditional_velocity(net, y, z1[:, :, : cfg.given], flags["guidance"])
    times = script.flow_times(flags["sampling_steps"])
    steps = script.plan_steps(script.parse_plan(flags["plan"]), times)
    generators = [torch.Generator().manual_seed(i) for i in range(64)]
    z0 = torch.stack([torch.randn(z1.shape[1:], generator=g) for g in generators]).to(device)
    with autocast(cfg, torch.device(device)):
        _, U = script.pnp_sample(velocity, z0, times, steps, generators)
    result = {}
    if U:
        u = torch.stack(list(U.values())).mean(0).cpu()[:, 0, cfg.given :]
        result = {"auc": auc(u[moving], u[~moving]), "median_U": u.median().item()}
    if flags["tau"] < 0:
        flags = flags | {"tau": result["median_U"]}
    euler = continued(folder, flags | {"plan": ""}, clips, device)
    videos = continued(folder, flags, clips, device)
    torch.save(videos[:6].clone(), kept / "videos.pt")
    return result | {"drift": (videos - euler)[still].abs().median().item(),
                     "contrast": (videos[still].std() / real[still].std()).item(),
                     "tau": flags["tau"], "nfe": nfe(flags)}


def auc(high, low):
    """P(a value of high exceeds one of low), ties halved."""
    both = torch.cat([high, low])
    _, inverse, counts = both.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2.0)[inverse][: len(high)].double()
    return ((rank.sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low))).item()


def run_gpu_tables(report, seeds, best):
    """Tables mask, shift and lengths: pixels, in this process."""
    sizes = TRAIN["gpu"]
    run_arms(report, "shift", {
        f"{window}, shift {s}": dict(plan=plan, shift=s, sampling_steps=steps_for(NFE, plan, s))
        for s in (1.0, 3.0, 5.0) for window, plan in (("Euler", ""), ("t 0-0.2", "0-0.2:3"),
                                                      ("best", best["plan"]))
    }, seeds, evaluate, "held out", inline, base="Euler, shift 1.0")
    for share in (0.25, 0.5, 1.0):
        for seed in seeds:
            steps = int(share * script.PRESETS["gpu"]["steps"])
            for name, flags in (("Euler", dict(plan="", sampling_steps=NFE)), ("best", best)):
                def measure(folder):
                    network = report["arms"] / f"length_{share}_{seed}"
                    train(network, [*sizes, "--steps", str(steps), "--seed", str(seed)])
                    return evaluate(network, flags, "held out", folder, report["device"])
                arm(report, "lengths", f"{name}, {share:.0%} of the steps", seed, measure)
    for seed in seeds:
        for name, K, tau in (("Euler", 0, 0.0), ("K 5", 5, 0.0), ("K 5, mask", 5, -1.0)):
            plan = f"0.2-0.6:{K}" if K else ""
            flags = dict(plan=plan, tau=tau, guidance=4.0, sampling_steps=20)
            def measure(folder):
                network = report["arms"] / f"texture_{seed}"
                train(network, [*sizes, "--texture", "--seed", str(seed)])
                return background(network, flags, folder, report["device"])
            arm(report, "mask", name, seed, measure)


# ---- the claim -------------------------------------------------------------------------


def inline(work, arguments):
    """Like Pool.apply_async, but done when the result is asked for."""
    return SimpleNamespace(get=lambda: work(*arguments))


def one_thread():
    """Of a worker process, which has one of the cores to itself."""
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"


def run_controls(report, seeds):
    """Floors and cheats, on the conditions of the sweep."""
    for seed in seeds:
        cfg, _, codec = load(report["arms"] / f"network_{seed}", "cpu")
        clips = conditions(cfg)
        real = clips.videos.float() / 127.5 - 1
        rows = {"real": real, "real through the autoencoder": codec.decode(codec.encode(real)),
                "frozen": physics.frozen(real, cfg.given),
                "shuffled": physics.shuffled(real, cfg.given)}
        for name, videos in rows.items():
            arm(report, "controls", name, seed,
                lambda folder: physics.summary(physics.measure(videos, clips)))


def choose(report, seeds, arms):
    """The name of the predict-and-perturb arm with the fewest teleports and bad frames on the even
    conditions."""
    def faults(name):
        even = [measured(report, "sweep", name, seed, slice(0, None, 2)) for seed in seeds]
        return sum((m["teleports"].mean() + m["bad_frames"].mean()).item() for m in even)
    return min((name for name in arms if name.startswith("t ")), key=faults)


def judge_claims(report, seeds, best):
    """Hold the numbers against the docstring."""
    ok, odd = {}, slice(1, None, 2)
    for seed in seeds:
        euler, m = (measured(report, "sweep", name, seed, odd) for name in ("Euler 32", best))
        for metric in ("teleports", "residual"):
            ok[metric, seed] = physics.interval(difference(metric), m, euler, draws=2000)[2] < 0
        ok["bad", seed] = bool(m["bad"].mean() <= euler["bad"].mean())
        ok["speed", seed] = physics.summary(m)["speed_ratio"] >= 0.9
    for metric in ("teleports", "residual"):
        twice = mean(report, "sweep", "Euler 60", metric)
        ok["Euler 60", metric] = twice > 0.9 * mean(report, "sweep", "Euler 32", metric)
    conclude(report, "sweep", "better than Euler at equal and at twice the NFE (human preference "
             f"73 to 74 %); best here: {best}", verdict(ok))
    gain = lambda name: mean(report, "sweep", "Euler 32", "teleports") - mean(
        report, "sweep", name, "teleports")
    early = [name for _, name in report["done"] if name.startswith("t 0-0.2")]
    enough = max(map(gain, early)) >= 0.5 * gain(best) > 0
    conclude(report, "early", "t < 0.2 gives nearly all of the gain", verdict({"half": enough}))
    fast, slow = (mean(report, "planner", name, "position") for name in (best, "Euler 32"))
    conclude(report, "planner", "local search only, no planning",
             verdict({"position": fast > 0.9 * slow}))
    entropy = lambda name: mean(report, "modes", name, "entropy")
    row = [entropy(name) for name in ("Euler", "0.4-0.6:1", "0.4-0.6:3", "0.4-0.6:8")]
    fifths = min(entropy(f"{low:g}-{high:g}:3") for low, high in WINDOWS)
    ok = {"K": all(a > b for a, b in zip(row, row[1:])), "width": entropy("0-1:3") < fifths,
          "variance": mean(report, "modes", "one iteration at t = 0.5", "error") < 0.01}
    conclude(report, "modes", "mode-seeking: heavy modes gain (Fig. 21)", verdict(ok))
    ok = {}
    for plan in ("0-0.2:3", "0.4-0.6:3"):
        pairs = zip(*(values(report, "frames", f"{T}, {plan}", "change") for T in ("T 1", "T 16")))
        ok[plan] = all(one > sixteen for one, sixteen in pairs)
    claim = "an image's content changes, a video's hardly (Fig. 13)"
    conclude(report, "frames", claim, verdict(ok))
    if report["args"].preset == "gpu":
        drift = [mean(report, "mask", name, "drift") for name in ("K 5", "K 5, mask")]
        ok = {"drift": drift[1] <= 0.5 * drift[0], "auc": mean(report, "mask", "K 5", "auc") > 0.6}
        conclude(report, "mask", "the mask keeps the background (tau 0.25)", verdict(ok))


def draw_figures(report, best, preset):
    """Teleports and residual by window and K; a GIF and strips: real, Euler, refined."""
    with figure(f"{report['path']}.png", 1, 3, (3.4, 2.8)) as axes:
        for ax, metric in zip(axes[0], ("teleports", "residual", "speed_ratio")):
            for K in KS[preset]:
                y = [mean(report, "sweep", f"t {low:g}-{high:g} K {K}", metric)
                     for low, high in WINDOWS]
                ax.plot([sum(w) / 2 for w in WINDOWS], y, "o-", ms=3, label=f"K = {K}")
            for name, style in (("Euler 32", "-"), ("Euler 60", ":")):
                ax.axhline(mean(report, "sweep", name, metric), ls=style, c="k", lw=1, label=name)
            ax.axhline(mean(report, "controls", "real", metric), c="g", lw=1, label="real")
            ax.set(title=metric.replace("_", " "), xlabel="window of t, its middle")
        axes[0, 0].legend(fontsize=7)
    load_videos = lambda name: torch.load(
        arm_file(report, "sweep", name, 0).with_name("videos.pt"), weights_only=True)
    real = conditions(load(report["arms"] / "network_0", "cpu")[0]).videos[:6].float() / 127.5 - 1
    rows = torch.cat([real, load_videos("Euler 32"), load_videos(best)])
    save_gif(rows, f"{report['path']}.gif", columns=6)


def main(argv=None):
    report = open_report("self_refine", __doc__, argv, also=["tests/claims/physics.py"])
    preset = report["args"].preset
    kind = report["args"].device
    cuda = kind == "cuda" or (kind == "auto" and torch.cuda.is_available())
    report["device"], seeds = torch.device("cuda" if cuda else "cpu"), SEEDS[preset]
    if preset == "gpu":
        run(report, seeds, preset, inline)
    else:  # a process for each core
        with mp.get_context("spawn").Pool(min(2, mp.cpu_count()), one_thread) as workers:
            run(report, seeds, preset, workers.apply_async)


def run(report, seeds, preset, pool):
    """All tables; pool(function, arguments).get() does the work."""
    flags = [*TRAIN[preset], "--device", report["device"].type]
    short = ["--given", "0", "--steps", "400" if preset == "cpu" else "2000"]
    one = ["--frames", "1", "--patch-frames", "1", "--batch-size", "512"]
    if preset == "gpu":
        one[-1] = "2048"
    jobs = {f"network_{seed}": [*flags, "--seed", str(seed)] for seed in seeds}
    jobs |= {f"T_16_{seed}": [*flags, *short, "--seed", str(seed)] for seed in seeds}
    jobs |= {f"T_1_{seed}": [*flags, *short, *one, "--seed", str(seed)] for seed in seeds}
    for done in [pool(train, (report["arms"] / name, job)) for name, job in jobs.items()]:
        done.get()

    for name in ("Euler", *(f"{low:g}-{high:g}:3" for low, high in WINDOWS), "0.4-0.6:1",
                 "0.4-0.6:8", "0-1:1", "0-1:3"):
        arm(report, "modes", name, 0, lambda folder: modes("" if name == "Euler" else name))
    arm(report, "modes", "one iteration at t = 0.5", 0, lambda folder: lost_variance())
    run_controls(report, seeds)
    arms = sweep_arms(preset)
    run_arms(report, "sweep", arms, seeds, evaluate, "held out", pool)
    best = choose(report, seeds, arms)
    run_arms(report, "planner", {"Euler 32": arms["Euler 32"], best: arms[best]}, seeds, evaluate,
             "fast", pool)
    run_arms(report, "spread", {"Euler 32": arms["Euler 32"], best: arms[best]}, seeds, spread_of,
             "held out", pool)
    for T in ("T 1", "T 16"):
        for plan in dict.fromkeys(("0-0.2:3", "0.4-0.6:3", arms[best]["plan"])):
            for seed in seeds:
                folder = report["arms"] / f"{T.replace(' ', '_')}_{seed}"
                sampler = dict(plan=plan, sampling_steps=steps_for(NFE, plan))
                arm(report, "frames", f"{T}, {plan}", seed,
                    lambda kept: change(folder, sampler, report["device"]))
    if preset == "gpu":
        run_gpu_tables(report, seeds, arms[best])
    judge_claims(report, seeds, best)
    draw_figures(report, best, preset)


if __name__ == "__main__":
    main()
