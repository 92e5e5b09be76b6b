"""Does predict-and-perturb bring videos nearer to the law of motion, at equal compute?

    python -m tests.claims.self_refine                  # 12 minutes, 2 slow CPU cores
    python -m tests.claims.self_refine --preset gpu     # pixels, 3 seeds, mask, shift, lengths: not
                                                        # run; more than 30 minutes on one GPU

What the paper reports (arXiv:2601.18577v1) and what counts as agreeing, stated before the run. Its
evidence is human preference (60 evaluations against the default's 40: 73.6 %; against 80: 74.1 %)
and benchmarks (VideoPhy2 +1.1 points, PhyWorldBench 29.3 to 40.0); here the error against exact
physics is measured on 160 held-out conditions, with the same initial noise in all arms of a seed.
An interval is a 95 % bootstrap over conditions. A rule on intervals is judged for every seed: as in
the paper if it lies on the paper's side of 0, contradicted if on the other, not resolved if it
holds 0; of several, the verdict is partly if some hold and some do not.
Seen before: seed 0, 96 conditions, 32 evaluations. Teleports and residual of Euler 0.118 and 9.44;
t 0.2-0.4, K 3: 0.051 and 6.18, speed ratio 1.62 to 1.10; t 0-0.2, which then held t = 0: 0.138 and
10.97. The default plan of the script is that window; here the best one is chosen anew. And a run
(f326342) with 256 conditions and the default 2,600 steps, 400 for frames, of 24 minutes: sweep,
twice and modes as in the paper, early contradicted, planner and frames partly. This one has 160,
1,600 and 260, to end within 15 minutes; nothing else was changed.

controls Real clips, real clips through the autoencoder, frozen and shuffled clips in every metric.
sweep    Five windows of t and K = 1, 3, 5 (gpu: 1, 2, 3, 5, 8) in each of their steps, as many
         Euler steps N as let N + sum K be at most 32 evaluations (NFE); Euler with 32.
         Best is the arm with the fewest faults (share of teleports + share of bad frames, mean of
         the seeds) on the even conditions, among those whose speed ratio there is at least 0.9 at
         every seed; if none is, sweep, twice, early and planner are not resolved.
         Agrees if on the odd conditions the intervals of best minus Euler, in teleports and in
         residual, lie below 0. Guards, which can only make it partly: speed ratio of at least 0.9,
         bad videos not more frequent (their interval does not lie above 0).
twice    Paper: better than twice the default's steps, which are 1.3 times its own. The same
         intervals against Euler with 60, 1.9 times: a harder test.
early    Paper: early steps, t < 0.2, give nearly all of the gain. Of its arms that with the fewest
         faults on the even conditions; on the odd ones the interval of half of best's gain in
         teleports minus this arm's. Agrees if it lies below 0; not resolved where best's own gain
         is not above 0. The plan of the authors' code at shift 3 (theirs is not known; 40 steps,
         60 evaluations) stands in the table sweep, its differences taken to Euler with 60, shift 3.
planner  Paper: local search, it finds nothing that the prior does not hold. The same conditions
         with first speeds of 2.0 to 2.6; training has |vx| <= 1.6, |vy| <= 1.2. Relative reduction
         of the distance to the simulator (position) by best: interval of that on fast conditions
         minus that on held-out ones, odd conditions. Agrees if below 0; not resolved where the
         reduction on held-out ones is not above 0.
spread   Mean spread over four samples of a condition, Euler and best: reported.
distance RMSE to the nearest trajectory of the simulator, controls, Euler and best: reported.
modes    Paper: mode-seeking (Fig. 21). A mixture of eight Gaussians in the plane, exact velocity,
         N = 20, so NFE differ; 200,000 samples, three seeds. Agrees if the entropy of the modes
         falls from Euler over K = 1, 3 to 8 in 0.4-0.6, and is lower for 0-1 than for each fifth of
         it at K = 3: at every seed, and in the mean by more than both standard deviations.
frames   Paper: one iteration changes an image's content, a video's hardly (Fig. 13); here only
         whether it changes an image more than a video, in pixels. Networks for clips of 16 frames
         and for single ones, no given frames, the number of balls as label, equal steps, half as
         many frames a batch for single ones. One iteration in one step, at t = 0.2 or 0.4 of
         N = 20. change = RMS difference to Euler's sample of the same noise over that of two
         samples. Agrees if the interval of single frames minus clips lies above 0.
mask     (gpu) Paper: without mask the background over-saturates with K and guidance, with it not.
         Clips with a texture, guidance 4, window 0.2-0.6. drift = median change, against Euler, of
         places that no real ball comes near; drift_moving of those that one crosses. Agrees if
         drift is higher for K = 5 than for K = 2, tau at the median of U more than halves it and
         contrast comes nearer to 1: at every seed, and in the mean by more than both standard
         deviations. Guard: the masked arm keeps 0.7 of drift_moving, so that the mask has not
         undone everything. A second claim: the AUC of U for places that balls cross is above 0.6.
shift    (gpu) The window 0-0.2 and the best one at shift 1, 3, 5: reported.
lengths  (gpu) Euler and best after a quarter, half and all of the training: reported.

A sampler that slows balls down or freezes them is not nearer to physics: see speed_ratio.
"""
import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import torch
import torch.multiprocessing as mp

