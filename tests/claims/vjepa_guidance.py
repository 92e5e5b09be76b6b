"""What does a world model's surprise measure, and does choosing by it give better physics?

    python -m tests.claims.vjepa_guidance                  # within 15 minutes, 2 CPU cores
    python -m tests.claims.vjepa_guidance --preset gpu     # V-JEPA 2 trained in place, too; 3 seeds

What the papers report (WMReward, arXiv:2601.10553v2; V-JEPA 2) and what counts as agreeing, stated
before the run. Every bound holds for every seed and world model (frozen; gpu preset: tiny, too):

violations  Low surprise means plausible. Share of held-out clips that surprise less than the same
            clip with a broken law. Agrees if it is at least 0.9 for each of the nine, and for
            reversed time, which elastic balls may do, between 0.4 and 0.6; and the world has not
            collapsed: std of target features over clips > 0.5, their effective rank > 10. Third
            parties find V-JEPA 2 near chance on IntPhys 2.
reward      Best-of-N by surprise: PhysicsIQ 27.76, 31.87, 32.32, 32.90 with N up to 16: most of it
            is there by N = 4. An outside test finds no gain, Spearman -0.12 to the score. Agrees if
            the residual by surprise falls from N = 1 to 4 to 16, half or more of it by 4, is lower
            at 16 than by pixel, copy-last and random, and the oracle is the lowest.
speed       Nobody reports this control: surprise may only prefer slow clips. Agrees (with the claim
            that it measures physics) if the partial rank correlation of surprise and residual,
            given speed, has its interval above 0, and the residual of the chosen clip is below that
            of the candidate of the same condition nearest in speed.
guidance    Alone it does nothing: +0.12, +0.00, -0.20 points. Agrees if at eta 0.003 and 0.01 and
            for every path of the gradient surprise falls, and the residual changes by less than
            10 %.
both        Guidance of all candidates, then best-of-N: 33.44 against 32.90, 36.28 against 36.56.
            Agrees if its residual is within 10 % of that of best-of-N, for N = 4.
refine      Best-of-N and predict-and-perturb (self_refine.py) add up; no paper reports it. Agrees
            if the residual of both is below that of each alone, a sample having as many
            evaluations of the network.
windows     Length and stride hardly matter (57.1 to 60.8 points). Agrees if the residual at N = 16
            is within 10 % of the lowest, for every window and for both axes of the cosine.

residual    median over windows of five frames in free flight of |acceleration - gravity|, box
            widths / s^2; a frozen video has 1.6; real clips: table samples
speed       mean speed over that of the real clip: 1 is ideal, 0 a frozen video
position    mean distance to the simulator's continuation of the given frames, pixels
pixel       -reward: squared error of a predictor of pixels, trained alike; copy-last: 1 - cosine of
            the features with those of the last context frame; oracle: the residual itself
All N-fold choices share 16 candidates a condition: for N < 16 mean over the 16 / N groups.
"""
import functools
import math
import types

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import self_refine
import vjepa_guidance as script
from common import (autocast, bouncing_balls, draw_balls, figure, load_checkpoint, mix, save_gif,
                    setup, simulate_balls)
from tests.claims.physics import interval, measure, summary
from tests.claims.report import arm, arm_file, conclude, open_report, verdict

SEEDS = {"cpu": (0, 1), "gpu": (0, 1, 2)}
WORLDS = {"cpu": ("frozen",), "gpu": ("frozen", "tiny")}
FLAGS = {
    "cpu": ["--generator-steps", 1000, "--steps", 2000, "--clips", 4000, "--compile", "off",
            "--best-of", 2, "--n", 3],
    "gpu": ["--preset", "gpu"]}
WORLD_FLAGS = {  # in the gpu preset; the generator of `frozen` serves both
    "frozen": ["--world", "frozen", "--masks", "causal", "--predictor-dim", 128],
    "tiny": ["--generator-steps", 100]}
