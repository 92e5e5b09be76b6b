"""The measuring instruments of tests/claims against closed forms and files on disk."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.claims import ddpm_xpred as claim
from tests.claims import judge, report

ROOT = Path(judge.__file__).resolve().parents[2]


def test_frechet_distance_of_gaussians_has_its_closed_form():
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))[0]
    s1, s2 = torch.rand(5, generator=g).double() + 0.1, torch.rand(5, generator=g).double() + 0.1
    m1, m2 = torch.randn(5, generator=g).double(), torch.randn(5, generator=g).double()
    one, two = (m1, Q @ torch.diag(s1) @ Q.T), (m2, Q @ torch.diag(s2) @ Q.T)  # they commute
    expected = (m1 - m2).square().sum() + (s1.sqrt() - s2.sqrt()).square().sum()
    assert judge.frechet(one, two) == pytest.approx(expected.item(), rel=1e-9)
    # no common axes: 2 x 2, where tr((C1 C2)^1/2)^2 = tr(C1 C2) + 2 sqrt(det C1 C2)
    A, B = (
        x @ x.T + 0.1 * torch.eye(2).double() for x in torch.randn(2, 2, 2, generator=g).double()
    )
    root = ((A @ B).trace() + 2 * (A.det() * B.det()).sqrt()).sqrt()
    zero = torch.zeros(2).double()
    expected = (A.trace() + B.trace() - 2 * root).item()
    assert judge.frechet((zero, A), (zero, B)) == pytest.approx(expected, rel=1e-9)
    assert judge.frechet((zero, A), (zero, A)) == pytest.approx(0, abs=1e-7)


def test_statistics_are_mean_and_covariance_of_the_features():
    images = torch.randint(0, 256, (1200, 3, 4, 4)).to(torch.uint8)

    class Pixels:
        features = staticmethod(lambda x: x.flatten(1)[:, :6])

    mean, cov = judge.statistics(Pixels, images)
    f = images.numpy().reshape(1200, -1)[:, :6] / 127.5 - 1
    assert np.allclose(mean, f.mean(0), atol=1e-6) and np.allclose(cov, np.cov(f.T), atol=1e-6)


@pytest.mark.parametrize("size", [16, 32])
def test_shipped_judges_know_shapes_they_were_not_trained_on(size):
    from common import shapes

    images, labels = shapes(1000, size, seed=7)
    assert judge.accuracy(judge.load_judge("shapes", size), images, labels) > 0.97


def test_judging_a_file_prints_distance_and_accuracy(capsys, monkeypatch, refuses):
    from common import shapes

    monkeypatch.setattr(judge, "load_images", lambda args, device: small())

    def small():
        from types import SimpleNamespace

        images, labels = shapes(3000, 16, seed=1)
        return SimpleNamespace(images=images, labels=labels, classes=10, size=3000)

    images, labels = shapes(600, 16, seed=2)
    np.savez("real.npz", images.permute(0, 2, 3, 1).numpy(), labels.numpy())
    np.savez("wrong.npz", images.permute(0, 2, 3, 1).numpy(), labels.roll(1).numpy())
    np.savez("noise.npz", np.random.default_rng(0).integers(0, 256, (600, 16, 16, 3), np.uint8))
    printed = {}
    for name in ("real", "wrong", "noise"):
        judge.main(["--image-size", "16", "--npz", f"{name}.npz", "--device", "cpu"])
        words = capsys.readouterr().out.split()
        printed[name] = {
            k: float(v) for k, v in zip(words, words[1:]) if k.startswith(("fd", "acc"))
        }
    assert printed["real"]["accuracy"] > 0.97 and printed["wrong"]["accuracy"] < 0.05
    assert printed["real"]["fd"] < 2 * printed["real"]["fd_floor"] < printed["noise"]["fd"]
    refuses(lambda: judge.main(["--npz", "none.npz", "--device", "cpu"]), "none.npz")
    refuses(lambda: judge.load_judge("data/none", 32), "tests.claims.judge --data data/none")


@pytest.mark.parametrize("high, low, least, found", [
    ((1.0, 1.1), (0.2, 0.1), 0.0, "as in the paper"),
    ((1.0, 1.1), (0.2, 0.1), 0.8, "not resolved"),  # by less than asked at one seed
    ((1.0, 2.0), (0.9, 0.1), 0.0, "not resolved"),  # at every seed, but within the spread
    ((0.1, 0.3), (0.2, 0.1), 0.0, "not resolved"),  # seeds differ
    ((0.2, 0.1), (1.0, 1.1), 0.0, "contradicted"),
    ((0.2, 0.1), (0.3, 0.9), 0.0, "not resolved"),
    ((1.0,), (0.0,), 0.0, "not resolved")])  # one seed has no spread
def test_exceeds_needs_every_seed_and_more_than_the_spread(high, low, least, found):
    assert report.exceeds(high, low, least) == found


def test_overall_says_partly_only_where_something_holds():
    yes, no, open_ = "as in the paper", "contradicted", "not resolved"
    for found, word in (((yes, yes), yes), ((yes, open_), "partly"), ((yes, no), "partly"),
                        ((no, open_), no), ((open_, open_), open_), (("partly", no), "partly")):
        assert report.overall(dict(enumerate(found))) == word


def test_attempt_turns_a_refusal_into_an_error_that_a_pool_passes_on():
    def refuse():
        raise SystemExit(2)
    with pytest.raises(RuntimeError, match="refuse ended with status 2"):
        report.attempt(refuse)
    assert report.attempt(max, 1, 3) == 3


def test_report_keeps_arms_refuses_other_code_and_writes_statistics(refuses):
    calls = []

    def measure(folder):
        calls.append(folder)
        return {"fd": float(len(calls))}

    def run(*flags):
        r = report.open_report("ddpm_xpred", "doc", list(flags))
        for seed in (0, 1, 2):
            report.arm(r, "table", "x / y", seed, measure)
        report.conclude(r, "table", "so it is", "partly")
        return json.loads(Path("results/ddpm_xpred_cpu.json").read_text()), r

    first, r = run()
    again, _ = run()
    assert (
        len(calls) == 3 and first["rows"] == again["rows"] and first["seconds"] == again["seconds"]
    )
    assert first["rows"] == [
        {
            "table": "table",
            "arm": "x / y",
            "metrics": {"fd": {"mean": 2.0, "std": 1.0, "n": 3, "values": [1.0, 2.0, 3.0]}},
        }
    ]
    assert first["seeds"] == [0, 1, 2] and first["claims"][0]["agrees"] == "partly"
    kept = report.arm_file(r, "table", "x / y", 1)
    kept.write_text(kept.read_text().replace(r["code"], "0" * 64))
    refuses(run, "other code", "--reuse")
    run("--reuse")
    assert len(calls) == 3
    with pytest.raises(ValueError):
        report.conclude(r, "table", "so it is", "proven")


def test_report_writes_null_where_a_seed_has_nothing_to_measure():
    r = report.open_report("ddpm_xpred", "doc", [])
    for seed, hits in enumerate((0.5, math.nan, 1.5)):
        report.arm(r, "table", "arm", seed, lambda folder: {"hits": hits, "fd": float(seed)})
    report.arm(r, "table", "other", 0, lambda folder: {"hits": math.inf})
    text = Path("results/ddpm_xpred_cpu.json").read_text()
    rows = json.loads(text, parse_constant=lambda word: pytest.fail(f"not JSON: {word}"))["rows"]
    assert rows[0]["metrics"] == {
        "hits": {"mean": None, "std": None, "n": 3, "values": [0.5, None, 1.5]},
        "fd": {"mean": 1.0, "std": 1.0, "n": 3, "values": [0.0, 1.0, 2.0]},
    }
    assert rows[1]["metrics"]["hits"] == {"mean": None, "std": None, "n": 1, "values": [None]}


def test_spiral_lies_in_the_plane_and_v_error_is_the_squared_norm():
    P = claim.plane(16)
    assert torch.allclose(P.T @ P, torch.eye(2), atol=1e-6)
    radius = claim.spiral(torch.tensor([0.0, 1.0])).norm(dim=1)
    assert radius.tolist() == pytest.approx(
        [0.15 * math.pi, 0.45 * math.pi], abs=1e-5
    )  # .47 to 1.41
    x, eps = torch.randn(64, 16, 1, 1), torch.randn(64, 16, 1, 1)
    t = 0.1 + 0.8 * torch.rand(64)
    wrong = lambda z, t, y: x + 0.1  # v is off by 0.1 / (1 - t) in each of 16 coordinates
    expected = (16 * 0.01 / (1 - t) ** 2).mean()
    assert claim.v_error(wrong, x, eps, t, None, "x").item() == pytest.approx(
        expected.item(), rel=1e-3
    )
    assert claim.v_error(lambda z, t, y: x - eps, x, eps, t, None, "v") < 1e-9


def test_total_variation_of_a_ramp():
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(2, 3, 8, 8) * 0.1
    assert claim.total_variation(ramp).item() == pytest.approx(0.1, rel=1e-5)


def test_exact_minimiser_without_stop_gradient_has_the_width_that_theory_gives():
    from tests.claims.consistency_training import exact_minimiser

    assert exact_minimiser("ct", 151)["std_ratio"] == pytest.approx(0.302, abs=1e-3)
    assert exact_minimiser("ct", 151, D=1)["std_ratio"] == pytest.approx(0.302, abs=1e-3)
    assert exact_minimiser("ict", 161)["std_ratio"] == pytest.approx(0.669, abs=2e-3)