import self_refine as script
from common import (autocast, bouncing_balls, draw_balls, fail, figure, load_checkpoint, mix,
                    save_gif, save_grid, simulate_balls)
from tests.claims import physics
from tests.claims.report import (arm, arm_file, attempt, conclude, cpu_cores, exceeds, mean,
                                 open_report, overall, values)

CONDITIONS, NFE, DRAWS = 160, 32, 2000  # DRAWS: of a bootstrap that decides
WINDOWS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
CODE_PLAN = "0.013-0.05:3,0.05-0.145:1"  # of the authors' Wan script: 20 more at N = 40, shift 3
TRAIN = {"cpu": ["--steps", "1600"], "gpu": ["--preset", "gpu"]}
SEEDS = {"cpu": (0, 1), "gpu": (0, 1, 2)}
SHORT = {"cpu": 260, "gpu": 2000}  # steps of the networks of the table frames
ONE_STEP = {0.2: "0.2-0.25:1", 0.4: "0.4-0.45:1"}  # of N = 20
KS = {"cpu": (1, 3, 5), "gpu": (1, 2, 3, 5, 8)}
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)


# ---- arms ------------------------------------------------------------------------------


def steps_for(nfe, plan, shift=1.0):
    """The largest N with N + sum K <= nfe; a plan as text."""
    for N in range(nfe, 2, -1):
        flags = dict(plan=plan, shift=shift, sampling_steps=N)
        try:
            if evaluations(flags) <= nfe:
                return N
        except ValueError:  # no step of so few lies in the window
            break
    raise ValueError(f"{nfe} evaluations are too few for {plan}")


def evaluations(flags):
    """Of the velocity, by these sampler flags; guidance doubles the network's."""
    times = script.flow_times(flags["sampling_steps"], flags.get("shift", 1.0))
    steps = script.plan_steps(script.parse_plan(flags["plan"]), times)
    return len(times) - 1 + sum(steps.values())


def sweep_arms(preset):
    """{name: sampler flags} of the table sweep, Euler first."""
    arms = {f"Euler {N}": dict(plan="", sampling_steps=N) for N in (32, 60)}
    arms["Euler 60, shift 3"] = dict(plan="", sampling_steps=60, shift=3.0)
    for low, high in WINDOWS:
        for K in KS[preset]:
            plan = f"{low:g}-{high:g}:{K}"
            arms[f"t {low:g}-{high:g} K {K}"] = dict(plan=plan, sampling_steps=steps_for(NFE, plan))
    arms["t 0-1 K 1"] = dict(plan="0-1:1", sampling_steps=steps_for(NFE, "0-1:1"))
    arms["authors' plan, shift 3"] = dict(plan=CODE_PLAN, sampling_steps=40, shift=3.0)
    return arms


