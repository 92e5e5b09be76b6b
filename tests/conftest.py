from pathlib import Path

import pytest
import torch

from common import load_checkpoint


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: kill and torchrun tests: pytest -m slow")
    config.addinivalue_line("markers", "gpu: needs CUDA, skips itself without")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


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
    ends with the weights of one that was not, bit for bit; leaves folders whole/ and parts/."""

    class Stop(Exception):
        pass

    def check(script, flags, parts):
        def stop(*args, real=script.log, **kwargs):
            real(*args, **kwargs)
            if args[2] == 2:
                raise Stop

        script.main(flags + ["--out", "whole"])
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(script, "log", stop)
            script.main(flags + ["--out", "parts"])
        saved = [load_checkpoint(path)["step"] for path in Path("parts").rglob("last.pt")]
        assert set(saved) == {2}  # else there is nothing to continue
        script.main(flags + ["--out", "parts"])
        one, two = (load_checkpoint(f"{out}/last.pt") for out in ("whole", "parts"))
        for part in parts:
            for k, w in one[part].items():
                assert torch.equal(w, two[part][k]), (part, k)

    return check
