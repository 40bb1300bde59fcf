# SPDX-License-Identifier: Apache-2.0
"""Benchmarks end to end at tiny sizes, and gates that must refuse what is wrong."""

import contextlib
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import cases, engine, matchers, measure, operators, problems, record, run, workloads
from benchmarks.matchers import Context
from benchmarks.measure import Contender, Disagreement, Elapsed, Unavailable
from eloftr_ops import EfficientLoFTRConfig
from eloftr_ops.inference.cpu import stages, winograd
from support.models import random_images, tiny_model

CPU = torch.device("cpu")
QUICK = {(case.op, measure): case for case in cases.QUICK_KERNELS for measure in case.measures}


def context(folder: Path) -> Context:
    return Context(CPU, "fp32", folder, quick=True)


def rows_of(suite: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Every row of the only record in ``folder``, by case, measure and name."""
    (path,) = folder.glob(f"{suite}--*.json")
    made = record.read(path)
    assert made["quick"]
    return {
        f"{case['name']}, {case['measure']}: {row['name']}": row
        for case in made["cases"]
        for row in case["rows"]
    }


def test_kernels_quickly(tmp_path: Path) -> None:
    assert run.main(["kernels", "--device", "cpu", "--quick", "--json", "--output", str(tmp_path)]) == 0
    rows = rows_of("kernels", tmp_path)
    eager = [row for name, row in rows.items() if name.endswith(": eager reference")]
    assert len(eager) == len(QUICK)
    assert all(row["status"] == "timed" and row["limit_fraction"] > 0 for row in eager)
    assert all(row["reason"] for name, row in rows.items() if "torch.compile" in name or "triton" in name)


def test_matcher_quickly(tmp_path: Path) -> None:
    assert run.main(["matcher", "--device", "cpu", "--quick", "--json", "--output", str(tmp_path)]) == 0
    rows = {name.split(": ")[-1]: row for name, row in rows_of("matcher", tmp_path).items()}
    for name in ("eloftr_ops full", "transformers", "kornia LoFTR"):
        assert rows[name]["status"] == "timed", name
        assert rows[name]["matches"] > 0
        assert rows[name]["operations"] > 1e8
    assert rows["eloftr_ops full"]["matches"] == rows["transformers"]["matches"]  # the same weights
    assert rows["eloftr_ops small, CUDA graph"]["reason"] == "CUDA graphs need a GPU"


def test_cpu_quickly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["cpu", "--device", "cpu", "--quick", "--profile", "--json", "--output", str(tmp_path)]
    assert run.main(quick) == 0
    rows = rows_of("cpu", tmp_path)
    assert all(row["status"] == "timed" for row in rows.values())
    stages = [rows[f"stages at 128x96, whole: eloftr_ops small fp32: {stage}"] for stage in workloads.STAGES]
    whole = rows["stages at 128x96, whole: eloftr_ops small fp32"]
    assert all(row["median_s"] > 0 for row in stages)
    assert sum(row["median_s"] for row in stages) <= whole["median_s"]
    printed = capsys.readouterr().out
    assert "eloftr_ops small fp32, by stage:\n  backbone" in printed
    assert ", arithmetic alone " in printed


def test_operations_of_the_stages_are_those_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolved by definition, the run computes a few percent more where pieces overlap, and its windows."""
    matcher_ = matchers.load("eloftr_ops small fp32", context(tmp_path))
    pair = matchers.images((256, 320), 1, torch.device("cpu"))
    counted = matchers.stage_operations("small", (256, 320))
    assert set(counted) == set(workloads.STAGES[:-1])
    saving = measure.count_operations(lambda: matcher_.match(*pair))
    monkeypatch.setattr(winograd, "LEAST_TILES", 1 << 30)
    executed = measure.count_operations(lambda: matcher_.match(*pair))
    assert 0.95 * executed < sum(counted.values()) < executed
    assert saving < 0.8 * executed


def test_widths_are_those_of_the_presets() -> None:
    for name, widths in cases.PRESETS.items():
        config = EfficientLoFTRConfig.preset(name)
        expected = (config.coarse_channels, config.num_heads, config.fine_channels, config.subpixel_channels)
        assert tuple(widths) == expected


def test_the_kernel_suite_does_without_kornia_transformers_and_eloftr_ops() -> None:
    blocked = "sys.modules.update(dict.fromkeys(['kornia', 'transformers', 'eloftr_ops', 'triton']))"
    arguments = ["kernels", "--device", "cpu", "--quick", "--only", "mlp"]
    code = f"import sys; {blocked}; from benchmarks import run; sys.exit(run.main({arguments}))"
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert "| eager reference |" in done.stdout


def test_absent_peers_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matchers.importlib.util, "find_spec", lambda name: None)
    (task,) = engine.suite_tasks("matcher", context(tmp_path))
    case, runs = engine.run_task(task, "matcher", context(tmp_path), time.monotonic() + 60)
    reasons = {row["name"]: row["reason"] for row in case["rows"] if row["status"] == "not run"}
    assert reasons["transformers"] == reasons["kornia LoFTR"] == "kornia is not installed"
    assert set(runs) == {"3x3 convolution fp32", "3x3 convolution bf16"}