def conditions(cfg, kind="held out", n=None):
    """Clips that no training has seen: held out, or the same with first speeds of 2.0 to 2.6."""
    n = n or CONDITIONS
    clips = bouncing_balls(n, cfg.frames, cfg.image_size, mix(2, 0), cfg.texture)
    if kind == "fast":
        v = clips.tracks[:, 0, :, 2:]
        speed = 2.0 + 0.6 * torch.rand(n, 3, 1, generator=torch.Generator().manual_seed(mix(3, 0)))
        v = speed * torch.nn.functional.normalize(v, dim=-1)
        clips.tracks = simulate_balls(clips.tracks[:, 0, :, :2], v, clips.radius, cfg.frames)
        clips.videos = (255 * draw_balls(clips.tracks, clips.radius, cfg.image_size)).round().byte()
    return clips


def load(network, device):
    """Config, EMA network and codec of a run folder."""
    saved = load_checkpoint(network / "last.pt")
    cfg = script.Config(**saved["config"])
    net, codec = (module.to(device).eval().requires_grad_(False) for module in script.build(cfg))
    net.load_state_dict(saved["ema"])
    codec.load_state_dict(saved["codec"])
    return cfg, net, codec


@torch.no_grad()
def continued(network, flags, clips, device, first=0):
    """Videos (n, 3, F, S, S) in [-1, 1] that continue clips, with sampler flags and the noise of
    clips first, first + 1, ..."""
    cfg, net, codec = load(network, device)
    cfg = dataclasses.replace(cfg, **flags)
    real = clips.videos.float() / 127.5 - 1
    parts = [script.draw(net, codec, real[i : i + 64], clips.labels[i : i + 64],
                         range(first + i, first + min(i + 64, len(real))), cfg, device,
                         script.parse_plan(cfg.plan)).cpu()
             for i in range(0, len(real), 64)]
    return torch.cat(parts)


# what a worker does: work(folder, ...) -> metrics; the folder is the arm's own


def train(folder, flags):
    """Train through the script's own command line, or go on where it stopped."""
    script.main([*flags, "--out", str(folder), "--sample-every", "1000000"])
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    return {"loss": json.loads(last)["loss"]}


def evaluate(folder, network, flags, kind, device):
    """Draw and measure; leaves measure.pt and the first clips in the folder."""
    clips = conditions(load(network, device)[0], kind)
    videos = continued(network, flags, clips, device)
    m = physics.measure(videos, clips)
    torch.save(m, folder / "measure.pt")
    torch.save(videos[:3].clone(), folder / "videos.pt")
    return physics.summary(m) | {"nfe": evaluations(flags)}


def spread(folder, network, flags, device):
    """Spread in pixels of four samples for each of 64 conditions."""
    cfg = load(network, device)[0]
    clips = conditions(cfg, n=64)
    tracks = [physics.measure(continued(network, flags, clips, device, 1000 * i), clips)["tracks"]
              for i in range(4)]
    return {"spread": physics.spread(tracks, cfg.given, cfg.image_size).nanmean().item(),
            "nfe": evaluations(flags)}


def distance(folder, network, source):
    """Median over clips of physics.distance, of what a file measure.pt holds."""
    cfg = load(network, "cpu")[0]
    found = physics.distance(torch.load(source), conditions(cfg), cfg.image_size)
    return {"distance": found.nanmedian().item()}


def change(folder, network, flags, device):
    """RMS difference to Euler's sample of the same noise, over that of two of Euler's samples."""
    clips = conditions(load(network, device)[0])
    plain = flags | {"plan": ""}
    videos, euler, other = (continued(network, f, clips, device, first)
                            for f, first in ((flags, 0), (plain, 0), (plain, 1000)))
    m = {k: (v - euler).double().square().mean((1, 2, 3, 4))
         for k, v in (("moved", videos), ("apart", other))}
    torch.save(m, folder / "measure.pt")
    return {"change": ratio(m), "nfe": evaluations(flags)}


