"""Every claim with its verdict and the numbers it rests on: writes results/README.md.

    python -m tests.claims.table
"""
import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = {  # script: {claim: "metric: arm | arm"}; "table/metric: ..." where the rows lie elsewhere;
    # several metrics: "metric: arm & metric: arm"; {best}: the arm that a claim says it chose
    "consistency_training": {
        "ring": "sw_1: iCT | ECT | CT, no EMA | CT | iCT, EMA target",
        "shrink": "ring/std_ratio: iCT, no stop-gradient | CT, no EMA, no stop-gradient",
        "images": "fd_1: iCT | ECT | CT, no EMA, s1 = 18 | iCT, no stop-gradient",
        "features": "images/probe_best: iCT | denoiser"},
    "simsiam": {
        "collapse": "probe: full | no stop-gradient | no predictor | untrained",
        "teacher": "probe: teacher | untrained | pixels"},
    "balanced_representation": {
        "memorise": "cosine: rmsprop | adam", "statistics": "block_error: Gaussians",
        "hybrid": "auroc_std: copies", "regimes": "auroc_std: n = 5 | n = 100 | n = 10000",
        "noise": "cosine: sigma = 0.2 | sigma = 1 | sigma = 5",
        "sampling": "memorised: n = 5 | n = 10000", "denoiser": "auroc_std_own: U-Net"},
    "representation_dynamics": {
        "snr": "snr_0_296: exact, K = 2 | formula, K = 2",
        "learned": "subspace_error: K = 2 | K = 3",
        "relaxed": "peak: none | angle 30 & at_1: ranks 10 and 2 & at_2: ranks 10 and 2",
        "probe": "peak: noisy | clean | noisy, all labels",
        "memorised": "rise: N = 60 | N = 600 | N = 6000 | exact",
        "images": "own_level: N 64 | N 512 | N 4096 | N all", "grain": "rise: N all & level: N all",
        "sharing": "mean: shared | separate",
        "ensemble": "gain: 0% wrong labels | 40% wrong labels | 80% wrong labels"},
    "self_refine": {
        "sweep": "teleports: Euler 32 | {best} | t 0-0.2 K 3",
        "twice": "sweep/residual: Euler 60 | {best}",
        "early": "sweep/teleports: Euler 32 | t 0-0.2 K 1 | t 0-0.2 K 3 | t 0-0.2 K 5",
        "planner": "position: Euler 32 | {best}",
        "modes": "entropy: Euler | 0.4-0.6:1 | 0.4-0.6:3 | 0.4-0.6:8 | 0-1:3",
        "frames": "change: T 1, t 0.2 | T 16, t 0.2 | T 1, t 0.4 | T 16, t 0.4"},
    "va_vae": {
        "reconstruction": "tokenizers/psnr: d 4 plain | d 32 plain",
        "alignment": "tokenizers/psnr: d 32 plain | d 32 VF",
        "probe": "tokenizers/probe: d 32 plain | d 32 VF",
        "uniformity": "tokenizers/cv: d 32 plain | d 32 VF"},
    "rae": {
        "width": "loss: net 16 | net 64 | net 96 | DiT 16 | DiT 16, deep | DiT 16 + head 96",
        "shift": "share: m 16 | m 4096 | m 196608 & share_shifted: m 196608",
        "robust": "psnr_0.5: tau 0 | tau 0.8",
        "widths": "images/fd: d 48 | d 96 | d 192", "head": "images/fd: d 96 | d 96 + head | d 192",
        "shifts": "images/fd: alpha 1 | d 192 | alpha 3 | alpha 6",
        "decoders": "images/fd_clean: d 192 & images/fd: d 192",
        "encoders": "images/fd: d 192 | pixels", "random": "images/fd: d 192 | random",
        "guidance": "fd: w 1.25 | w 1.5 | w 2"},
    "repa": {
        "teacher": "probe: teacher | random | pixels",
        "probe": "arms/probe: vanilla | REPA | iREPA | random | shuffled",
        "cknna": "arms/cknna: vanilla | REPA | iREPA | random | shuffled",
        "best": "arms/probe_4_0.1: vanilla | REPA | iREPA",
        "judge": "arms/judge: vanilla | REPA",
        "alignment": "arms/aligned_0.1: REPA | iREPA | random | shuffled",
        "place": "arms/place_0.1: REPA | iREPA | shuffled",
        "shuffled": "arms/probe: vanilla | shuffled | REPA",
        "random": "arms/probe: random | REPA", "fd": "arms/fd: vanilla | REPA",
        "irepa": "arms/fd: REPA | iREPA"},
    "moe_subspace": {
        "error": "excess_0.3: D 16 eta 0.1 MoE | D 1024 eta 0.1 MoE | D 256 eta 0.1 MoE | "
                 "D 256 eta 0.1 MoLRG | D 256 eta 0.1 MLP-L",
        "samples": "slope: eta 0 MoE | eta 0.1 MoE | eta 0 MoLRG",
        "rate": "rate: separated | overlap", "size": "excess_0.3: width 400",
        "gate": "excess_1: soft | label | top-1 | without d_k | without |z|^2",
        "images": "fd: specific gauss | specific mog | specific mlp | specific U-Net",
        "softmax": "images/fd: specific softmax | specific gauss | specific mog",
        "unified": "images/fd: unified mog | specific mog | unified U-Net"},
    "vjepa_guidance": {
        "violations": "teleport: frozen & jitter: frozen & upwards: frozen & stop: frozen & "
                      "freeze: frozen | frozen, L1 & through: frozen | frozen, L1 & "
                      "reversed: frozen | frozen, L1",
        "reward": "residual_16: Euler, frozen | Euler, copy-last | Euler, pixel | Euler, random | "
                  "Euler, oracle",
        "speed": "rho_partial: Euler (frozen) | refined (frozen)",
        "guidance": "residual: none (frozen) | 0.01 target (frozen)",
        "both": "residual: none, 4 (frozen) | 0.01 target, 4 (frozen)",
        "refine": "residual: Euler, one (frozen) | Euler, best of 16 (frozen) | "
                  "refined, one (frozen) | refined, best of 16 (frozen)",
        "windows": "residual: 4/8/1 (frozen) | 8/16/8 (frozen)"},
    "ddpm_xpred": {
        "buried": "verr: D 2 x | D 512 x | D 512 v | D 512 eps & "
                  "near: D 2 x | D 2 v | D 2 eps | D 2 eps, eps-loss",
        "nine": "verr: eps-loss x | x-loss v | x-loss eps",
        "high": "tv: v-loss x | v-loss v | v-loss eps",
        "low": "tv: v-loss x | v-loss v | v-loss eps"},
}


