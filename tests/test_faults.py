"""A run folder under faults, for every script: what DESIGN promises of it, put to the test.

    pytest -m slow tests/test_faults.py              # all, and writes results/faults.json
    pytest -m slow tests/test_faults.py -k rae       # one script

A run is a process of its own that does what `python <script>.py` does, forked from a server that
has imported torch already, so that it starts in a moment. It logs every 2nd and saves every 3rd
step, so that a kill falls between a line and its checkpoint, and it is so small that about half of
its time goes into saving. A script with stages meets each fault in every stage.
"""
import collections
import contextlib
import errno
import importlib
import io
import json
import multiprocessing
import os
import pickle
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
from common import load_checkpoint
from tests.claims.report import cpu_cores
from tests.conftest import start, workers

ROOT = Path(common.__file__).parent
EVERY = "--device cpu --compile off --image-size 8 --log-every 2 --save-every 3 --sample-every 1000"
EVERY += " --batch-size 8"
JIT = "--precision fp32 --dim 16 --depth 2 --heads 2 --sampling-steps 2"
FLAGS = {
    "balanced_representation": "--data fields --samples 60 --width 200 --few-steps 30 --steps 90",
    "consistency_training": "--method ect --channels 8 --widths 8,8 --edit-steps 3 "
                            "--diffusion-steps 30 --steps 30",
    "ddpm_xpred": f"{JIT} --bottleneck 4 --class-start 1 --steps 60",
    "moe_subspace": "--precision fp32 --batch-size 20 --vae-channels 4 --latent-dim 4 --modes 2 "
                    "--rank 2 --vae-steps 30 --steps 30",
    "rae": f"{JIT} --depth 1 --head-dim 24 --head-depth 1 --head-heads 2 --decoder-batch-size 20 "
           "--batch-size 20 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --decoder-mlp 32 "
           "--lr-flat 10 --decoder-steps 30 --steps 30",
    "repa": f"{JIT} --image-size 16 --pool 2 --align-depth 1 --projector-dim 8 --steps 60",
    "representation_dynamics": "--precision fp32 --dim 16 --probe-images 200 --sigmas 0.01,0.1,1 "
                               "--subset 500 --steps 60",
    "self_refine": f"{JIT} --clips 12 --frames 4 --components 6 --n 3 --plan 0.3-0.7:2 --steps 60",
    "simsiam": "--precision fp32 --image-size 16 --dim 16 --target-ema 0.9 --steps 60 "
               "--backbone-args {\"layers\":[1],\"channels\":[16],\"stem_chs\":8}",
    "va_vae": f"{JIT} --tokenizer-batch-size 8 --widths 4,8 --latent-dim 3 --tokenizer-steps 30 "
              "--steps 30",
    "vjepa_guidance": "--precision fp32 --image-size 16 --clips 40 --batch-size 4 --frames 8 "
                      "--components 8 --dim 16 --depth 1 --n 3 --predictor-dim 32 --best-of 2 "
                      "--sampling-steps 3 --skip 1 --C 2 --W 4 --generator-steps 30 --steps 30",
}
STAGES = {"balanced_representation": "few", "consistency_training": "diffusion", "rae": "decoder",
          "moe_subspace": "vae", "va_vae": "tokenizer", "vjepa_guidance": "generator"}
BATCHES = {  # where a batch passes by: functions that return it, or take it as this argument
    "balanced_representation": {"paper_loss": 2}, "moe_subspace": {"expert_batch": None},
    "self_refine": {"flow_loss": 1}, "vjepa_guidance": {"flow_loss": 1, "jepa_loss": 1}}
FOLDERS = sorted(set(FLAGS) - {"self_refine", "vjepa_guidance"})  # these two make their videos
SCRIPTS = pytest.mark.parametrize("script", sorted(FLAGS))
TIMED = {"clock", "images_per_s", "memory_gb"}  # what two equal runs may differ in
COUNTS = {  # faults, and the scripts they are tried on
    "SIGKILL": FLAGS, "SIGTERM": FLAGS, "SIGKILL of one of two ranks": FLAGS,
    "SIGKILL under torchrun": ["ddpm_xpred"], "disk full": FLAGS,
    "code in a checkpoint": FLAGS, "truncated checkpoint": FLAGS, "corrupt image": FOLDERS,
    "NaN in a batch": FLAGS}
EXPECTED = {(fault, script) for fault, scripts in COUNTS.items() for script in scripts}