def faulty(op: str, fault: Callable[[torch.Tensor], torch.Tensor]) -> problems.Op:
    good = problems.operation(op, problems.REFERENCE)
    return lambda *arguments: tuple(fault(output) for output in good(*arguments))


@pytest.mark.parametrize(
    ("op", "fault"),
    [
        ("aggregated_attention", lambda x: 1.01 * x),
        ("upsample_mlp", lambda x: x.roll(1, -1)),
        ("dual_softmax_lse", lambda x: x * torch.nan),
        ("mutual_best", lambda x: x.roll(1, 1)),
        ("window_match", lambda x: x.flip(-1)),
    ],
)
def test_the_gate_refuses_to_time_a_wrong_kernel(
    op: str, fault: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_triton", lambda op, kind: faulty(op, fault))
    task = next(
        t for t in engine.suite_tasks("kernels", context(tmp_path)) if (t.group, t.measure) == (op, "forward")
    )
    case, runs = engine.run_task(task, "kernels", context(tmp_path), time.monotonic() + 60)
    rows = {row["name"]: row for row in case["rows"]}
    assert rows["triton"]["status"] == "refused"
    assert "allowed" in rows["triton"]["reason"]
    assert rows["triton"]["median_s"] is None
    assert "triton" not in runs
    assert rows["eager reference"]["status"] == "timed"


def test_the_gate_holds_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_the_gradient(x: torch.Tensor) -> torch.Tensor:
        return x / 2 + (x / 2).detach()

    monkeypatch.setattr(operators, "_triton", lambda op, kind: faulty(op, half_the_gradient))
    made = operators.contenders(QUICK["upsample_mlp", "forward+backward"], "forward+backward", "fp32", CPU)
    with pytest.raises(Disagreement, match=r"^output 1: error 0\.5"):  # output 0, the value, is right
        next(c for c in made if c.name == "triton").build(True)


def test_the_reason_against_triton_is_that_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def upsample_mlp(*arguments: object) -> None:
        raise RuntimeError('upsample_mlp: backend "triton" cannot be honoured: too many channels.')

    upsample_mlp.__module__ = "eloftr_kernels.upsample_mlp.op"
    monkeypatch.setattr(operators.eloftr_kernels, "upsample_mlp", upsample_mlp)
    monkeypatch.setattr(
        operators.eloftr_kernels, "backend", lambda name: contextlib.nullcontext(), raising=False
    )
    with pytest.raises(Unavailable, match="too many channels"):
        operators._triton("upsample_mlp", "cuda")()
    with pytest.raises(Unavailable, match="need a GPU"):
        operators._triton("upsample_mlp", "cpu")


def test_a_refusal_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_triton", lambda op, kind: faulty(op, torch.zeros_like))
    assert run.main(["kernels", "--device", "cpu", "--quick", "--only", "mlp"]) == 1


def test_the_matcher_gate_refuses_other_features_and_other_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matchers, "plain_model", lambda preset: tiny_model())
    name, where = "eloftr_ops small fp32", context(tmp_path)
    good = matchers.load(name, where)
    assert matchers.gate(name, good, (128, 160), where) == 1
    assert good.coarse is not None
    with pytest.raises(Disagreement, match="coarse features: relative error"):
        matchers.gate(name, good._replace(coarse=lambda a, b: 1.01 * good.coarse(a, b)), (128, 160), where)

    def shifted(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        found = good.match(a, b)
        return {**found, "keypoints1": found["keypoints1"] + 8}

    with pytest.raises(Disagreement, match=r"matches: 0\.0% are shared"):
        matchers.gate(name, good._replace(match=shifted), (128, 160), where)


def test_agreement_counts_both_ways_within_the_same_pair() -> None:
    def some(points: list[list[float]], batch: list[int]) -> dict[str, torch.Tensor]:
        keypoints = torch.tensor(points).reshape(-1, 2)
        confidence = torch.ones(len(points))
        names = {"keypoints0": keypoints, "keypoints1": keypoints + 1, "confidence": confidence}
        return {**names, "batch_indexes": torch.tensor(batch, dtype=torch.int64)}

    two = some([[0.0, 0.0], [20.0, 20.0]], [0, 0])
    assert matchers.agreement(two, two) == 1
    assert matchers.agreement(some([[3.0, 3.0]], [0]), two) == 0.5
    assert matchers.agreement(two, some([[3.0, 3.0]], [0])) == 0.5
    assert matchers.agreement(some([[0.0, 0.0], [20.0, 20.0]], [0, 1]), two) == 0.5
    assert matchers.agreement(some([], []), some([], [])) == 1
    assert matchers.agreement(some([], []), two) == 0


def test_graphs_of_the_dense_part_see_new_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def replaying(run: measure.Run) -> measure.Run:
        """What a CUDA graph does: computes from the first call's tensors into the first call's results."""
        result = run()

        def replay() -> Any:
            for old, new in zip(tensors_in(result), tensors_in(run()), strict=True):
                old.copy_(new)
            return result

        return replay

    monkeypatch.setattr(matchers, "graphed", replaying)
    monkeypatch.setattr(stages, "is_cpu_inference", lambda x: False)  # both images at once, as on a GPU
    plain = tiny_model().fused()
    replayed = tiny_model().fused()
    matchers._graph_dense_part(replayed)
    with torch.inference_mode():
        for seed in (0, 1, 2):
            pair = {
                "image0": random_images(1, 128, 160, seed),
                "image1": random_images(1, 128, 160, seed + 9),
            }
            expected, got = plain(pair), replayed(pair)
            assert len(expected["confidence"]) > 0
            assert all(torch.equal(got[key], expected[key]) for key in expected)


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, tuple) else []