OWN = {  # no paper claims these: checks of this repository
    "consistency_training": {"shrink", "features"}, "simsiam": {"teacher"}, "va_vae": {"probe"},
    "representation_dynamics": {"grain"}, "vjepa_guidance": {"speed", "refine"},
    "rae": {"shift", "random"}, "moe_subspace": {"samples"},
    "repa": {"judge", "alignment", "place", "shuffled", "random"}}
WORDS = {"as in the paper": "holds", "contradicted": "does not hold"}  # verdicts of those
LABELS = {  # what a metric is; the docstring of the claim says it in full
    "aligned_0.1": "cosine with the teacher's token above the mean answer's, t = 0.1",
    "auroc_std": "AUROC, copies against fresh samples, by the std of the code",
    "auroc_std_own": "AUROC of a network's own copies by the std of a feature",
    "block_error": "largest relative error of the theory's blocks",
    "change": "change by one iteration, in distances of two samples",
    "cknna": "CKNNA, agreement on nearest neighbours with the teacher",
    "cosine": "smallest cosine of a live column with a stored sample",
    "cv": "coefficient of variation of the latent's density, lower is more even",
    "entropy": "entropy of the modes that samples reach",
    "excess_0.3": "squared error over the exact score's, sigma = 0.3",
    "excess_1": "squared error over the exact score's, sigma = 1",
    "fd": "Frechet distance of samples in features of the judge",
    "fd_1": "Frechet distance of one-step samples in features of the judge",
    "fd_clean": "Frechet distance with a decoder trained without noise",
    "freeze": "frozen", "jitter": "moved by a pixel at random", "stop": "frozen half-way",
    "reversed": "time reversed, which is lawful (0.5 is right)", "upwards": "gravity reversed",
    "teleport": "share of clips that surprise less than the same clip with a ball elsewhere",
    "through": "balls through each other",
    "gain": "accuracy gained by averaging five probes",
    "loss": "squared velocity error a dimension",
    "mean": "mean accuracy over noise levels",
    "memorised": "share of samples that are a training sample",
    "near": "share of samples near the curve",
    "own_level": "noise level of the best probe, fitted on the network's own images",
    "peak": "highest SNR (in probe: accuracy)",
    "at_1": "level of the peak, first class", "at_2": "the same, second class",
    "place_0.1": "cosine with the own token less the best of other places, t = 0.1",
    "position": "distance to the true continuation, pixels",
    "probe": "accuracy of a linear probe",
    "probe_best": "accuracy of a linear probe at its best noise level",
    "probe_4_0.1": "accuracy of a linear probe of block 4, t = 0.1",
    "psnr": "PSNR of reconstructions, dB", "psnr_0.5": "PSNR of latents with noise 0.5, dB",
    "rate": "factor of the error a step",
    "residual": "residual of the law of motion, box widths / s^2",
    "residual_16": "residual of the law of motion, best of 16, box widths / s^2",
    "rho_partial": "rank correlation of surprise and residual, given speed",
    "rise": "peak over the value at low noise (in grain: less it)",
    "level": "noise level of the peak",
    "judge": "CKNNA, agreement on nearest neighbours with the judge",
    "share": "share of samples in the larger mode, 0.8 is right",
    "share_shifted": "the same with the shift",
    "slope": "slope of log error over log N",
    "snr_0_296": "SNR of features at sigma = 0.296",
    "std_ratio": "width of samples over that of the data",
    "subspace_error": "error of the learned subspaces",
    "sw_1": "sliced Wasserstein distance of one-step samples",
    "teleports": "share of steps in which a ball jumps",
    "tv": "total variation of samples over that of real images",
    "verr": "squared velocity error, 2.0 is the minimum",
}


