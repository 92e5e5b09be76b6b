"""README against the repository: cells equal results/, commands parse, CI runs its set-up."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests import gallery
from tests.claims import table as claim_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\n?(?:sh|bash)?\n(.*?)```", README, re.S)
KEY = r"<!-- (\w+)_(cpu|gpu|long); ([^;>]+); ([^;>]+); ([\w.]+) -->"
RESULTS = [p for p in sorted((ROOT / "results").glob("*_*.json")) if "benchmark" not in p.name]
CELLS = re.findall(KEY + r"(-?[\d.]+(?: ± [\d.]+)?|not measured)", README)


def test_cells_equal_their_json():
    """`<!-- script_preset; table; arm; metric -->value`: the value is the mean, or mean ± std."""
    assert CELLS and len(CELLS) == README.count("<!-- ")
    for script, preset, table, arm, metric, shown in CELLS:
        path = ROOT / f"results/{script}_{preset}.json"
        if not path.exists():
            assert shown == "not measured", (script, preset, shown)
            continue
        rows = json.loads(path.read_text())["rows"]
        found = [r["metrics"][metric] for r in rows if (r["table"], r["arm"]) == (table, arm)]
        assert len(found) == 1, (table, arm)
        expected = claim_table.figure(found[0]["mean"], found[0]["std"])
        assert shown == expected, (table, arm, metric, expected)


def test_table_of_claims_is_up_to_date():
    assert (ROOT / "results/README.md").read_text() == claim_table.table(ROOT / "results")
    assert claim_table.counts(ROOT / "results") in README.replace("\n", " ")
    for mean, std, text in ((0.04251, None, "0.0425"), (8771.7, 22.4, "8772 ± 22"),
                            (-0.9714, 0.0302, "-0.971 ± 0.030"), (0.0, 0.0, "0.00 ± 0.00"),
                            (12.345, 0.6, "12.3 ± 0.6"), (3e-7, None, "0.0000")):
        assert claim_table.figure(mean, std) == text


@pytest.mark.parametrize(
    "path", RESULTS, ids=lambda p: p.stem
)
def test_results_have_the_agreed_form(path):
    report = json.loads(path.read_text())
    for key in (
        "script",
        "preset",
        "command",
        "commit",
        "device",
        "torch",
        "seconds",
        "seeds",
        "claims",
        "rows",
    ):
        assert key in report
    assert (
        path.stem == f"{report['script']}_{report['preset']}" and path.with_suffix(".png").exists()
    )
    for claim in report["claims"]:
        assert claim["agrees"] in ("as in the paper", "partly", "not resolved", "contradicted")
    for row in report["rows"]:
        for m in row["metrics"].values():
            v = m["values"]
            if None in v:  # a seed had nothing to measure
                assert m["n"] == len(v) and m["mean"] is None and m["std"] is None
                continue
            mean = sum(v) / len(v)
            assert m["n"] == len(v) and m["mean"] == pytest.approx(mean)
            if len(v) > 1:
                assert m["std"] ** 2 == pytest.approx(
                    sum((x - mean) ** 2 for x in v) / (len(v) - 1), rel=1e-6, abs=1e-30
                )


def test_two_set_up_commands_are_complete_and_ci_runs_the_second():
    setup = "python -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    commands = [line for block in BLOCKS for line in block.splitlines() if line.startswith(setup)]
    assert [c.removeprefix(setup) for c in commands] == ["python ddpm_xpred.py", "pytest -q"]
    ci = (ROOT / ".ci/run").read_text()
    assert "grep -m1 '&& pytest' README.md" in ci and README.count("&& pytest") == 1
    assert "pip install" not in ci and "apt" not in ci  # nothing but the README's own command


def test_every_command_parses(monkeypatch):
    seen = 0
    for line in "\n".join(BLOCKS).splitlines():
        line = line.split("  #")[0].replace("$(nproc)", "8")
        for part in line.split("&&"):
            words = shlex.split(part)
            script = next((w for w in words if w.endswith(".py") and "/" not in w), None)
            if words[:1] in (["python"], ["torchrun"]) and script:
                module = importlib.import_module(script[:-3])
                flags = words[words.index(script) + 1 :]
                if "--sample" in flags or "--help" in flags:
                    allowed = set(module.Config.__annotations__)
                    assert all(
                        f[2:].replace("-", "_") in allowed | {"help"}
                        for f in flags
                        if f[:2] == "--"
                    )
                else:
                    module.parse_config(module.Config, module.PRESETS, (), flags)
                seen += 1
            elif words[:2] == ["python", "-m"] and words[2].startswith("tests."):
                importlib.import_module(words[2])
                seen += 1
    assert seen >= 6


def test_picture_has_a_row_per_script():
    assert sorted(gallery.ROWS) == sorted(p.stem for p in ROOT.glob("*.py") if p.stem != "common")
    picture = Image.open(ROOT / "assets/gallery.png")
    assert picture.height == gallery.TILE * len(gallery.ROWS) and "assets/gallery.png" in README


def test_every_script_is_named_with_its_number_of_lines():
    for path in ROOT.glob("*.py"):
        lines = len(path.read_text().splitlines())
        assert re.search(rf"\[{path.name}\]\({path.name}\)[^\n]*\| {lines} \|", README) or (
            path.name == "common.py" and f"common.py` ({lines} lines)" in README
        ), (path.name, lines)


def test_every_preset_is_in_the_table_of_presets():
    part = README[README.index("## Presets") : README.index("## Several GPUs")]
    rows = [line.split("|") for line in part.splitlines() if line.startswith("| `")]
    shown = {row[1].strip(" `"): re.findall("`(.+?)`", row[2] + row[3]) for row in rows}
    scripts = [p.stem for p in ROOT.glob("*.py") if p.stem != "common"]
    assert shown == {s: list(importlib.import_module(s).PRESETS) for s in scripts}
