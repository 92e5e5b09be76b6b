"""Every claim with its verdict and the numbers it rests on: writes results/README.md.

    python -m tests.claims.table
"""
import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = {  # script: {claim: "metric: arm | arm"}; "table/metric: ..." where the rows lie elsewhere
    "consistency_training": {
        "ring": "sw_1: iCT | ECT | CT, no EMA | CT | iCT, EMA target",
        "shrink": "ring/std_ratio: iCT, no stop-gradient | CT, no EMA, no stop-gradient",
        "images": "fd_1: iCT | ECT | CT, no EMA, s1 = 18 | iCT, no stop-gradient",
        "features": "images/probe_0.5: iCT | denoiser"},
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
        "relaxed": "peak: none | angle 30 | ranks 10 and 2 | weights .8 and .2",
        "probe": "peak: noisy | clean | noisy, all labels",
        "memorised": "rise: N = 60 | N = 600 | N = 6000 | exact",
        "images": "own_level: N 64 | N 512 | N 4096 | N all", "grain": "rise: N all",
        "sharing": "mean: shared | separate",
        "ensemble": "gain: 0% wrong labels | 40% wrong labels | 80% wrong labels"},
    "self_refine": {
        "sweep": "teleports: Euler 32 | t 0.2-0.4 K 5 | t 0-0.2 K 3",
        "twice": "sweep/residual: Euler 60 | t 0.2-0.4 K 5",
        "early": "sweep/teleports: Euler 32 | t 0-0.2 K 1 | t 0-0.2 K 3 | t 0-0.2 K 5",
        "planner": "position: Euler 32 | t 0.2-0.4 K 5",
        "modes": "entropy: Euler | 0.4-0.6:1 | 0.4-0.6:3 | 0.4-0.6:8 | 0-1:3",
        "frames": "change: T 1, t 0.2 | T 16, t 0.2 | T 1, t 0.4 | T 16, t 0.4"},
    "va_vae": {
        "reconstruction": "tokenizers/psnr: d 4 plain | d 32 plain",
        "alignment": "tokenizers/psnr: d 32 plain | d 32 VF",
        "probe": "tokenizers/probe: d 32 plain | d 32 VF",
        "uniformity": "tokenizers/cv: d 32 plain | d 32 VF"},
    "rae": {
        "width": "loss: net 16 | net 64 | net 96 | DiT 16 | DiT 16, deep | DiT 16 + head 96",
        "shift": "share: m 16 | m 4096 | m 196608",
        "robust": "psnr_0.5: tau 0 | tau 0.8",
        "widths": "images/fd: d 48 | d 96 | d 192", "head": "images/fd: d 96 | d 96 + head | d 192",
        "shifts": "images/fd: alpha 1 | d 192 | alpha 3 | alpha 6",
        "decoders": "images/fd_clean: d 192", "encoders": "images/fd: d 192 | random | pixels",
        "guidance": "fd: w 1.25 | w 1.5 | w 2"},
    "repa": {
        "teacher": "probe: teacher | random | pixels",
        "probe": "arms/probe: vanilla | REPA | iREPA | random | shuffled",
        "cknna": "arms/cknna: vanilla | REPA | iREPA | random | shuffled",
        "best": "arms/probe_4_0.1: vanilla | REPA | iREPA",
        "alignment": "arms/aligned_0.1: REPA | iREPA | random | shuffled",
        "place": "arms/place_0.1: REPA | iREPA | shuffled",
        "shuffled": "arms/probe: vanilla | shuffled | REPA",
        "random": "arms/probe: random | REPA", "fd": "arms/fd: vanilla | REPA",
        "irepa": "arms/fd: REPA | iREPA"},
    "moe_subspace": {
        "error": "excess_0.3: D 256 eta 0.1 MoE | D 256 eta 0.1 MoLRG | D 256 eta 0.1 MLP-L",
        "samples": "slope: eta 0 MoE | eta 0.1 MoE | eta 0 MoLRG",
        "rate": "rate: separated | overlap", "size": "excess_0.3: width 400",
        "gate": "excess_1: soft | label | top-1 | without d_k | without |z|^2",
        "images": "fd: specific gauss | specific mog | specific mlp | specific U-Net",
        "softmax": "images/fd: specific softmax | specific gauss | specific mog",
        "unified": "images/fd: unified mog | specific mog | unified U-Net"},
    "vjepa_guidance": {
        "violations": "freeze: frozen",
        "reward": "residual_16: Euler, frozen | Euler, pixel | Euler, random | Euler, oracle",
        "speed": "rho_partial: Euler (frozen) | refined (frozen)",
        "guidance": "residual: none (frozen) | 0.01 target (frozen)",
        "both": "residual: none, 4 (frozen) | 0.01 target, 4 (frozen)",
        "refine": "residual: Euler, one (frozen) | Euler, best of 16 (frozen) | "
                  "refined, one (frozen) | refined, best of 16 (frozen)",
        "windows": "residual: 4/8/1 (frozen) | 8/16/8 (frozen)"},
    "ddpm_xpred": {
        "buried": "verr: D 2 x | D 512 x | D 512 v | D 512 eps",
        "nine": "verr: eps-loss x | x-loss v | x-loss eps",
        "high": "tv: v-loss x | v-loss v | v-loss eps",
        "low": "tv: v-loss x | v-loss v | v-loss eps"},
}


