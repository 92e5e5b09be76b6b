import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import load_checkpoint


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: kill and torchrun tests: pytest -m slow")
    config.addinivalue_line("markers", "gpu: needs CUDA, skips itself without")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA: no other device has its kernels and its compiler")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """What a test writes lands in its own temporary folder; its random numbers are fixed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def refuses(capsys):
    """refuses(call, *words): it ends with status 2 and one line on stderr that has the words."""

    def check(call, *words, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call()
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert stop.value.code == status and len(lines) == 1, (stop.value.code, lines)
        for word in words:
            assert str(word) in lines[0], lines[0]

    return check


@pytest.fixture
def same_when_interrupted(monkeypatch):
    """same_when_interrupted(script, flags, parts): a run stopped in its third step and continued
    ends with the weights of one that was not, bit for bit; leaves folders whole/ and parts/.

    parts  entries of the checkpoints, of those stages that have them
    stops  (stage, step) from 0, one after the other; "." is the last stage, None any
    """

    class Stop(Exception):
        pass

    def check(script, flags, parts, stops=((None, 2),)):
        script.main(flags + ["--out", "whole"])
        for stage, step in stops:

            def stop(cfg, state, now, real=script.log, **values):
                real(cfg, state, now, **values)
                if now == step and stage in (None, os.path.relpath(cfg.out, "parts")):
                    raise Stop(Path(cfg.out, "last.pt"), step // cfg.save_every * cfg.save_every)

            with monkeypatch.context() as patch, pytest.raises(Stop) as stopped:
                patch.setattr(script, "log", stop)
                script.main(flags + ["--out", "parts"])
            last, saved = stopped.value.args
            assert saved == (load_checkpoint(last)["step"] if last.exists() else 0)
            assert Path("parts/last.pt").exists() == (saved > 0 and last == Path("parts/last.pt"))
        script.main(flags + ["--out", "parts"])
        seen = set()
        for last in Path("whole").rglob("last.pt"):
            one, two = (load_checkpoint(out / last.relative_to("whole")) for out in (
                Path("whole"), Path("parts")))
            assert one["step"] == two["step"] == one["config"]["steps"]
            for part in set(parts) & set(one):
                seen.add(part)
                for k, w in one[part].items():
                    assert torch.equal(w, two[part][k]), (last, part, k)
        assert seen == set(parts)

    return check


def start(script, *flags, ranks=1):
    """The script in a new interpreter, under torchrun if ranks > 1, in a session of its own."""
    head = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",  # no DNS
            f"--nproc-per-node={ranks}", "--"]  # without it --n is taken for torchrun's own flag
    return subprocess.Popen(
        [sys.executable, *head * (ranks > 1), script.__file__, *map(str, flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(out):
    """Processes that train into this folder: torchrun's workers have sessions of their own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if str(out) in words and "torch.distributed.run" not in words:
            found.append(int(folder.name))
    return found


@pytest.fixture
def launch():
    """launch(script, *flags, ranks=1): what it prints, to its end; fails: words of its error."""
    running = []

    def check(script, *flags, ranks=1, fails=""):
        running.append(start(script, *flags, ranks=ranks))
        output = running[-1].communicate(timeout=300)[0]
        assert (running[-1].returncode != 0) == bool(fails) and fails in output, output
        return output

    yield check
    for process in running:
        if process.poll() is None:  # it hung
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def same_on_two_ranks(launch):
    """same_on_two_ranks(script, *flags): one rank and two draw the same images, into s1/ and s2/;
    what they print."""

    def check(script, *flags):
        outputs = [launch(script, "--device", "cpu", "--npz", *flags, "--out", f"s{ranks}",
                          ranks=ranks) for ranks in (1, 2)]
        one, two = (np.load(f"s{ranks}/sample.npz")["arr_0"] for ranks in (1, 2))
        assert len(one) > 0 and (one == two).all()
        return outputs

    return check