# ---- runs as processes -----------------------------------------------------------------


def stages(script):
    """Folders of its stages, inside that of the run; the last is the run's own."""
    return [*STAGES.get(script, "").split(), "."]


def work(script, flags, output, ranks, spoil):
    """The process of a run; ranks: what torchrun would set; spoil: (function, its arguments)."""
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{script}.py"]
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # the server's would be inherited
    os.environ.update(ranks)
    importlib.reload(common)  # reads the rank, which `from common import ...` copies
    module = importlib.import_module(script)
    if spoil:
        spoil[0](module, *spoil[1:])
    module.main(flags)


def count_lines(folders):
    """Lines in the metrics.jsonl of these folders, in all."""
    tables = [folder / "metrics.jsonl" for folder in folders]
    return sum(table.read_bytes().count(b"\n") for table in tables if table.exists())


class Run:
    """A run of a script into a folder, in a process of its own; all steps unless flags say else."""

    def __init__(self, script, out, *flags, ranks={}, spoil=None):
        self.out, self.output = Path(out), Path(f"{out}.{ranks.get('RANK', 0)}.txt")
        self.folders = [self.out / stage for stage in stages(script)]
        self.loads, self.seen = 0, {}
        flags = [*EVERY.split(), *FLAGS[script].split(), "--out", str(out), *map(str, flags)]
        self.output.write_text("")
        make = multiprocessing.get_context("forkserver").Process
        self.process = make(target=work, args=(script, flags, self.output, ranks, spoil))
        self.process.start()

    def lines(self):
        """Lines in metrics.jsonl, all stages together."""
        return count_lines(self.folders)

    def stage(self):
        """The stage that runs: the last one that has a table."""
        return max(i for i, f in enumerate(self.folders) if not i or (f / "metrics.jsonl").exists())

    def reaches(self, lines, seconds=300):
        """Wait for so many lines: false if the run ends before. Loads each checkpoint it sees."""
        end = time.monotonic() + seconds
        while self.lines() < lines:
            if self.process.exitcode is not None:
                return False
            assert time.monotonic() < end, f"{self.lines()} of {lines} lines"
            self.load()
            time.sleep(0.001)
        return True

    def load(self):
        """Load what is now the last.pt of each stage: it has to be whole at every moment."""
        for path in [f / "last.pt" for f in self.folders if (f / "last.pt").exists()]:
            now = path.stat()
            if self.seen.get(path) != (now.st_ino, now.st_mtime_ns):
                self.seen[path] = now.st_ino, now.st_mtime_ns
                load_checkpoint(path)
                self.loads += 1

    def kill(self):
        """SIGKILL; then every last.pt has to be there whole. False if the run had ended before."""
        self.process.kill()
        self.process.join()
        self.seen = {}
        self.load()
        return self.process.exitcode == -signal.SIGKILL

    def ends(self, status=0, seconds=300):
        """Wait for its end with this status (None: any but 0): its output."""
        self.process.join(seconds)
        late, output = self.process.exitcode is None, self.output.read_text()
        self.process.kill() if late else None
        code = self.process.exitcode
        assert not late and (code == status or status is None and code != 0), (code, output)
        return output

    def fails(self, *words, status=2):
        """Wait for its end with this status and one line that begins error: and has the words."""
        output = self.ends(status)
        errors = [line for line in output.splitlines() if "error:" in line]
        assert len(errors) == 1 and "Traceback" not in output, output
        for word in words:
            assert str(word) in errors[0], output
        return errors[0]


def same(one, two):
    """Whether two entries of checkpoints are equal, bit for bit."""
    if torch.is_tensor(one):
        return torch.equal(one.nan_to_num(), two.nan_to_num()) and one.dtype == two.dtype
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def assert_same_runs(script, one, two):
    """Two finished runs have the same checkpoints, metrics without a line lost or doubled, files
    and pictures, stage by stage."""
    for stage in stages(script):
        a, b = one / stage, two / stage
        first, second = (load_checkpoint(f / "last.pt") for f in (a, b))
        assert first.keys() == second.keys() and first["step"] == second["step"]
        for name in first.keys() - TIMED - {"config"}:
            assert same(first[name], second[name]), (stage, name)
        steps = first["config"]["steps"]
        tables = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
                  for f in (a, b)]
        for table in tables:
            assert [row["step"] for row in table] == [*range(2, steps + 1, 2)], stage
            assert all(row.pop(name) >= 0 for row in table for name in TIMED - {"clock"})
        assert tables[0] == tables[1], stage
        names = [sorted(p.name for p in f.iterdir()) for f in (a, b)]
        assert names[0] == names[1]
        for name in names[0]:
            if name.startswith("samples_") or name.endswith(".safetensors"):
                assert (a / name).read_bytes() == (b / name).read_bytes(), name