def ratio(m):
    """change of the squared differences (n,) that change() keeps."""
    return (m["moved"].mean() / m["apart"].mean()).sqrt().item()


# ---- mode-seeking on a mixture, exactly ------------------------------------------------

WEIGHTS = torch.tensor([0.40, 0.16, 0.12, 0.09, 0.065, 0.055, 0.055, 0.055], dtype=torch.float64)
ANGLES = torch.arange(8, dtype=torch.float64) * math.pi / 4
CENTRES, STD = 1.4 * torch.stack([ANGLES.cos(), ANGLES.sin()], -1), 0.15


def mixture_velocity(z, t):
    """E[z1 - z0 | z] for the mixture; z (1, 2, n, 1, 1), its "frames" being independent points."""
    points = z[0, :, :, 0, 0].T  # (n, 2)
    variance = t**2 * STD**2 + (1 - t) ** 2
    log_p = WEIGHTS.log() - torch.cdist(points, t * CENTRES).square() / (2 * variance)
    share = log_p.softmax(1)  # (n, 8): which mode it came from
    gain = t * STD**2 / variance
    x = share @ (CENTRES * (1 - gain * t)) + gain * points  # E[z1 | z]
    u = (x - points) / (1 - t)
    return u.T[None, :, :, None, None]


def modes(folder, plan, seed, N=20, n=200_000):
    """Entropy of the modes of samples, share of the first mode and of the three rare ones."""
    generator = torch.Generator().manual_seed(mix(seed, 0))
    z0 = torch.randn(1, 2, n, 1, 1, dtype=torch.float64, generator=generator)
    times = script.flow_times(N)
    steps = script.plan_steps(script.parse_plan(plan), times)
    fresh = [torch.Generator().manual_seed(mix(seed, 1))]
    z, _ = script.pnp_sample(mixture_velocity, z0, times, steps, fresh)
    points = z[0, :, :, 0, 0].T
    share = torch.bincount(torch.cdist(points, CENTRES).argmin(1), minlength=8).double() / n
    return {"entropy": -torch.special.xlogy(share, share).sum().item(), "top": share[0].item(),
            "rare": share[5:].mean().item(), "nfe": N + sum(steps.values())}


# ---- mask: gpu preset ------------------------------------------------------------------


def background(folder, network, flags, device):
    """Drift of places that no ball comes near, contrast of them, and how U marks moving places.

    flags["tau"] < 0: take the median of U as tau, found on the first 64 clips without mask
    """
    cfg, net, codec = load(network, device)
    clips = conditions(cfg)
    real = clips.videos.float() / 127.5 - 1
    cover = draw_balls(clips.tracks, clips.radius, cfg.image_size)
    shape = len(real), 3, cfg.frames - cfg.given, cfg.image_size, cfg.image_size
    still, moving = (places[:, None, None].expand(shape) for places in (
        cover.amax((1, 2)) < 0.02, cover.amax((1, 2)) > 0.3))
    result = {}
    if flags["plan"]:
        z1, y = codec.encode(real[:64].to(device)), clips.labels[:64].to(device)
        velocity = script.conditional_velocity(net, y, z1[:, :, : cfg.given], flags["guidance"])
        times = script.flow_times(flags["sampling_steps"])
        steps = script.plan_steps(script.parse_plan(flags["plan"]), times)
        initial, fresh = ([torch.Generator().manual_seed(mix(4, i, kind)) for i in range(len(z1))]
                          for kind in (0, 1))
        z0 = torch.stack([torch.randn(z1.shape[1:], generator=g) for g in initial]).to(device)
        with autocast(cfg, device):
            _, U = script.pnp_sample(velocity, z0, times, steps, fresh)
        u = torch.stack(list(U.values())).mean(0).cpu()[:, 0, cfg.given :]
        crossed = moving[:64, 0]
        result = {"auc": auc(u[crossed], u[~crossed]), "median_U": u.median().item()}
    if flags["tau"] < 0:
        flags = flags | {"tau": result["median_U"]}
    euler, videos = (continued(network, f, clips, device)[:, :, cfg.given :]
                     for f in (flags | {"plan": ""}, flags))
    torch.save(videos[:3].clone(), folder / "videos.pt")
    moved, real = (videos - euler).abs(), real[:, :, cfg.given :]
    return result | {"drift": moved[still].median().item(),
                     "drift_moving": moved[moving].median().item(),
                     "contrast": (videos[still].std() / real[still].std()).item(),
                     "tau": flags["tau"], "nfe": evaluations(flags)}