def figure(mean, std):
    """A metric as text: three digits, at most four decimals; mean ± std with as many."""
    size = math.floor(math.log10(abs(mean))) if mean else 0
    decimals = min(4, max(0, 2 - size))
    return f"{mean:.{decimals}f}" + (f" ± {std:.{decimals}f}" if std is not None else "")


def numbers(report, claim):
    """`what it is: arm mean ± std; ...` of the rows that SHOWN names for a claim, and numbers
    of seeds; KeyError if there are none."""
    rows = {(row["table"], row["arm"]): row["metrics"] for row in report["rows"]}
    best = "".join(c["claim"].partition("; best: ")[2] for c in report["claims"])
    parts, seeds = [], set()
    for part in SHOWN[report["script"]][claim].replace("{best}", best).split(" & "):
        where, arms = part.split(": ", 1)
        table, metric = where.split("/") if "/" in where else (claim, where)
        found = {arm: rows[table, arm][metric] for arm in arms.split(" | ")}
        seeds |= {str(m["n"]) for m in found.values()}
        texts = [f"{arm} {figure(m['mean'], m['std'])}" for arm, m in found.items()]
        parts.append(f"{LABELS[metric]}: {'; '.join(texts)}")
    return ". ".join(parts), sorted(seeds)


def reports(folder, pattern="*_[cg]pu.json"):
    """What the JSON files of claims in folder hold; a benchmark makes none."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]
    return [report for report in found if "claims" in report]


def verdicts(report):
    """(claim, whether a paper makes it, verdict) of a report."""
    for claim in report["claims"]:
        own = claim["table"] in OWN.get(report["script"], ())
        yield claim, not own, (WORDS if own else {}).get(claim["agrees"], claim["agrees"])


def counts(folder):
    """How many claims came out how, a sentence."""
    found = [v for report in reports(folder) for v in verdicts(report)]
    theirs, ours = ([word for _, papers, word in found if papers == k] for k in (True, False))
    a, b, c, d = (theirs.count(w) for w in ("as in the paper", "partly", "not resolved",
                                            "contradicted"))
    e, f, g, h = (ours.count(w) for w in ("holds", "partly", "not resolved", "does not hold"))
    return (f"Of {len(theirs)} claims of papers {a} came out as in the paper, {b} partly, {c} were "
            f"not resolved at this scale, {d} contradicted. Of {len(ours)} checks of our own {e} "
            f"hold, {f} partly, {g} were not resolved, {h} do not.")


def table(folder):
    """Markdown text of all claims in folder; those of a preset long repeat some, longer trained."""
    lines = ["# Claims", "", "Written by `python -m tests.claims.table` from the JSON files here. "
             "What counts as agreeing, and what each", "arm and number is, stands in the docstrings"
             " of [tests/claims/](../tests/claims). Mean ± std over seeds.", "",
             "*As in the paper*: that rule holds at this scale, mostly of a direction or a margin "
             "between arms, not that the", "paper's number is reproduced; *partly*: some of its "
             "conditions hold; *not resolved*: a difference within the noise,", "or a precondition "
             "that failed. The numbers are a selection.", "", counts(folder)]
    for report in reports(folder, "*.json"):
        name, preset = report["script"], report["preset"]
        lines += ["", f"## {name}, {preset} preset", "",
                  f"[Rules](../tests/claims/{name}.py), [numbers]({name}_{preset}.json), "
                  f"[figure]({name}_{preset}.png). {report['seconds'] / 60:.0f} minutes, "
                  f"{report['device']}, commit {report['commit']}.", "",
                  "| claim | the paper | here | numbers | seeds |", "|---|---|---|---|---|"]
        for claim, papers, verdict in verdicts(report):
            shown, seeds = numbers(report, claim["table"])
            paper = claim["claim"] if papers else f"*ours:* {claim['claim']}"
            cells = [claim["table"], paper, f"**{verdict}**", shown, " or ".join(seeds)]
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    (ROOT / "results/README.md").write_text(table(ROOT / "results"))


if __name__ == "__main__":
    main()