CONDITIONS = {"cpu": 96, "gpu": 256}
N = 16
BROKEN = "teleport vanish shuffle jitter freeze stop upwards through gain".split()
WINDOWS = {"4/8/1": (4, 8, 1), "4/8/4": (4, 8, 4), "4/12/2": (4, 12, 2), "8/16/8": (8, 16, 8)}
ETAS, PATHS = (0.003, 0.01, 0.03), ("target", "context", "both")
REWARDS = ("surprise", "pixel", "copy-last", "random", "oracle")


# ---- broken laws -----------------------------------------------------------------------


def go_on(state, radius, frames, gravity=1):
    """Exact continuation (n, frames, 3, 4) of states (n, 3, 4); gravity -1: upwards."""
    flip = state.new_tensor([0, 1 - gravity, 0, 0]) / 2
    turn = state.new_tensor([1, gravity, 1, gravity])  # y -> 1 - y, vy -> -vy
    tracks = simulate_balls(*(turn * state + flip).split(2, -1), radius, frames)
    return turn * tracks + flip


def broken(kind, clips, at=8):
    """Tracks of clips in which a law is broken, from frame `at` on, and which clips those are."""
    t, r, n = clips.tracks.clone(), clips.radius, len(clips.tracks)
    g, every = torch.Generator().manual_seed(0), torch.ones(n, dtype=torch.bool)
    left, state = t.shape[1] - at, clips.tracks[:, at]
    if kind == "teleport":  # go on as another clip with as many balls
        t[:, at:] = t[:, at:].roll(3, 0)
    elif kind == "vanish":
        t[:, at:, 0] = math.nan
    elif kind == "shuffle":
        t = t[:, torch.randperm(t.shape[1], generator=g)]
    elif kind == "jitter":  # by one pixel of 32
        t[..., :2] += torch.randn(t[..., :2].shape, generator=g) / 32
    elif kind == "freeze":
        t = t[:, 1:2].expand_as(t)
    elif kind == "stop":
        t[:, at:] = t[:, at : at + 1]
    elif kind == "upwards":
        t[:, at:] = go_on(state, r, left, gravity=-1)
    elif kind == "gain":  # of energy: half as fast again
        t[:, at:] = go_on(state * state.new_tensor([1, 1, 1.5, 1.5]), r, left)
    elif kind == "through":  # balls do not see each other
        alone = go_on(state.flatten(0, 1)[:, None], r.repeat_interleave(3), left)[:, :, 0]
        t[:, at:] = alone.unflatten(0, (n, 3)).transpose(1, 2)
        apart = (t - clips.tracks)[..., :2].norm(dim=-1).nan_to_num(0).amax((1, 2))
        return t, apart > 0.1
    elif kind == "reversed":
        t = t.flip(1)
    return t, every


def render(tracks, clips):
    """Videos of tracks in [-1, 1], on the background of clips."""
    back = clips.background.float()
    cover = draw_balls(tracks, clips.radius, clips.videos.shape[-1])
    return torch.lerp(back, back.new_tensor(255), cover).round() / 127.5 - 1


def violations(S, clips):
    """Share of clips that surprise less than their broken version; ties count half."""
    real, shares = S(render(clips.tracks, clips)), {}
    for kind in [*BROKEN, "reversed"]:
        tracks, index = broken(kind, clips)
        bad = S(render(tracks, clips))
        won = (bad > real).float() + 0.5 * (bad == real)
        shares[kind] = won[index.to(won.device)].mean().item()
    return shares


# ---- rewards ---------------------------------------------------------------------------


class Pixels(nn.Module):
    """Frames, at half the size, as tokens: what the predictor of pixels sees and predicts."""

    def forward(self, video, visible=None):
        return F.avg_pool3d(video, (1, 2, 2)).transpose(1, 2).flatten(2)


def pixel_loss(net, video, visible):
    """Squared error of the predicted hidden frames."""
    z_hat, z, _ = net(video, visible)
    error = (z_hat.float() - z).square().mean(-1)
    return ((error * ~visible).sum(1) / (~visible).sum(1)).mean()


def windows_of(video, W, stride):
    """(B, 3, F, S, S) -> (B windows, 3, W, S, S)."""
    return video.unfold(2, W, stride).permute(0, 2, 1, 5, 3, 4).flatten(0, 1)