def two_ranks(script, out):
    """A run on two gloo ranks, without torchrun: rank 0, rank 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [Run(script, out, ranks=where | {"RANK": str(rank)}) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(script, ranks=1): folder of an uninterrupted run, and its lines by stage; made once."""
    folder, made = tmp_path_factory.mktemp("whole"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # for the server, whose children then start at once
        preload = ["torch._dynamo", "torch._inductor.config", "timm", "matplotlib.figure"]
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            [*preload, "tests.test_faults"])

        def find(script, ranks=1):
            if (script, ranks) not in made:
                out = folder / f"{script}{ranks}"
                runs = [Run(script, out)] if ranks == 1 else two_ranks(script, out)
                for run in runs:
                    run.ends()
                made[script, ranks] = out, [
                    (f / "metrics.jsonl").read_text().count("\n") for f in runs[0].folders]
            return made[script, ranks]

        yield find


@pytest.fixture(scope="module")
def counted():
    """counted(fault, script, tried, **more): faults that did no harm; results/faults.json once
    each fault was tried on each of its scripts."""
    start, rows = time.perf_counter(), []
    yield lambda fault, script, tried, **more: rows.append(
        {"fault": fault, "script": script, "tried": tried, **more})
    done = {(row["fault"], row["script"]) for row in rows}
    if done != EXPECTED:
        return
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    report = {
        "command": "pytest -m slow tests/test_faults.py",
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "none",
        "device": f"{platform.machine()} CPU, {cpu_cores()} cores",
        "torch": torch.__version__, "seconds": round(time.perf_counter() - start, 1),
        "tried": {f: sum(row["tried"] for row in rows if row["fault"] == f) for f in COUNTS},
        "rows": rows}
    (ROOT / "results/faults.json").write_text(json.dumps(report, indent=1) + "\n")


# ---- kills -----------------------------------------------------------------------------


@pytest.mark.slow
@SCRIPTS
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_been(
        script, whole, counted, tmp_path):
    draw, stages, loads, writing = random.Random(script), collections.Counter(), 0, 0
    (expected, lines), wanted, trial = whole(script), 50 if script == "ddpm_xpred" else 5, 0
    while stages.total() < wanted:
        out, trial = tmp_path / f"run{trial}", trial + 1
        for i in range(5):  # each in a fifth of its own; the first may come before the first step
            run = Run(script, out)
            moment = int((i + draw.random()) / 5 * (sum(lines) - 3))
            run.reaches(moment)
            time.sleep(draw.random() * 0.1)
            if not run.kill():
                break  # it had ended before
            loads += run.loads
            stages[run.stage()] += 1
            writing += any(out.rglob("*.new"))
        Run(script, out).ends()
        assert_same_runs(script, expected, out)
    assert len(stages) == len(lines)
    counted("SIGKILL", script, stages.total(), stages=[stages[i] for i in sorted(stages)],
            runs_compared=trial, checkpoints_loaded=loads, during_a_write=writing)


def moments(lines):
    """A number of lines in all for each stage, early in it, so that what follows falls into it."""
    return [sum(lines[:i]) + 3 for i in range(len(lines))]


@pytest.mark.slow
@SCRIPTS
def test_sigterm_saves_and_the_same_command_goes_on(script, whole, counted, tmp_path):
    expected, lines = whole(script)
    for stage, moment in enumerate(moments(lines)):
        run = Run(script, tmp_path / "run")
        assert run.reaches(moment)
        os.kill(run.process.pid, signal.SIGTERM)
        error = run.fails("stopped at step", "saved", status=128 + signal.SIGTERM)
        saved = load_checkpoint(run.folders[stage] / "last.pt")["step"]
        assert re.search(r"step (\d+)", error)[1] == str(saved) and run.stage() == stage
    Run(script, tmp_path / "run").ends()
    assert_same_runs(script, expected, tmp_path / "run")
    counted("SIGTERM", script, len(lines))


