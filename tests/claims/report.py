"""Arms of a claim: run each once, keep its metrics, rewrite the JSON after every one.

A claim calls open_report, then arm(...) for every table, arm and seed, then conclude(...).
"""
import argparse
import hashlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from common import fail

ROOT = Path(__file__).resolve().parents[2]


def open_report(script, doc, argv=None, also=(), presets=("cpu", "gpu")):
    """Command line and state of a claim: a dict with script, preset, device, seconds, rows, claims.

    Flags: --preset (one of presets), --out for arms, --results for JSON and PNG, --device, --reuse.
    also: further files whose change makes the arms other code's.
    """
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--preset", default="cpu", choices=presets, help="the size [cpu]")
    parser.add_argument("--out", default="", help="the arms [runs/claims/<script>-<preset>]")
    parser.add_argument("--results", default="results", help="JSON and figure [results]")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--reuse", action="store_true", help="keep arms made by other code")
    args = parser.parse_args(argv)
    files = [f"{script}.py", "common.py", f"tests/claims/{script}.py", *also]
    files = [ROOT / f for f in files]
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cuda = torch.cuda.is_available() and args.device in ("auto", "cuda")
    Path(args.results).mkdir(parents=True, exist_ok=True)
    return {
        "args": args, "arms": Path(args.out or f"runs/claims/{script}-{args.preset}"), "done": {},
        "code": hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest(),
        "path": Path(args.results) / f"{script}_{args.preset}",
        "json": {
            "script": script, "preset": args.preset,
            "command": f"python -m tests.claims.{script} --preset {args.preset}"
            + " --reuse" * args.reuse,
            "commit": commit or "none",
            "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, "
            f"{torch.get_num_threads()} threads", "torch": torch.__version__, "seconds": 0.0,
            "seeds": [], "claims": [], "rows": []}}


def arm(report, table, name, seed, measure):
    """Metrics of one arm and seed: measure(folder) -> {metric: float}, or an earlier call's.

    Arms made by other code are refused unless --reuse. Returns the metrics; rewrites the JSON.
    """
    kept = arm_file(report, table, name, seed)
    folder = kept.parent
    if kept.exists():
        result = json.loads(kept.read_text())
        if result["code"] != report["code"] and not report["args"].reuse:
            fail(f"{kept} was made by other code: remove {report['arms']}, or pass --reuse")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        start, metrics = time.perf_counter(), measure(folder)
        seconds = time.perf_counter() - start
        result = {"code": report["code"], "seconds": seconds, "metrics": metrics}
        kept.write_text(json.dumps(result))
    report["done"].setdefault((table, name), {})[seed] = result["metrics"]
    report["json"]["seconds"] = round(report["json"]["seconds"] + result["seconds"], 1)
    write(report)
    line = "  ".join(f"{k} {v:.4g}" for k, v in result["metrics"].items())
    print(f"{table}  {name}  seed {seed}  {line}", file=sys.stderr, flush=True)
    return result["metrics"]


def arm_file(report, table, name, seed):
    """Where the metrics of an arm and seed are kept; its folder is theirs alone."""
    words = re.sub(r"[^A-Za-z0-9.]+", "_", f"{table} {name} {seed}")
    return report["arms"] / words / "result.json"


def mean(report, table, name, metric):
    """Mean of a metric over the seeds of an arm."""
    return statistics.fmean(m[metric] for m in report["done"][table, name].values())


def values(report, table, name, metric):
    """A metric of an arm, one value a seed."""
    return [m[metric] for m in report["done"][table, name].values()]


def conclude(report, table, claim, agrees):
    """Write down the paper's claim and whether the numbers agree with it."""
    allowed = ("as in the paper", "partly", "not resolved", "contradicted")
    if agrees not in allowed:
        raise ValueError(f"agrees must be one of {allowed}, got {agrees!r}")
    report["json"]["claims"].append({"table": table, "claim": claim, "agrees": agrees})
    write(report)
    print(f"{table}: {agrees}", file=sys.stderr, flush=True)


def verdict(ok):
    """Whether all, some or none of the named conditions {name: bool} hold, in conclude's words."""
    print({str(k): v for k, v in ok.items() if not v} or "all conditions hold")
    if all(ok.values()):
        return "as in the paper"
    return "partly" if any(ok.values()) else "contradicted"


def exceeds(high, low, least=0.0):
    """Whether a metric is higher in one arm than in another, in conclude's words.

    high, low: the values of the two arms, one a seed, paired. It is if it is by more than `least`
    at every seed and in the mean by `least` and the sum of both standard deviations; contradicted
    if it is lower at every seed and in the mean by that sum; else, and with one seed, not resolved.
    """
    a, b = torch.tensor(high, dtype=torch.float64), torch.tensor(low, dtype=torch.float64)
    gap, spread = a - b, a.std() + b.std() if len(a) > 1 else math.inf
    if (gap > least).all() and gap.mean() - least > spread:
        return "as in the paper"
    return "contradicted" if (gap < 0).all() and -gap.mean() > spread else "not resolved"


def overall(found):
    """One verdict of several {name: verdict}: partly where some hold; contradicted only where none
    does and one is contradicted."""
    print({str(k): v for k, v in found.items() if v != "as in the paper"} or "all conditions hold")
    kinds = set(found.values())
    if "as in the paper" in kinds:
        return "as in the paper" if len(kinds) == 1 else "partly"
    for word in ("partly", "contradicted"):
        if word in kinds:
            return word
    return "not resolved"


def attempt(work, *arguments):
    """work(*arguments) in a worker process: bad input there (SystemExit) ends the claim, too."""
    try:
        return work(*arguments)
    except SystemExit as error:  # a pool would start another worker and wait for ever
        raise RuntimeError(f"{work.__name__} ended with status {error.code}") from None


def cpu_cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def write(report):
    """results/<script>_<preset>.json: mean, std (of n - 1), values of a metric; NaN is null."""
    rows, seeds = [], set()
    for (table, name), runs in report["done"].items():
        seeds |= set(runs)
        metrics = {}
        for metric in next(iter(runs.values())):
            v = [run[metric] for run in runs.values()]
            finite = all(map(math.isfinite, v))  # a seed that has nothing to measure leaves null
            metrics[metric] = {"mean": statistics.fmean(v) if finite else None,
                               "std": statistics.stdev(v) if finite and len(v) > 1 else None,
                               "n": len(v), "values": [x if math.isfinite(x) else None for x in v]}
        rows.append({"table": table, "arm": name, "metrics": metrics})
    report["json"].update(rows=rows, seeds=sorted(seeds))
    text = json.dumps(report["json"], indent=1, allow_nan=False)
    report["path"].with_suffix(".json").write_text(text + "\n")