def pixel_error(video, world, C, W, stride):
    """Squared error of the frames after the first C of each window, mean over windows: (B,)."""
    x = windows_of(video, W, stride)
    error = world.predict(x[:, :, :C], W) - world.target(x)[:, C:]
    return error.square().mean((1, 2)).unflatten(0, (len(video), -1)).mean(1)


def copy_last(video, world, C, W, stride):
    """1 - cosine of the features of what follows with those of the last context frame: (B,)."""
    x = windows_of(video, W, stride)
    z = script.plain_norm(world.target(x))
    z = z.unflatten(1, (W * world.grid[0] // video.shape[2], -1))
    c = C * z.shape[1] // W
    similar = F.cosine_similarity(z[:, c:], z[:, c - 1 : c], -1).mean((1, 2))
    return 1 - similar.unflatten(0, (len(video), -1)).mean(1)


def in_parts(function, video, size=128):
    """function of a batch of clips, in parts, without gradient; on the CPU."""
    with torch.no_grad():
        return torch.cat([function(part).cpu() for part in video.split(size)])


# ---- one seed --------------------------------------------------------------------------


def argv_of(preset, world, seed, out, device):
    """Command line of a run of the script."""
    flags = [*FLAGS[preset], *(WORLD_FLAGS[world] if preset == "gpu" else [])]
    return [str(a) for a in [*flags, "--seed", seed, "--device", device, "--out", out]]


def load_run(argv):
    """Config, device, generator, world model and codec of a finished run."""
    cfg = script.parse_config(script.Config, script.PRESETS, (), argv)
    device, saved = setup(cfg, "steps"), load_checkpoint(f"{cfg.out}/last.pt")
    codec = script.FrozenCodes(cfg.image_size, cfg.components)
    codec.load_state_dict(saved["codec"])
    net, world = (x.to(device).eval().requires_grad_(False) for x in script.build(cfg, codec))
    net.load_state_dict(saved["ema"])
    world.load_state_dict(saved["model"])
    return cfg, device, net, world, codec.to(device)


def train_pixels(cfg, device, out):
    """The predictor of pixels: the frozen world's predictor, steps, rate, clips and windows."""
    videos = script.load_videos(cfg, device)[0]
    width, grid = 3 * (cfg.image_size // 2) ** 2, (cfg.frames, 1, 1)
    torch.manual_seed(cfg.seed)
    predictor = script.LatentPredictor(grid, width, cfg.predictor_dim, depth=4)
    world = script.WorldModel(Pixels(), predictor, grid).to(device)

    def loss(i):
        k = torch.randint(cfg.frames - cfg.W + 1, ()).item()
        visible = script.draw_visible(len(i), (cfg.W, 1, 1), "causal", device)
        with autocast(cfg, device):
            return pixel_loss(world, videos[i][:, :, k : k + cfg.W].float() / 127.5 - 1, visible)

    fields = vars(cfg) | {"out": str(out)}
    script.train_stage(script.Config(**fields), world, 0.04, loss, lambda step: None)
    return world.eval().requires_grad_(False)


def measured(videos, clips):
    """physics.measure of N candidates a clip, videos (N, B, 3, F, S, S): {metric: (N, B, ...)}."""
    parts = [measure(v.cpu(), clips, script.GIVEN, clips.background) for v in videos]
    return {k: torch.stack([p[k] for p in parts]) for k in parts[0] if k not in ("tracks", "truth")}


def run_seed(preset, seed, folder, device):
    """Train what is missing and measure everything of one seed; saves folder/measured.pt."""
    if preset == "cpu":
        torch.set_num_threads(1)
    argv = {w: argv_of(preset, w, seed, folder / w, device) for w in WORLDS[preset]}
    for flags in argv.values():
        script.main(flags)
    runs = {w: load_run(flags) for w, flags in argv.items()}
    cfg, device, net, _, codec = runs["frozen"]
    balls = functools.partial(bouncing_balls, frames=cfg.frames, size=cfg.image_size,
                              texture=cfg.texture)
    clips = balls(CONDITIONS[preset], seed=mix(2, seed))
    real = clips.videos.to(device).float() / 127.5 - 1
    out = {"health": {}, "violations": {}, "S": {}, "windows": {}, "guidance": {}}
    worlds = {w: run[3] for w, run in runs.items()}
    for w, world in worlds.items():
        S = functools.partial(script.surprise, world=world, C=cfg.C, W=cfg.W, stride=cfg.stride)
        parts = functools.partial(in_parts, lambda x, S=S: S(x.to(device)))
        tracks = clips.tracks.to(device)
        out["health"][w] = script.health(world, real, tracks, lambda x: parts(x).to(device))
        out["violations"][w] = violations(parts, balls(384, seed=mix(3, seed)))
    # candidates, from the same noise: Euler, and predict-and-perturb with as many evaluations
    z1, y = codec.encode(real), clips.labels.to(device)
    cond = z1[:, :, : script.GIVEN]
    steps = cfg.sampling_steps
    times = self_refine.flow_times(steps)
    plan = self_refine.plan_steps(self_refine.parse_plan(self_refine.Config.plan), times)
    out["nfe"] = steps + sum(plan.values())
    samples = {"Euler": [], "refined": []}
    velocity = self_refine.conditional_velocity(net, y, cond)
    for k in range(N):
        g = torch.Generator().manual_seed(mix(seed, k))
        noise = torch.randn(z1.shape, generator=g).to(device)
        fresh = [torch.Generator().manual_seed(mix(seed, k, i)) for i in range(len(noise))]
        with autocast(cfg, device):
            plain = script.sample_guided(net, None, None, noise, y, cond, out["nfe"])
            refined, _ = self_refine.pnp_sample(velocity, noise, times, plan, fresh)
        for name, z in ("Euler", plain), ("refined", refined):
            samples[name].append(codec.decode(z).clamp(-1, 1).cpu())
    samples = {name: torch.stack(x) for name, x in samples.items()}
    out["physics"] = {name: measured(x, clips) for name, x in samples.items()}
    out["physics"]["real"] = measured(real[None], clips)

    def scores(function, name="Euler"):
        return torch.stack([in_parts(lambda x: function(x.to(device)), x) for x in samples[name]])

    shape = (cfg.C, cfg.W, cfg.stride)
    pixels = train_pixels(cfg, device, folder / "pixels")
    out["S"]["pixel"] = scores(lambda x: pixel_error(x, pixels, *shape))
    out["S"]["copy-last"] = scores(lambda x: copy_last(x, worlds["frozen"], *shape))
    g = torch.Generator().manual_seed(seed)
    out["S"]["random"] = torch.rand(N, len(real), generator=g)
    out["S"]["oracle"] = residual_of(out["physics"]["Euler"])
    for w, world in worlds.items():
        S = lambda x, *window, world=world, **how: script.surprise(x, world, *window, **how)
        out["S"][w] = scores(lambda x: S(x, *shape))
        out["S"][w, "refined"] = scores(lambda x: S(x, *shape), "refined")
        for name, window in WINDOWS.items():
            out["windows"][w, name] = scores(lambda x: S(x, *window))
        out["windows"][w, "4/8/1 token"] = scores(lambda x: S(x, *shape, cos="token"))
        # guidance, the first candidate of fewer conditions; then best of four guided ones
        some = slice(0, len(real) // 2)
        half = types.SimpleNamespace(**{k: v[some] for k, v in vars(clips).items()})
        rows = [(f"{eta} {path}", eta, path, 1) for eta in ETAS for path in PATHS]
        rows += [("none", 0.0, "target", 1), ("none, 4", 0.0, "target", 4)]
        rows += [("0.01 target, 4", 0.01, "target", 4)]
        for name, eta, path, count in rows:
            drawn = []
            for k in range(count):
                g = torch.Generator().manual_seed(mix(seed, k))
                noise = torch.randn(z1.shape, generator=g).to(device)[some]
                reward = lambda x: S(x, *shape, grad=path)
                with autocast(cfg, device):
                    z = script.sample_guided(net, codec.decode, reward, noise, y[some], cond[some],
                                             steps, eta, cfg.skip, cfg.every)
                drawn.append(codec.decode(z).clamp(-1, 1))
            found = torch.stack([in_parts(lambda x: S(x, *shape), x) for x in drawn])
            out["guidance"][w, name] = {"S": found, "m": measured(torch.stack(drawn), half)}
            if (w, name) == ("frozen", "0.01 target"):
                guided = drawn[0].cpu()
    best = {name: script.best_of_n(samples[name], out["S"][key])
            for name, key in (("Euler", "frozen"), ("refined", ("frozen", "refined")))}
    rows = [real.cpu(), samples["Euler"][0], guided, best["Euler"], best["refined"]]
    out["videos"] = torch.stack([x[: min(6, len(guided))] for x in rows], 1)
    torch.save(out, folder / "measured.pt")


# ---- statistics ------------------------------------------------------------------------


def residual_of(m):
    """One residual a clip (N, B): the median over windows in free flight; none: infinite."""
    return m["residual"].nanmedian(-1).values.nan_to_num(math.inf)


def take(m, index):
    """Metrics of candidate index[b] for each condition b: {metric: (B, ...)}."""
    return {k: v[index, torch.arange(v.shape[1])] for k, v in m.items()}


def best(m, S, n):
    """Metrics of the choices by S among n, all N // n groups one after the other."""
    groups = S.unflatten(0, (-1, n)).argmin(1) + n * torch.arange(len(S) // n)[:, None]
    chosen = [take(m, index) for index in groups]
    return {k: torch.cat([c[k] for c in chosen]) for k in chosen[0]}


def ranks(x):
    """Ranks along the candidates of (N, B), centred, of unit norm; infinity is the last."""
    r = x.argsort(0).argsort(0).double()
    return F.normalize(r - r.mean(0), dim=0)


def correlations(S, m):
    """Rank correlations over the candidates of each condition (B,): with residual, with speed, and
    with residual given speed."""
    s, r, v = ranks(S), ranks(residual_of(m)), ranks(m["speed"])
    sr, sv, rv = ((a * b).sum(0) for a, b in ((s, r), (s, v), (r, v)))
    partial = (sr - sv * rv) / ((1 - sv**2) * (1 - rv**2)).clamp(min=1e-6).sqrt()
    return {"residual": sr, "speed": sv, "partial": partial}


def matched(m, S):
    """Choices by S among all, and for each the other candidate nearest in speed: two metrics."""
    index = S.argmin(0)
    speed = m["speed"]
    gap = (speed - speed[index, torch.arange(speed.shape[1])]).abs()
    gap[index, torch.arange(gap.shape[1])] = math.inf
    return take(m, index), take(m, gap.nan_to_num(math.inf).argmin(0))


def numbers(m):
    """The metrics a table shows."""
    s = summary(m)
    return {k: s[k] for k in ("residual", "position", "teleports", "bad_videos", "qualified")} | {
        "speed": s["speed_ratio"]}


def tables(out, worlds):
    """Rows of every table from what run_seed saved: {(table, arm): {metric: float}}."""
    m, refined, rows = out["physics"]["Euler"], out["physics"]["refined"], {}
    for name, x in (("real", out["physics"]["real"]), ("Euler", m), ("refined", refined)):
        rows["samples", name] = numbers({k: v.flatten(0, 1) for k, v in x.items()})
    for w in worlds:
        S = out["S"][w]
        rows["violations", w] = out["violations"][w] | out["health"][w]
        pairs = ("Euler", m, S), ("refined", refined, out["S"][w, "refined"])
        for name, metrics, score in pairs:
            for n, words in ((1, "one"), (N, "best of 16")):
                row = numbers(best(metrics, score, n)) | {"nfe": n * out["nfe"]}
                rows["refine", f"{name}, {words} ({w})"] = row
        rho = correlations(S, m)
        row = {f"rho_{k}": v.mean().item() for k, v in rho.items()}
        average = lambda x: x["partial"].mean().item()
        row["partial_low"], _, row["partial_high"] = interval(average, rho)
        chosen, near = matched(m, S)
        drop = lambda a, b: summary(a)["residual"] - summary(b)["residual"]
        row["low"], row["difference"], row["high"] = interval(drop, chosen, near, draws=200)
        row |= {"chosen": summary(chosen)["residual"], "same_speed": summary(near)["residual"]}
        rows["speed", w] = row
        for name in [*WINDOWS, "4/8/1 token"]:
            score = out["windows"][w, name]
            rho = {f"rho_{k}": v.mean().item() for k, v in correlations(score, m).items()}
            rows["windows", f"{name} ({w})"] = numbers(best(m, score, N)) | rho
        for name in [k for world, k in out["guidance"] if world == w]:
            found = out["guidance"][w, name]
            score, n = found["S"], len(found["S"])
            row = numbers(best(found["m"], score, n)) | {"surprise": score.amin(0).mean().item()}
            rows["both" if n > 1 else "guidance", f"{name} ({w})"] = row
    scores = {f"surprise ({w})": out["S"][w] for w in worlds}
    for name, score in (scores | {k: out["S"][k] for k in REWARDS[1:]}).items():
        rows["reward", name] = row = {}
        for n in (1, 2, 4, 8, 16):
            chosen = numbers(best(m, score, n))
            keys = "residual", "speed", "position", "qualified"
            row |= {f"{k}_{n}": chosen[k] for k in keys}
    return rows


# ---- the claim -------------------------------------------------------------------------


def judge_claims(report, worlds):
    """Hold the numbers against the docstring."""
    done = report["done"]

    def each(table, name):
        return list(done[table, name].values())

    ok = {}
    for w in worlds:
        for row in each("violations", w):
            for kind in BROKEN:
                ok[w, kind] = ok.get((w, kind), True) and row[kind] >= 0.9
            ok[w, "reversed"] = ok.get((w, "reversed"), True) and 0.4 <= row["reversed"] <= 0.6
            ok[w, "std"] = ok.get((w, "std"), True) and row["std"] > 0.5 and row["rank"] > 10
    conclude(report, "violations", "low surprise means plausible physics", verdict(ok))
    ok = {}
    for w in worlds:
        for i, row in enumerate(each("reward", f"surprise ({w})")):
            r1, r4, r16 = (row[f"residual_{n}"] for n in (1, 4, 16))
            ok[w, i, "falls"] = r1 > r4 > r16
            ok[w, i, "half by 4"] = r1 - r4 >= 0.5 * (r1 - r16)
            for name in REWARDS[1:-1]:
                ok[w, i, name] = r16 < each("reward", name)[i]["residual_16"]
            ok[w, i, "oracle"] = r16 > each("reward", "oracle")[i]["residual_16"]
    conclude(report, "reward", "PhysicsIQ 27.76, 31.87, 32.32, 32.90 with N, most of it by N = 4",
             verdict(ok))
    ok = {}
    for w in worlds:
        for i, row in enumerate(each("speed", w)):
            ok[w, i, "partial"] = row["partial_low"] > 0
            ok[w, i, "same speed"] = row["high"] < 0
    conclude(report, "speed", "not reported: surprise measures physics, not slowness", verdict(ok))
    ok = {}
    for w in worlds:
        for i, base in enumerate(each("guidance", f"none ({w})")):
            for eta in ETAS[:2]:
                for path in PATHS:
                    row = each("guidance", f"{eta} {path} ({w})")[i]
                    ok[w, i, eta, path, "surprise"] = row["surprise"] < base["surprise"]
                    ratio = row["residual"] / base["residual"]
                    ok[w, i, eta, path, "residual"] = abs(ratio - 1) < 0.1
    conclude(report, "guidance", "guidance alone changes nothing: +0.12, 0.00, -0.20 points",
             verdict(ok))
    ok = {}
    for w in worlds:
        plain, guided = (each("both", f"{name}, 4 ({w})") for name in ("none", "0.01 target"))
        for i, (a, b) in enumerate(zip(plain, guided)):
            ok[w, i] = abs(b["residual"] / a["residual"] - 1) < 0.1
    claim = "guidance and best-of-N: 33.44 against 32.90, 36.28 against 36.56"
    conclude(report, "both", claim, verdict(ok))
    ok = {}
    for w in worlds:
        names = [f"{a}, {b} ({w})" for a in ("Euler", "refined") for b in ("one", "best of 16")]
        for i in range(len(each("refine", names[0]))):
            r = [each("refine", name)[i]["residual"] for name in names]
            ok[w, i] = r[3] < min(r[1], r[2])
    claim = "not reported: best-of-N and predict-and-perturb add up"
    conclude(report, "refine", claim, verdict(ok))
    ok = {}
    for w in worlds:
        found = {name: [row["residual"] for row in each("windows", f"{name} ({w})")]
                 for name in [*WINDOWS, "4/8/1 token"]}
        for name, r in found.items():
            ok[w, name] = all(x < 1.1 * min(column) for x, column in zip(r, zip(*found.values())))
    conclude(report, "windows", "57.1 to 60.8 points whatever the window", verdict(ok))


def draw_figure(report, worlds):
    """Violations; residual and speed against N for each reward; guidance against its length."""
    def mean(table, name, k):
        runs = report["done"][table, name].values()
        return sum(run[k] for run in runs) / len(runs)

    with figure(f"{report['path']}.png", 1, 4, (3.2, 2.8)) as axes:
        ax, kinds, counts = axes[0, 0], [*BROKEN, "reversed"], (1, 2, 4, 8, 16)
        for i, w in enumerate(worlds):
            shares = [mean("violations", w, kind) for kind in kinds]
            ax.barh([k + 0.4 * i for k in range(len(kinds))], shares, 0.4, label=w)
        ax.set(yticks=range(len(kinds)), yticklabels=kinds, xlim=(0, 1), title="more surprising")
        ax.axvline(0.5, color="0.5", lw=0.8)
        ax.legend(fontsize=6)
        for ax, k in zip(axes[0, 1:], ("residual", "speed")):
            for name in [f"surprise ({w})" for w in worlds] + list(REWARDS[1:]):
                ax.plot(counts, [mean("reward", name, f"{k}_{n}") for n in counts], "o-", ms=3,
                        label=name)
            ax.set(xscale="log", title=f"{k} against N", xticks=counts, xticklabels=counts)
            ax.minorticks_off()
        axes[0, 1].legend(fontsize=6)
        ax, w = axes[0, 3], worlds[-1]
        for path, colour in zip(PATHS, ("C0", "C1", "C2")):
            for k, style in ("surprise", "o-"), ("residual", "x--"):
                base = mean("guidance", f"none ({w})", k)
                ratio = [mean("guidance", f"{eta} {path} ({w})", k) / base for eta in ETAS]
                ax.plot(ETAS, ratio, style, color=colour, ms=3, label=f"{k}, {path}")
        ax.set(xscale="log", title=f"guided / not, by eta ({w})", xticks=ETAS, xticklabels=ETAS)
        ax.minorticks_off()
        ax.legend(fontsize=5)
        for ax in axes.flat:
            ax.title.set_fontsize(8)
            ax.tick_params(labelsize=7)


def main(argv=None):
    files = ("self_refine.py", "tests/claims/physics.py")
    report = open_report("vjepa_guidance", __doc__, argv, files)
    preset, device = report["args"].preset, report["args"].device
    seeds, worlds = SEEDS[preset], WORLDS[preset]
    folders = {seed: report["arms"] / f"seed_{seed}" for seed in seeds}
    todo = [s for s in seeds if not arm_file(report, "violations", worlds[-1], s).exists()]
    for seed in todo:
        folders[seed].mkdir(parents=True, exist_ok=True)
    jobs = [(preset, seed, folders[seed], device) for seed in todo]
    if preset == "cpu":  # a process a core
        with mp.get_context("spawn").Pool(2) as pool:
            pool.starmap(run_seed, jobs)
    else:
        for job in jobs:
            run_seed(*job)
    for seed in seeds:
        path = folders[seed] / "measured.pt"
        out = torch.load(path, weights_only=False) if path.exists() else None
        for (table, name), row in tables(out, worlds).items():
            arm(report, table, name, seed, lambda folder, row=row: row)
        if seed == seeds[0]:  # a row a clip: real | one | guided | best of 16 | refined, best of 16
            save_gif(out["videos"].flatten(0, 1), f"{report['path']}.gif", 5)
    judge_claims(report, worlds)
    draw_figure(report, worlds)


if __name__ == "__main__":
    main()
