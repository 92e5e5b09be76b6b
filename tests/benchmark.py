"""How fast a training step is: every script, each stage of it, eager and compiled.

    python -m tests.benchmark                                  # all default runs
    python -m tests.benchmark --script rae,repa                # two of them; other rows are kept
    python -m tests.benchmark --preset cifar10,gpu,paper       # on a GPU; of scripts that have them

Each setting runs in a process of its own, each stage of it for --seconds after five steps of
warm-up, without samples. FLOP/s counts matrix products, convolutions and attention of one step,
forward and backward, of all networks in it, the frozen ones too; `of peak` is its share of what a
large matrix product reaches on this device in this precision (a CPU's convolutions may be faster
than its matrix products: then it exceeds 1). Memory is the largest of the process
so far (data included), on a GPU of its allocator. Compile seconds are what the first three steps
take longer than later ones, without any cache; on a CPU that is a minute or more, so that scripts
which do not compile by default are compiled there only if --script names them. The data are always
shapes or few clips; a batch of a preset has at most 128 images, 32 of 256 pixels. Presets that
want a teacher or a download fail without, and the others go on. Writes
results/benchmark_<cpu|gpu>.json after every script; rows of another device or torch are dropped.
"""
import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
FAST = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()  # at bf16
SETTINGS = {"eager float32": ("fp32", "off"), "eager bf16": ("bf16", "off"),
            "compiled": ("bf16" if FAST else "fp32", "on")}
FLAGS = {"clips": "1000", "diffusion_steps": "1"}  # of scripts that have them
WARM = 3


def now():
    """Seconds on the clock, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(precision):
    """FLOP/s of a large square matrix product, the best of ten."""
    n, device = (8192, "cuda") if torch.cuda.is_available() else (1024, "cpu")
    a = torch.randn(n, n, device=device, dtype={"bf16": torch.bfloat16}.get(precision))
    torch.set_float32_matmul_precision("high")  # as common.setup does
    times = [now()]
    for _ in range(12):
        a @ a
        times.append(now())
    return 2 * n**3 / min(b - a for a, b in zip(times[2:], times[3:]))


def measure(script, preset, setting, seconds):
    """One setting in this process: a dict of numbers for each stage."""
    module, rows = importlib.import_module(script), []
    given = module.PRESETS.get(preset, {})
    precision, compiled = SETTINGS[setting]
    precision = precision if "precision" in module.Config.__annotations__ else "fp32"
    flags = {"compile": compiled, "precision": precision, "log_every": 10**6} | FLAGS
    flags |= {"preset": preset, "data": "shapes"} if preset else {}
    most = 128 if given.get("image_size", 0) < 256 else 32  # of a stage; presets are for many GPUs
    flags |= {k: most for k, v in given.items() if k.endswith("batch_size") and v > most}

    def steps(cfg, state, inner=module.steps):  # ends the stage when it has been measured
        times, last = {}, WARM + 2
        for step in inner(cfg, state):
            if step in (0, WARM, WARM + 2, last):
                times[step] = now()
            if step == WARM + 2:
                last += max(4, int(2 * seconds / (times[step] - times[WARM])))
            elif step == last:
                break
            yield step
        if last not in times:
            return  # a stage of few steps
        with FlopCounterMode(display=False) as flops:
            yield from [last] * (compiled == "off")  # one more, by its operators
        one = (times[last] - times[WARM + 2]) / (last - WARM - 2)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory
        rows.append({
            "stage": os.path.relpath(cfg.out, out).strip("."), "setting": setting,
            "precision": precision, "images_per_s": cfg.batch_size / one,
            "flop": flops.get_total_flops(), "step_s": one, "memory_gb": memory / 2**30,
            "compile_s": max(0.0, times[WARM] - times[0] - WARM * one)})

    module.steps = steps
    with tempfile.TemporaryDirectory() as out:
        words = [[f"--{k.replace('_', '-')}", str(v)] for k, v in (flags | {"out": out}).items()
                 if k in module.Config.__annotations__]
        module.main(sum(words, []))
    return rows


def main(argv=None):
    scripts = sorted(p.stem for p in ROOT.glob("*.py") if p.stem != "common")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="", help="comma between; empty: all")
    parser.add_argument("--preset", default="", help="comma between; empty: the default run")
    parser.add_argument("--seconds", type=float, default=2.0, help="that are timed, about [2]")
    parser.add_argument("--one", help="used by the program itself: script:preset:setting")
    args = parser.parse_args(argv)
    if args.one:
        return print(json.dumps(measure(*args.one.split(":"), args.seconds)))
    cuda = torch.cuda.is_available()
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    path = ROOT / f"results/benchmark_{'gpu' if cuda else 'cpu'}.json"
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "none"
    report = {
        "device": torch.cuda.get_device_name() if cuda else cpu, "torch": torch.__version__,
        "peak_flop_per_s": {p: peak(p) for p in ("fp32", "bf16")}, "rows": []}
    print(report["device"], *(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in
                              report["peak_flop_per_s"].items()), sep=", ")
    print(f"{'script':40}{'setting':20}{'images/s':>9}{'GFLOP/s':>9}{'of peak':>9}{'GB':>7}"
          f"{'compile s':>11}{'speed-up':>10}")
    old = json.loads(path.read_text()) if path.exists() else {}
    kept = old.get("rows", []) if all(old.get(k) == report[k] for k in ("device", "torch")) else []
    failed = False
    for script in args.script.split(",") if args.script else scripts:
        module = importlib.import_module(script)
        for preset in [p for p in args.preset.split(",") if p in module.PRESETS or not p]:
            first = {}  # stage -> row of the first setting
            for setting in SETTINGS:
                if "bf16" in setting and "precision" not in module.Config.__annotations__:
                    continue
                if setting == "compiled" and module.Config.compile == "off" and not (
                        cuda or args.script):
                    continue
                command = [sys.executable, "-m", "tests.benchmark", "--one",
                           f"{script}:{preset}:{setting}", "--seconds", str(args.seconds)]
                done = subprocess.run(
                    command, cwd=ROOT, capture_output=True, text=True,
                    env=os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"})
                if done.returncode:
                    print(f"{script} {preset} {setting} failed:\n{done.stderr[-3000:]}")
                    failed = True
                    continue
                for m in json.loads(done.stdout.splitlines()[-1]):
                    eager = first.setdefault(m["stage"], m)
                    row = {"script": script, "preset": preset, "commit": commit} | m
                    row["flop"] = eager["flop"]  # counted where nothing is compiled
                    row["flop_per_s"] = row["flop"] / row["step_s"]
                    row["share_of_peak"] = (
                        row["flop_per_s"] / report["peak_flop_per_s"][row["precision"]])
                    row["speed_up"] = eager["step_s"] / row["step_s"]
                    report["rows"].append(row)
                    name = " ".join(filter(None, (script, preset, row["stage"])))
                    setting_name = setting + f" {row['precision']}" * (setting == "compiled")
                    print(f"{name:40}{setting_name:20}{row['images_per_s']:9.0f}"
                          f"{row['flop_per_s'] / 1e9:9.1f}{row['share_of_peak']:9.2f}"
                          f"{row['memory_gb']:7.2f}{row['compile_s']:11.1f}"
                          f"{row['speed_up']:10.2f}", flush=True)
        new = {(r["script"], r["preset"]) for r in report["rows"]}
        rows = [r for r in kept if (r["script"], r["preset"]) not in new] + report["rows"]
        path.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