def figure(mean, std):
    """A metric as text: three digits, at most four decimals; mean ± std with as many."""
    size = math.floor(math.log10(abs(mean))) if mean else 0
    decimals = min(4, max(0, 2 - size))
    return f"{mean:.{decimals}f}" + (f" ± {std:.{decimals}f}" if std is not None else "")


def numbers(report, claim):
    """`metric: arm mean ± std, ...` of the rows that SHOWN names for a claim, and their numbers of
    seeds; KeyError if there are none."""
    where, arms = SHOWN[report["script"]][claim].split(": ", 1)
    table, metric = where.split("/") if "/" in where else (claim, where)
    rows = {(row["table"], row["arm"]): row["metrics"] for row in report["rows"]}
    found = [rows[table, arm][metric] for arm in arms.split(" | ")]
    seeds = sorted({str(m["n"]) for m in found})
    return f"{metric}: " + "; ".join(
        f"{arm} {figure(m['mean'], m['std'])}" for arm, m in zip(arms.split(" | "), found)), seeds


def reports(folder):
    """What folder/*_cpu.json and *_gpu.json hold, those of claims; a benchmark makes none."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*_[cg]pu.json"))]
    return [report for report in found if "claims" in report]


def counts(folder):
    """How many claims came out how, a sentence."""
    agrees = [c["agrees"] for report in reports(folder) for c in report["claims"]]
    n = {word: agrees.count(word) for word in set(agrees) | {"contradicted"}}
    return (f"Of {len(agrees)} claims {n['as in the paper']} came out as in the paper, "
            f"{n['partly']} partly, {n['not resolved']} were not resolved at this scale, "
            f"{n['contradicted']} contradicted.")


def table(folder):
    """Markdown text of all claims in folder/*_cpu.json and *_gpu.json."""
    lines = ["# Claims", "", "Written by `python -m tests.claims.table` from the JSON files here. "
             "What counts as agreeing stands in the",
             "docstrings of [tests/claims/](../tests/claims). Mean ± std over seeds.", "",
             counts(folder), "",
             "| script | claim | the paper | here | numbers | seeds | device | commit |",
             "|---|---|---|---|---|---|---|---|"]
    for report in reports(folder):
        for claim in report["claims"]:
            shown, seeds = numbers(report, claim["table"])
            cells = [report["script"], claim["table"], claim["claim"], f"**{claim['agrees']}**",
                     shown, " or ".join(seeds), report["device"], report["commit"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    (ROOT / "results/README.md").write_text(table(ROOT / "results"))


if __name__ == "__main__":
    main()