def auc(high, low):
    """P(a value of high exceeds one of low), ties halved."""
    both = torch.cat([high, low])
    _, inverse, counts = both.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2.0)[inverse][: len(high)].double()
    return ((rank.sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low))).item()


# ---- tables ----------------------------------------------------------------------------


def inline(work, arguments):
    """Like Pool.apply_async, but done when the result is asked for."""
    return SimpleNamespace(get=lambda: work(*arguments))


def run_arms(report, pool, table, jobs, extra=lambda name, seed: {}):
    """jobs {(name, seed): (work, *arguments)}: all to the pool, then an arm of each, in order.

    extra(name, seed): further metrics, found when the arm and those before it are done
    """
    started = {}
    for (name, seed), (work, *arguments) in jobs.items():
        kept = arm_file(report, table, name, seed)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            started[name, seed] = pool(attempt, (work, kept.parent, *arguments))
    for name, seed in jobs:
        arm(report, table, name, seed,
            lambda folder: started[name, seed].get() | extra(name, seed))


def run_networks(report, pool, jobs):
    """Train jobs {(name, seed): flags}; a half-trained one of other code is refused."""
    for name, seed in jobs:
        code = network(report, name, seed) / "code"
        code.parent.mkdir(parents=True, exist_ok=True)
        other = code.exists() and code.read_text() != report["code"]
        if other and not report["args"].reuse:
            fail(f"{code.parent} was made by other code: remove {report['arms']}, or pass --reuse")
        code.write_text(report["code"])
    device = ["--device", report["device"].type]
    run_arms(report, pool, "networks", {
        (name, seed): (train, [*TRAIN[report["args"].preset], *device, "--seed", str(seed), *flags])
        for (name, seed), flags in jobs.items()})


def network(report, name, seed):
    """Run folder of a network."""
    return arm_file(report, "networks", name, seed).parent


def run_controls(report):
    """Floors and cheats, on the conditions of the sweep; no seed of a network is in them."""
    cfg, _, codec = load(network(report, "main", 0), "cpu")
    clips = conditions(cfg)
    real = clips.videos.float() / 127.5 - 1
    rows = {"real": real, "frozen": physics.frozen(real, cfg.given),
            "shuffled": physics.shuffled(real, cfg.given),
            "real through the autoencoder": codec.decode(codec.encode(real))}

    def measure(folder):
        m = physics.measure(videos, clips)
        torch.save(m, folder / "measure.pt")
        return physics.summary(m)

    for name, videos in rows.items():
        arm(report, "controls", name, 0, measure)


def measured(report, table, name, seed, part=slice(None)):
    """What a worker left, of all conditions or of a part."""
    m = torch.load(arm_file(report, table, name, seed).with_name("measure.pt"))
    return {k: v[part] for k, v in m.items()}


def difference(metric, *measures, draws=None):
    """Interval (low, value, high) of one measure's metric minus the other's."""
    def statistic(one, two):
        one, two = (m[metric].nanmedian() if metric == "residual" else m[metric].nanmean()
                    for m in (one, two))
        return (one - two).item()
    return physics.interval(statistic, *({metric: m[metric]} for m in measures),
                            draws=draws or DRAWS)