@pytest.mark.slow
@SCRIPTS
def test_a_rank_that_is_killed_ends_the_other(script, whole, counted, tmp_path):
    expected, lines = whole(script, ranks=2)
    for stage, moment in enumerate(moments(lines)):
        ranks = two_ranks(script, tmp_path / "run")
        assert ranks[0].reaches(moment)
        killed = ranks.pop((stage + len(script)) % 2)
        assert killed.kill()
        ranks[0].ends(status=None, seconds=120)  # an error, and it does not hang
    for run in two_ranks(script, tmp_path / "run"):
        run.ends()
    assert_same_runs(script, expected, tmp_path / "run")
    counted("SIGKILL of one of two ranks", script, len(lines))


@pytest.mark.slow
def test_torchrun_ends_when_a_worker_is_killed_and_goes_on(whole, counted, launch, tmp_path):
    """And when all are. New interpreters, whose runs equal the forked ones of the other tests."""
    script, out = importlib.import_module("ddpm_xpred"), tmp_path / "run"
    flags = [*EVERY.split(), *FLAGS["ddpm_xpred"].split(), "--out"]
    for all_of_them in (False, True):
        process, before = start(script, *flags, out, ranks=2), count_lines([out])
        while count_lines([out]) < before + 3 and process.poll() is None:
            time.sleep(0.001)
        found = workers(out)
        if all_of_them:
            os.killpg(process.pid, signal.SIGKILL)
        for pid in found if all_of_them else found[:1]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=300)
        assert process.returncode != 0 and len(found) == 2
    launch(script, *flags, out, ranks=2)
    assert_same_runs("ddpm_xpred", whole("ddpm_xpred", ranks=2)[0], out)
    launch(script, *flags, tmp_path / "one")
    assert_same_runs("ddpm_xpred", whole("ddpm_xpred")[0], tmp_path / "one")
    counted("SIGKILL under torchrun", "ddpm_xpred", 2)


# ---- disk, checkpoints, images ---------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MB; None where mounting one is not allowed."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
    else:
        yield path
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk):
    """Take the free space of a file system but for 16 kB, less than a checkpoint."""
    state = os.statvfs(disk)
    free = state.f_bavail * state.f_frsize - 2**14
    with open(disk / "filler", "ab") as file, contextlib.suppress(OSError):  # the run was quicker
        if free > 0:
            os.posix_fallocate(file.fileno(), file.tell(), free)


