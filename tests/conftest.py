import pytest
import torch


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