def differences(report, table, bases, name, seed):
    """Metrics of an arm beside those of the arm bases[name], where it has one."""
    if bases.get(name, name) == name:
        return {}
    pair, result = [measured(report, table, x, seed) for x in (name, bases[name])], {}
    for metric in ("teleports", "residual"):
        low, value, high = difference(metric, *pair, draws=300)
        result |= {f"{metric}_diff": value, f"{metric}_low": low, f"{metric}_high": high}
    return result


def run_gpu_tables(report, pool, seeds, best):
    """Tables shift, lengths and mask, on pixels."""
    device, jobs, bases = report["device"], {}, {}
    for s in (1.0, 3.0, 5.0):
        for window, plan in (("Euler", ""), ("t 0-0.2", "0-0.2:3"), ("best", best["plan"])):
            name, steps = f"{window}, shift {s:g}", steps_for(NFE, plan, s)
            bases[name] = f"Euler, shift {s:g}"
            flags = dict(plan=plan, shift=s, sampling_steps=steps)
            for seed in seeds:
                jobs[name, seed] = (evaluate, network(report, "main", seed), flags, "held out",
                                    device)
    run_arms(report, pool, "shift", jobs, functools.partial(differences, report, "shift", bases))
    whole = script.PRESETS["gpu"]["steps"]
    parts = {"main": 1.0, "quarter": 0.25, "half": 0.5}
    run_networks(report, pool, {(name, seed): ["--steps", str(int(share * whole))]
                                for name, share in parts.items() for seed in seeds
                                if name != "main"})
    run_arms(report, pool, "lengths", {
        (f"{word}, {share:.0%} of the steps", seed):
            (evaluate, network(report, name, seed), flags, "held out", device)
        for name, share in parts.items() for seed in seeds
        for word, flags in (("Euler", dict(plan="", sampling_steps=NFE)), ("best", best))})
    run_networks(report, pool, {("texture", seed): ["--texture"] for seed in seeds})
    run_arms(report, pool, "mask", {
        (name, seed): (background, network(report, "texture", seed),
                       dict(plan=plan, tau=tau, guidance=4.0, sampling_steps=20), device)
        for name, plan, tau in (("Euler", "", 0.0), ("K 2", "0.2-0.6:2", 0.0),
                                ("K 5", "0.2-0.6:5", 0.0), ("K 5, mask", "0.2-0.6:5", -1.0))
        for seed in seeds})


# ---- the claim -------------------------------------------------------------------------


def sign(low, value, high):
    """An interval that should lie below 0, in conclude's words."""
    return "as in the paper" if high < 0 else "contradicted" if low > 0 else "not resolved"


def choose(report, seeds, names):
    """Best and best early arm on the even conditions, and whether any keeps up the speed."""
    even = {name: [measured(report, "sweep", name, seed, EVEN) for seed in seeds] for name in names}
    faults = {name: sum((m["teleports"].mean() + m["bad_frames"].mean()).item() for m in runs)
              for name, runs in even.items()}
    steady = [name for name, runs in even.items()
              if all(physics.summary(m)["speed_ratio"] >= 0.9 for m in runs)]
    early = [name for name in names if name.startswith("t 0-0.2")]
    return min(steady or names, key=faults.get), min(early, key=faults.get), bool(steady)