def test_rounds_alternate_and_give_quartiles() -> None:
    order: list[str] = []
    ticks = iter((1.0, 2.0, 3.0, 4.0, 5.0))

    def first() -> Elapsed:
        order.append("first")
        return Elapsed(next(ticks))

    timings, _ = measure.rounds({"first": first, "second": lambda: order.append("second")}, 5, CPU)
    assert order == ["first", "second"] * 5
    assert timings["first"] == (3, 2, 4, 5)


def test_failures_and_spent_time_leave_a_reason(tmp_path: Path) -> None:
    def build(name: str) -> measure.Run:
        if name == "absent":
            raise Unavailable("it is not installed")
        raise RuntimeError("it broke\nin many lines")

    task = engine.suite_tasks("kernels", context(tmp_path))[0]
    task = task._replace(
        contenders=lambda: [Contender(name, lambda gated, n=name: build(n)) for name in ("absent", "broken")]
    )
    case, _ = engine.run_task(task, "kernels", context(tmp_path), time.monotonic() + 60)
    assert [(row["status"], row["reason"]) for row in case["rows"]] == [
        ("not run", "it is not installed"),
        ("failed", "RuntimeError: it broke"),
    ]
    case, _ = engine.run_task(task, "kernels", context(tmp_path), time.monotonic() - 1)
    assert {row["reason"] for row in case["rows"]} == {"the time that the run may take was spent"}


_PEAK = """
from pathlib import Path
import torch
from benchmarks import engine
from benchmarks.matchers import Context
from benchmarks.measure import Contender

task = engine.suite_tasks("kernels", Context(torch.device("cpu"), "fp32", Path("."), quick=True))[0]
big = Contender("big", lambda gated: lambda: torch.ones(2**24).max())
peak = engine.peak_of_one_run(task._replace(contenders=lambda: [big]), "big")
print("nan" if peak is None else peak)
"""


def test_peak_memory_of_a_run_is_its_own() -> None:
    """In a process of its own, as in a benchmark: what others freed in this one could be used again."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    peak = float(done.stdout)
    assert math.isnan(peak) or 0.9 * 2**26 < peak < 1.2 * 2**26


def test_work_is_counted_as_torch_counts_it() -> None:
    for op in ("aggregated_attention", "upsample_mlp", "dual_softmax_lse", "mutual_best"):
        case = QUICK[op, "forward"]
        arguments = problems.arguments_of(case, torch.float32, CPU)
        function = problems.operation(op, problems.REFERENCE)
        counted = measure.count_operations(lambda f=function, a=arguments: f(*a))  # type: ignore[misc]
        operations, moved = problems.forward_work(case, 4)
        assert operations == pytest.approx(counted, rel=0.05), op
        assert moved > 4 * arguments[0].numel()