def no_space(module):
    """Flushing a file fails as it does on a full disk."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fsync


@pytest.mark.slow
@SCRIPTS
def test_full_disk_keeps_the_old_checkpoint(script, whole, counted, small_disk, tmp_path):
    (expected, lines), out = whole(script), (small_disk or tmp_path) / "run"
    for moment in moments(lines):
        run = Run(script, out)
        assert run.reaches(moment)
        while small_disk and run.process.exitcode is None:
            fill(small_disk)
            run.load()
            time.sleep(0.001)
        if not small_disk:
            assert run.kill()
            run = Run(script, out, spoil=(no_space,))
        run.fails("cannot save", "which stays as it was", "No space left")
        run.kill()
        assert not any(out.rglob("*.new"))
        (small_disk or tmp_path).joinpath("filler").unlink(missing_ok=True)
    Run(script, out).ends()
    assert_same_runs(script, expected, out)
    counted("disk full", script, len(lines), how="tmpfs" if small_disk else "injected")


class Code:
    def __reduce__(self):
        return os.system, ("touch owned",)


def refuse_checkpoints(script, folder, contents, refuses):
    """Each of contents in place of a last.pt, in any stage: one line and status 2, whether the run
    is continued or sampled. Returns how often it was tried."""
    main = importlib.import_module(script).main
    flags = [*EVERY.split(), *FLAGS[script].split(), "--out", str(folder)]
    tried = [(stage, content) for stage in stages(script) for content in contents]
    for stage, content in tried:
        last = folder / stage / "last.pt"
        whole = last.read_bytes()
        last.write_bytes(content(whole))
        refuses(lambda: main(flags), last, "truncated or no checkpoint")
        refuses(lambda: main(["--sample", str(last)]), last, "truncated or no checkpoint")
        last.write_bytes(whole)
    main(flags)  # and this one is accepted
    return 2 * len(tried)


@pytest.mark.slow
@SCRIPTS
def test_code_in_a_checkpoint_is_refused_and_not_run(script, whole, counted, refuses, tmp_path):
    def saved(content):
        torch.save(dict(torch.load(io.BytesIO(content), weights_only=True), extra=Code()), "new.pt")
        return Path("new.pt").read_bytes()

    shutil.copytree(whole(script)[0], "run")
    contents = saved, lambda content: pickle.dumps(Code())
    tried = refuse_checkpoints(script, tmp_path / "run", contents, refuses)
    assert not Path("owned").exists()
    pickle.loads(pickle.dumps(Code()))
    assert Path("owned").exists()  # which shows what it would have done
    counted("code in a checkpoint", script, tried)


@pytest.mark.slow
@SCRIPTS
def test_truncated_checkpoint_is_refused(script, whole, counted, refuses, tmp_path):
    shutil.copytree(whole(script)[0], "run")
    draw = random.Random(script)
    cuts = [lambda content: b"", lambda content: content[:-1],
            *[lambda content: content[:draw.randrange(len(content))]] * 3]
    tried = refuse_checkpoints(script, tmp_path / "run", cuts, refuses)
    counted("truncated checkpoint", script, tried)


@pytest.mark.slow
@pytest.mark.parametrize("script", FOLDERS)
def test_corrupt_image_is_named_or_left_out_and_counted(script, counted, tmp_path):
    for split, n in ("train", 60), ("validation", 40):
        for i, pixels in enumerate(common.shapes(n, 16, 0)[0]):
            path = tmp_path / "images" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    bad = tmp_path / "images/train/b/7.png"
    bad.write_bytes(bad.read_bytes()[:100])
    flags = ["--data", tmp_path / "images", "--steps", 4]
    flags += ["--samples", 40] if script == "balanced_representation" else []
    flags += ["--subset", 0] if script == "representation_dynamics" else []
    if script in STAGES:
        flags += [f"--{STAGES[script]}-steps", 2]
    Run(script, tmp_path / "named", *flags).fails("b/7.png", "--skip-bad")
    assert not (tmp_path / "named").exists()
    output = Run(script, tmp_path / "counted", *flags, "--skip-bad").ends()
    assert f"left out 1 of 60 images of {tmp_path}" in output and "b/7.png" in output
    assert load_checkpoint(tmp_path / "counted/last.pt")["step"] == 4
    counted("corrupt image", script, 2)


# ---- a loss that is not finite ---------------------------------------------------------


def poison(module, step, out):
    """One sample is NaN in the batch of this step, counted from 0, of the run in folder out."""
    now, steps = {"bad": False}, module.steps

    def watch(cfg, state):
        for i in steps(cfg, state):
            now["bad"] = (i, cfg.out) == (step, out)
            yield i

    def nan(x):
        x = x.float()
        x[0] = torch.nan
        return x

    def spoil(call, index):
        def spoiled(*args):
            if not now["bad"]:
                return call(*args)
            if index is not None:
                return call(*args[:index], nan(args[index].clone()), *args[index + 1:])
            result = call(*args)
            return (nan(result[0]), *result[1:]) if isinstance(result, tuple) else nan(result)

        return spoiled

    module.steps = watch
    for name, index in BATCHES.get(module.__name__, {"batch": None}).items():
        setattr(module, name, spoil(getattr(module, name), index))


@pytest.mark.slow
@SCRIPTS
def test_nan_in_a_batch_ends_the_run_and_names_the_last_good_checkpoint(
        script, whole, counted, tmp_path):
    (expected, lines), out = whole(script), tmp_path / "run"
    for folder in [out / stage for stage in stages(script)]:
        run = Run(script, out, spoil=(poison, 16, str(folder)))
        run.fails("not finite at step 17", f"{folder / 'last.pt'} of step 15", status=1)
        assert load_checkpoint(folder / "last.pt")["step"] == 15
    Run(script, out).ends()
    assert_same_runs(script, expected, out)
    counted("NaN in a batch", script, len(lines))


# ---- what results/faults.json says -----------------------------------------------------


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/faults.json")), ids=lambda p: p.stem)
def test_counts_have_the_agreed_form(path):
    report = json.loads(path.read_text())
    assert set(report) == {"command", "commit", "device", "torch", "seconds", "tried", "rows"}
    tried = collections.Counter()
    for row in report["rows"]:
        assert row["tried"] > 0
        tried[row["fault"], row["script"]] += row["tried"]
    assert set(tried) == EXPECTED
    for fault, scripts in COUNTS.items():
        assert report["tried"][fault] == sum(tried[fault, script] for script in scripts)
    assert tried["SIGKILL", "ddpm_xpred"] == 50
    assert all(tried["SIGKILL", script] >= 5 for script in FLAGS)