def judge_sweep(report, seeds, best, early):
    """Verdicts {table: in conclude's words} on the odd conditions: sweep, twice, early, planner."""
    found, held = {table: {} for table in ("sweep", "twice", "early", "planner")}, True
    one = lambda m: {k: m[k] for k in ("teleports", "position")}
    gap = lambda euler, m: (m["teleports"].mean() - euler["teleports"].mean()).item()
    kept = lambda euler, m: (m["position"].nanmean() / euler["position"].nanmean()).item()
    for seed in seeds:
        m, first = (measured(report, "sweep", name, seed, ODD) for name in (best, early))
        for table, base in (("twice", "Euler 60"), ("sweep", "Euler 32")):
            euler = measured(report, "sweep", base, seed, ODD)
            for metric in ("teleports", "residual"):
                found[table][metric, seed] = sign(*difference(metric, m, euler))
            held &= difference("bad", m, euler)[0] <= 0
        held &= physics.summary(m)["speed_ratio"] >= 0.9
        fast = [one(measured(report, "planner", name, seed, ODD)) for name in ("Euler 32", best)]
        euler, m, first = one(euler), one(m), one(first)
        test = lambda statistic, *runs: sign(*physics.interval(statistic, *runs, draws=DRAWS))
        if test(gap, euler, m) == "as in the paper":  # half of best's gain - early's < 0
            found["early"][seed] = test(
                lambda e, b, f: gap(e, f) - 0.5 * gap(e, b), euler, m, first)
        if test(lambda e, b: kept(e, b) - 1, euler, m) == "as in the paper":
            found["planner"][seed] = test(
                lambda e, b, e2, b2: kept(e, b) - kept(e2, b2), euler, m, *fast)
    for table in ("early", "planner"):
        found[table] |= {seed: "not resolved" for seed in seeds if seed not in found[table]}
    results = {table: overall(words) for table, words in found.items()}
    for table in ("sweep", "twice"):
        if results[table] == "as in the paper" and not held:
            results[table] = "partly"
    return results


def judge_claims(report, seeds, best, early, steady):
    """Hold the numbers against the docstring."""
    results = judge_sweep(report, seeds, best, early)
    for table, claim in (
            ("sweep", f"human preference 73.6 %, with 60 NFE for 40; here equal; best: {best}"),
            ("twice", "preferred to 80 NFE, too, 74.1 %; here 60 for 32"),
            ("early", f"t < 0.2 gives nearly all of the gain; best there: {early}"),
            ("planner", "local search only, no planning")):
        conclude(report, table, claim, results[table] if steady else "not resolved")
    entropy = lambda name: values(report, "modes", name, "entropy")
    row = [entropy(name) for name in ("Euler", "0.4-0.6:1", "0.4-0.6:3", "0.4-0.6:8")]
    found = {f"K {i}": exceeds(more, less) for i, (more, less) in enumerate(zip(row, row[1:]))}
    found |= {(low, high): exceeds(entropy(f"{low:g}-{high:g}:3"), entropy("0-1:3"))
              for low, high in WINDOWS}
    conclude(report, "modes", "mode-seeking: heavy modes gain (Fig. 21)", overall(found))
    found = {}
    for t in ONE_STEP:
        for seed in seeds:
            pair = (measured(report, "frames", f"{T}, t {t}", seed) for T in ("T 16", "T 1"))
            gap = lambda clip, single: ratio(clip) - ratio(single)
            found[t, seed] = sign(*physics.interval(gap, *pair, draws=DRAWS))
    conclude(report, "frames", "an iteration changes an image more than a video (Fig. 13)",
             overall(found))
    if report["args"].preset == "gpu":
        judge_mask(report)


def judge_mask(report):
    """The table mask against the docstring."""
    drift, moving, contrast = ({name: values(report, "mask", name, metric)
                                for name in ("K 2", "K 5", "K 5, mask")}
                               for metric in ("drift", "drift_moving", "contrast"))
    off = {name: [abs(x - 1) for x in numbers] for name, numbers in contrast.items()}
    found = {"K": exceeds(drift["K 5"], drift["K 2"]),
             "mask": exceeds([x / 2 for x in drift["K 5"]], drift["K 5, mask"]),
             "contrast": exceeds(off["K 5"], off["K 5, mask"])}
    result = overall(found)
    held = all(a >= 0.7 * b for a, b in zip(moving["K 5, mask"], moving["K 5"]))
    conclude(report, "mask", "the mask keeps the background (tau 0.25)",
             "partly" if result == "as in the paper" and not held else result)
    areas = values(report, "mask", "K 5", "auc")
    conclude(report, "mask", "U is high where things move", exceeds(areas, [0.6] * len(areas)))


