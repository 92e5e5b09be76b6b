"""How fast a training step is, per script, preset and setting, and how near to its own matmuls.

    python -m tests.benchmark                        # every script's default run
    python -m tests.benchmark --preset cifar10,paper --steps 50      # on a GPU

Each setting runs in a process of its own: --steps steps after --warm-up others, timed without the
sampling at the end. `matmul share` is the time that the matrix products and convolutions of a step
take alone, with the same shapes, strides and dtypes in a loop, over the time of the whole step: 1
would mean that nothing else costs anything. FLOP/s counts those products, forward and backward. The
data are always shapes, the batch of preset paper is 128. Writes results/benchmark_<cpu|gpu>.json.
"""

import argparse
import importlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "eager float32": ("fp32", "off"),
    "eager bf16": ("bf16", "off"),
    "compiled bf16": ("bf16", "on"),
    "compiled float32": ("fp32", "on"),  # of scripts that stay in float32
    "as shipped": ("auto", "auto"),
}
FLAGS = {
    "": [],
    "cifar10": ["--data", "shapes"],
    "gpu": [],
    "paper": ["--data", "shapes", "--batch-size", "128"],
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


class Products(TorchDispatchMode):
    """Counts matrix products and convolutions by operator and the layout of their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.split("::")[1] in PRODUCTS:
            layout = lambda x: (
                ("T", tuple(x.shape), x.stride(), x.dtype, x.device.type)
                if isinstance(x, torch.Tensor)
                else x
            )
            key = tuple(tuple(a) if isinstance(a, list) else layout(a) for a in args)
            self.calls[function, key] += 1
        return function(*args, **(kwargs or {}))


def sync():
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_seconds(calls):
    """Seconds that the counted products take alone."""
    total = 0.0
    for (function, key), count in calls.items():

        def make(x):
            if not (isinstance(x, tuple) and x and x[0] == "T"):
                return list(x) if isinstance(x, tuple) else x
            return torch.empty_strided(*x[1:3], dtype=x[3], device=x[4]).normal_()

        args = [make(x) for x in key]
        repeat = 10
        for i in range(repeat + 2):
            if i == 2:
                sync()
                start = time.perf_counter()
            function(*args)
        sync()
        total += count * (time.perf_counter() - start) / repeat
    return total


def measure(script, preset, precision, compiled, warm, count):
    """One setting in this process: dict of numbers."""
    module = importlib.import_module(script)
    marks, inner = [], module.log

    class Done(Exception):
        pass

    def log(cfg, state, step, **values):
        if step in (warm - 1, warm + count - 1):
            sync()
            marks.append(time.perf_counter())
        inner(cfg, state, step, **values)
        if step == warm + count - 1:
            raise Done

    def run(hook, *flags):
        module.log = hook
        argv = FLAGS[preset] + (["--preset", preset] if preset else []) + list(flags)
        with tempfile.TemporaryDirectory() as folder:
            try:
                module.main(argv + ["--out", f"{folder}/run", "--log-every", "1000000"])
            except Done:
                pass

    seen = []

    def inspect(cfg, state, step, **values):
        seen.append((dict(products.calls), flops.get_total_flops(), cfg))
        if step == 1:
            raise Done

    fields = module.Config.__annotations__
    flags = ["--precision", precision] if "precision" in fields else []
    flags += ["--diffusion-steps", "1"] if "diffusion_steps" in fields else []  # the last stage
    marks.append(time.perf_counter())
    run(log, *flags, "--compile", compiled)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory
    with FlopCounterMode(display=False) as flops, Products() as products:
        run(inspect, *flags, "--compile", "off")
    step = (marks[2] - marks[1]) / count
    calls = Counter(seen[-1][0]) - Counter(seen[-2][0])
    return {
        "images_per_s": seen[-1][2].batch_size / step,
        "flop_per_s": (seen[-1][1] - seen[-2][1]) / step,
        "matmul_share": product_seconds(calls) / step,
        "memory_gb": memory / 2**30,
        "warm_up_s": marks[1] - marks[0],
    }


def main(argv=None):
    scripts = sorted(p.stem for p in ROOT.glob("*.py") if p.stem != "common")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", default=",".join(scripts), help="comma-separated [all]")
    parser.add_argument("--preset", default="", help="comma-separated; empty: the default run")
    parser.add_argument(
        "--warm-up", type=int, default=10, help="steps before the clock starts [10]"
    )
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed [40]")
    parser.add_argument("--one", default="", help="used by the program itself: one setting")
    args = parser.parse_args(argv)
    if args.one:
        script, preset, setting = args.one.split(":")
        return print(
            json.dumps(measure(script, preset, *SETTINGS[setting], args.warm_up, args.steps))
        )
    cuda = torch.cuda.is_available()
    device = (
        torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    rows, path = [], ROOT / f"results/benchmark_{'gpu' if cuda else 'cpu'}.json"
    print(
        f"{device}, torch {torch.__version__}\n"
        f"{'script':28}{'setting':15}{'images/s':>9}{'TFLOP/s':>9}"
        f"{'matmul share':>14}{'GB':>7}{'warm-up s':>11}{'speed-up':>10}"
    )
    for script in args.script.split(","):
        for preset in args.preset.split(","):
            first = None
            mixed = "precision" in importlib.import_module(script).Config.__annotations__
            for setting in [k for k in SETTINGS if k != "compiled float32"] if mixed else [
                k for k in SETTINGS if "bf16" not in k
            ]:
                command = [
                    sys.executable,
                    "-m",
                    "tests.benchmark",
                    "--one",
                    f"{script}:{preset}:{setting}",
                    "--warm-up",
                    str(args.warm_up),
                    "--steps",
                    str(args.steps),
                ]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{script} {preset} {setting} failed:\n{done.stderr[-3000:]}")
                m = json.loads(done.stdout.splitlines()[-1])
                first = first or m["images_per_s"]
                name, gain = f"{script} {preset}".strip(), m["images_per_s"] / first
                rows.append(
                    {"script": script, "preset": preset, "setting": setting, "speed_up": gain} | m
                )
                print(
                    f"{name:28}{setting:15}{m['images_per_s']:9.0f}{m['flop_per_s'] / 1e12:9.3f}"
                    f"{m['matmul_share']:14.2f}{m['memory_gb']:7.2f}"
                    f"{m['warm_up_s']:11.1f}{gain:10.2f}",
                    flush=True,
                )
    path.parent.mkdir(exist_ok=True)
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {(r["script"], r["preset"]) for r in rows}
    rows = [r for r in kept if (r["script"], r["preset"]) not in new] + rows
    path.write_text(
        json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