def draw_figures(report, best, preset):
    """Teleports, residual and speed by window and K; a GIF and a strip: real, Euler, refined."""
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
    real = conditions(load(network(report, "main", 0), "cpu")[0]).videos[:3].float() / 127.5 - 1
    rows = torch.stack([real, load_videos("Euler 32"), load_videos(best)])  # (3, 3, 3, F, S, S)
    rows = (8 * rows).round() / 8  # 17 grey levels: a third of the bytes
    save_gif(rows.flatten(0, 1), f"{report['path']}.gif", columns=3)
    strip = rows[:, :, :, ::2].permute(1, 0, 3, 2, 4, 5)  # of a clip: every second frame
    save_grid(strip.flatten(0, 2), f"{report['path']}_strip.png", columns=strip.shape[2])


def main(argv=None):
    report = open_report("self_refine", __doc__, argv, also=["tests/claims/physics.py"])
    preset, kind = report["args"].preset, report["args"].device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    report["device"], seeds = torch.device(kind), SEEDS[preset]
    if preset == "gpu":
        run(report, seeds, preset, inline)
    else:  # a process for each core, which it has to itself
        with mp.get_context("spawn").Pool(min(2, cpu_cores()), torch.set_num_threads, (1,)) as pool:
            run(report, seeds, preset, pool.apply_async)


def run(report, seeds, preset, pool):
    """All tables; pool(function, arguments).get() does the work."""
    device, cpu = report["device"], preset == "cpu"
    short = ["--given", "0", "--steps", str(SHORT[preset])]
    single = ["--frames", "1", "--patch-frames", "1", "--batch-size", "512" if cpu else "2048"]
    run_networks(report, pool, {(name, seed): flags for name, flags in (
        ("main", []), ("T 16", short), ("T 1", [*short, *single])) for seed in seeds})
    fifths = [f"{low:g}-{high:g}:3" for low, high in WINDOWS]
    run_arms(report, pool, "modes", {
        (name, seed): (modes, "" if name == "Euler" else name, seed)
        for name in ("Euler", *fifths, "0.4-0.6:1", "0.4-0.6:8", "0-1:1", "0-1:3")
        for seed in (0, 1, 2)})
    run_controls(report)
    arms = sweep_arms(preset)
    bases = {name: "Euler 32" for name in arms}
    bases |= {"Euler 60, shift 3": "Euler 60", "authors' plan, shift 3": "Euler 60, shift 3"}
    run_arms(report, pool, "sweep", {
        (name, seed): (evaluate, network(report, "main", seed), flags, "held out", device)
        for name, flags in arms.items() for seed in seeds},
        functools.partial(differences, report, "sweep", bases))
    best, early, steady = choose(report, seeds, [name for name in arms if name.startswith("t ")])
    two = [(name, seed) for name in ("Euler 32", best) for seed in seeds]
    run_arms(report, pool, "planner", {
        (name, seed): (evaluate, network(report, "main", seed), arms[name], "fast", device)
        for name, seed in two})
    run_arms(report, pool, "spread", {
        (name, seed): (spread, network(report, "main", seed), arms[name], device)
        for name, seed in two})
    sources = [("controls", name, 0) for name in ("real", "frozen", "shuffled")]
    run_arms(report, pool, "distance", {
        (name, seed): (distance, network(report, "main", seed),
                       arm_file(report, table, name, seed).with_name("measure.pt"))
        for table, name, seed in (*sources, *(("sweep", *pair) for pair in two))})
    run_arms(report, pool, "frames", {
        (f"{T}, t {t}", seed): (change, network(report, T, seed),
                                dict(plan=plan, sampling_steps=20), device)
        for T in ("T 1", "T 16") for t, plan in ONE_STEP.items() for seed in seeds})
    if preset == "gpu":
        run_gpu_tables(report, pool, seeds, arms[best])
    judge_claims(report, seeds, best, early, steady)
    draw_figures(report, best, preset)


if __name__ == "__main__":
    main()
