# SPDX-License-Identifier: Apache-2.0
"""Benchmarks end to end at tiny sizes, and gates that must refuse what is wrong."""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, gates, kernels, matchers, measure, ops, record, run, stages
from benchmarks.measure import Benchmark, Context, Disagreement, Elapsed, Entry, Unavailable
from eloftr_ops import EfficientLoFTRConfig
from eloftr_ops.inference.cpu import winograd
from support.models import tiny_model

CPU = torch.device("cpu")
QUICK = {(case.op, mode): case for case in reversed(cases.QUICK_KERNELS) for mode in case.modes}


def context(folder: Path) -> Context:
    return Context(CPU, "fp32", folder, quick=True)


def rows_of(suite: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Every row of the only record in ``folder``, by case, measure and name."""
    (path,) = folder.glob(f"{suite}--*.json")
    made = record.read(path)
    assert made["quick"]
    return {f"{case['name']}, {case['measure']}: {row['name']}": row for case in made["cases"] for row in case["rows"]}


def test_kernels_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: entry for name, entry in kernels.ENTRIES.items() if name != "triton"}  # slow to interpret
    monkeypatch.setattr(kernels, "ENTRIES", some)
    assert run.main(["kernels", "--device", "cpu", "--quick", "--json", "--output", str(tmp_path)]) == 0
    rows = rows_of("kernels", tmp_path)
    eager = [row for name, row in rows.items() if name.endswith(": eager reference")]
    assert len(eager) == sum(len(case.modes) for case in cases.QUICK_KERNELS)
    assert all(row["status"] == "timed" and row["limit_fraction"] > 0 for row in eager)
    assert all(row["reason"] for name, row in rows.items() if "torch.compile" in name)


def test_quick_runs_on_a_cpu_hold_triton_in_its_interpreter(tmp_path: Path) -> None:
    chosen = ["--only", "dual_softmax_lse small batch 1, 35 cells, masked, uneven, forward"]
    quick = ["kernels", "--device", "cpu", "--quick", "--json", "--output", str(tmp_path), *chosen]
    assert run.main(quick) == 0
    triton = [row for name, row in rows_of("kernels", tmp_path).items() if name.endswith(": triton")]
    assert len(triton) == 2  # forward, and with the backward pass
    assert {row["reason"] for row in triton} == {kernels.INTERPRETED}


def test_matcher_quickly(tmp_path: Path) -> None:
    assert run.main(["matcher", "--device", "cpu", "--quick", "--json", "--output", str(tmp_path)]) == 0
    rows = {name.split(": ")[-1]: row for name, row in rows_of("matcher", tmp_path).items()}
    for name in ("eloftr_ops full", "transformers", "kornia LoFTR"):
        assert rows[name]["status"] == "timed", name
        assert rows[name]["matches"] > 0
        assert rows[name]["operations"] > 1e8
    assert rows["eloftr_ops full"]["matches"] == rows["transformers"]["matches"]  # the same weights
    assert rows["eloftr_ops small, CUDA graph"]["reason"] == "CUDA graphs need a GPU"


def test_cpu_quickly(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = cases.QUICK_CPU
    entries = tuple(name for name in first.entries if name != cases.EXPORTED)  # see tests/inference/test_export.py
    monkeypatch.setattr(cases, "QUICK_CPU", (first._replace(entries=entries), *others))
    quick = ["cpu", "--device", "cpu", "--quick", "--profile", "--json", "--output", str(tmp_path)]
    assert run.main(quick) == 0
    rows = rows_of("cpu", tmp_path)
    assert all(row["status"] == "timed" for row in rows.values())
    parts = [rows[f"stages at 128x96, whole: eloftr_ops small fp32: {stage}"] for stage in stages.STAGES]
    whole = rows["stages at 128x96, whole: eloftr_ops small fp32"]
    assert all(row["median_s"] > 0 for row in parts)
    assert sum(row["median_s"] for row in parts) <= whole["median_s"]
    printed = capsys.readouterr().out
    assert "eloftr_ops small fp32, by stage:\n  backbone" in printed
    assert ", arithmetic alone " in printed


def test_operations_of_the_stages_are_those_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolved by definition, the run computes a few percent more where pieces overlap, and its windows."""
    matcher_ = matchers.load("eloftr_ops small fp32", context(tmp_path))
    pair = matchers.images((256, 320), 1, torch.device("cpu"))
    counted = stages.stage_operations("small", (256, 320))
    assert set(counted) == set(stages.STAGES[:-1])
    saving = measure.count_operations(lambda: matcher_.match(*pair))
    monkeypatch.setattr(winograd, "LEAST_TILES", 1 << 30)
    executed = measure.count_operations(lambda: matcher_.match(*pair))
    assert 0.95 * executed < sum(counted.values()) < executed
    assert saving < 0.8 * executed


def test_widths_are_those_of_the_presets() -> None:
    for name, widths in ops.PRESETS.items():
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
    (made,) = run.SUITES["matcher"](context(tmp_path))
    case, runs = measure.run_benchmark(made, "matcher", context(tmp_path), time.monotonic() + 60)
    reasons = {row["name"]: row["reason"] for row in case["rows"] if row["status"] == "not run"}
    assert reasons["transformers"] == reasons["kornia LoFTR"] == "kornia is not installed"
    assert set(runs) == {"3x3 convolution fp32", "3x3 convolution bf16"}


def faulty(op: str, fault: Callable[[torch.Tensor], torch.Tensor]) -> ops.Function:
    good = ops.implementation(op, "reference")
    return lambda **arguments: tuple(fault(output) for output in good(**arguments))


def contend(monkeypatch: pytest.MonkeyPatch, function: ops.Function) -> None:
    """``function`` runs beside the reference, alone."""
    alone = {kernels.EAGER: kernels.ENTRIES[kernels.EAGER]}
    alone["faulty"] = kernels.OpEntry("tests", lambda case, device: function)
    monkeypatch.setattr(kernels, "ENTRIES", alone)


def measured(made: Benchmark, suite: str, folder: Path) -> tuple[dict[str, Any], dict[str, measure.Run]]:
    return measure.run_benchmark(made, suite, context(folder), time.monotonic() + 60)


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
    contend(monkeypatch, faulty(op, fault))
    made = [b for b in run.SUITES["kernels"](context(tmp_path)) if (b.group, b.mode) == (op, "forward")]
    assert len(made) == 2  # sizes that fill the tiles, and others
    for benchmark in made:
        case, runs = measured(benchmark, "kernels", tmp_path)
        rows = {row["name"]: row for row in case["rows"]}
        assert rows["faulty"]["status"] == "refused"
        assert "allowed" in rows["faulty"]["reason"]
        assert rows["faulty"]["median_s"] is None
        assert "faulty" not in runs
        assert rows["eager reference"]["status"] == "timed"


def lose(index: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Zeros where a kernel forgot to write."""

    def fault(x: torch.Tensor) -> torch.Tensor:
        lost = x.clone()
        lost[index] = 0
        return lost

    return fault


@pytest.mark.parametrize(
    ("op", "dtype", "batch", "index"),
    [
        ("dual_softmax_lse", "bf16", 1, (..., slice(-10, None))),
        ("upsample_mlp", "fp16", 8, (-1, ..., -1, slice(-3, None))),
    ],
)
def test_the_gate_refuses_a_kernel_that_loses_a_few_of_many_rows(
    op: str, dtype: str, batch: int, index: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 of 4,800 cells, and 3 of 38,400 positions: too few to show in the norm of all."""
    fault = lose(index)
    contend(monkeypatch, faulty(op, fault))
    case = ops.KernelCase(op, "small", batch)
    reference, entry = kernels.entries(case, "forward", Context(CPU, dtype, tmp_path))
    reference.build(True)
    with pytest.raises(Disagreement, match=r"error of the worst row \S+, allowed 0\."):
        entry.build(True)
    truth = ops.implementation(op, "reference")(**ops.arguments_of(case, torch.float32, CPU))
    bound = gates.ERROR[measure.DTYPES[dtype]]
    assert all((fault(x) - x).norm() < bound * x.norm() for x in truth)


def test_the_gate_counts_elements_that_are_far_off() -> None:
    def error(far: int, eager: int) -> dict[str, gates.Error]:
        return {"y": gates.Error(1e-3, 1e-3, far, 10**6)}

    gates.hold_errors(error(10, 0), error(0, 0), 1e-2)
    gates.hold_errors(error(14, 0), error(2, 0), 1e-2)
    with pytest.raises(Disagreement, match="y: 15 elements of 1000000 are far off, allowed 14"):
        gates.hold_errors(error(15, 0), error(2, 0), 1e-2)


def test_the_gate_holds_gradients_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def half_the_gradient(x: torch.Tensor) -> torch.Tensor:
        return x / 2 + (x / 2).detach()

    contend(monkeypatch, faulty("upsample_mlp", half_the_gradient))
    case = QUICK["upsample_mlp", "forward+backward"]
    _, entry = kernels.entries(case, "forward+backward", context(tmp_path))
    with pytest.raises(Disagreement, match=r"^gradient of x: error 0\.5"):  # the value is right
        entry.build(True)


def test_gradients_are_those_of_the_arguments_named(tmp_path: Path) -> None:
    """Every tensor of floating-point numbers is differentiated, but for those that the ops take as constants."""
    constants = {"rotary", "row_lse", "col_lse"}
    for name, op in ops.OPS.items():
        arguments = ops.arguments_of(QUICK[name, "forward"], torch.float32, CPU)
        floats = {key for key, value in arguments.items() if ops.is_float(value)}
        expected = set() if ops.BACKWARD not in op.modes and not op.windows else floats - constants
        assert set(op.differentiable) == expected, name


def test_outputs_have_the_names_of_the_registry() -> None:
    for name, op in ops.OPS.items():
        outputs = ops.implementation(name, "reference")(**ops.arguments_of(QUICK[name, "forward"], torch.float32, CPU))
        assert len(outputs) == len(op.outputs), name


def test_the_reason_against_triton_is_that_of_the_op(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def upsample_mlp(**arguments: object) -> None:
        raise RuntimeError('upsample_mlp: backend "triton" cannot be honoured: too many channels.')

    monkeypatch.setitem(ops.OPS, "upsample_mlp", ops.OPS["upsample_mlp"]._replace(public=upsample_mlp))
    case = QUICK["upsample_mlp", "forward"]
    with pytest.raises(Unavailable, match="too many channels"):
        kernels._triton(case, torch.device("cuda"))()
    entry = next(e for e in kernels.entries(case, "forward", Context(CPU, "fp32", tmp_path)) if e.name == "triton")
    with pytest.raises(Unavailable, match="need a GPU"):
        entry.build(True)


def test_a_refusal_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    contend(monkeypatch, faulty("upsample_mlp", torch.zeros_like))
    assert run.main(["kernels", "--device", "cpu", "--quick", "--only", "mlp"]) == 1


STRANGER = """
import torch
from eloftr_kernels import MlpWeights, upsample_mlp

def ours(x, message, expand_weight, contract_weight, norm_weight, norm_bias, mask=None):
    weights = MlpWeights(
        expand=expand_weight, contract=contract_weight, norm=norm_weight, norm_bias=norm_bias
    )
    return upsample_mlp(x, message, weights, mask=mask)

def good(**arguments):
    return 1 * ours(**arguments)

def wrong(**arguments):
    return 1.1 * ours(**arguments)

def detached(**arguments):
    return ours(**arguments).detach()
"""


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [("good", 0, "timed"), ("wrong", 1, "allowed 0.0001"), ("detached", 0, "its outputs have no gradient")],
)
def test_a_kernel_from_outside_runs_beside_ours(
    function: str, status: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange_kernels.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kernels, "ENTRIES", {kernels.EAGER: kernels.ENTRIES[kernels.EAGER]})
    chosen = ["--op", "upsample_mlp", "--contender", f"mine=strange_kernels:{function}"]
    quick = ["kernels", "--device", "cpu", "--quick", "--json", "--output", str(tmp_path), *chosen]
    assert run.main(quick) == status
    rows = rows_of("kernels", tmp_path)
    mine = [row for name, row in rows.items() if name.endswith("forward+backward: mine")]
    assert len(mine) == 2
    assert len(rows) == 8  # the op alone: two sizes, two modes, two contenders
    assert all(reason in (row["reason"] or row["status"]) for row in mine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing like it"], "--only 'nothing like it': expected part of a case's name, got none"),
        (["--contender", "mine=math:sqrt"], "--contender: expected --op too"),
        (["--op", "upsample_mlp", "--contender", "mine"], "expected name=module:function, got 'mine'"),
        (["--op", "upsample_mlp", "--contender", "mine=math:no"], "cannot load math:no"),
        (["--op", "upsample_mlp", "--contender", "triton=math:sqrt"], "expected a new name, got 'triton'"),
    ],
)
def test_options_that_fit_nothing_are_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(["kernels", "--device", "cpu", "--quick", *arguments])
    assert message in capsys.readouterr().err


def test_the_plain_model_stays_on_the_cpu_when_another_device_is_used(tmp_path: Path) -> None:
    """As a run on a GPU does, with a device that has no data in its place."""
    before = dict(stages.stage_operations("small", (96, 128)))
    stages.stage_operations.cache_clear()
    matcher = matchers.load("eloftr_ops small fp32", context(tmp_path))
    elsewhere = context(tmp_path)._replace(device=torch.device("meta"))
    with pytest.raises(RuntimeError, match="meta"):  # the gate reads an error, of which there is none
        matchers.gate("eloftr_ops small fp32", matcher._replace(coarse=lambda a, b: a), (96, 128), elsewhere)
    assert stages.plain_model("small").device == CPU
    assert stages.plain_model("small", torch.device("meta")).device.type == "meta"
    assert stages.stage_operations("small", (96, 128)) == before


def test_the_matcher_gate_refuses_other_features_and_other_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matchers, "plain_model", lambda preset, device: tiny_model())
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
    assert gates.agreement(two, two) == 1
    assert gates.agreement(some([[3.0, 3.0]], [0]), two) == 0.5
    assert gates.agreement(two, some([[3.0, 3.0]], [0])) == 0.5
    assert gates.agreement(some([[0.0, 0.0], [20.0, 20.0]], [0, 1]), two) == 0.5
    assert gates.agreement(some([], []), some([], [])) == 1
    assert gates.agreement(some([], []), two) == 0


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

    made = run.SUITES["kernels"](context(tmp_path))[0]
    made = made._replace(entries=lambda: [Entry(name, lambda gated, n=name: build(n)) for name in ("absent", "broken")])
    case, _ = measured(made, "kernels", tmp_path)
    assert [(row["status"], row["reason"]) for row in case["rows"]] == [
        ("not run", "it is not installed"),
        ("failed", "RuntimeError: it broke"),
    ]
    case, _ = measure.run_benchmark(made, "kernels", context(tmp_path), time.monotonic() - 1)
    assert {row["reason"] for row in case["rows"]} == {"the time that the run may take was spent"}


_PEAK = """
from pathlib import Path
import torch
from benchmarks import kernels
from benchmarks.measure import Context, Entry, peak_of_one_run

made = kernels.benchmarks(Context(torch.device("cpu"), "fp32", Path("."), quick=True))[0]
big = Entry("big", lambda gated: lambda: torch.ones(2**24).max())
peak = peak_of_one_run(made._replace(entries=lambda: [big]), "big")
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
    for name in ("aggregated_attention", "upsample_mlp", "dual_softmax_lse", "mutual_best"):
        case = QUICK[name, "forward"]
        arguments = ops.arguments_of(case, torch.float32, CPU)
        function = ops.implementation(name, "reference")
        counted = measure.count_operations(lambda f=function, a=arguments: f(**a))  # type: ignore[misc]
        work = ops.OPS[name].work(case, 4)
        assert work.operations == pytest.approx(counted, rel=0.05), name
        assert work.bytes > 4 * sum(value.numel() for value in arguments.values() if ops.is_float(value)) / 2
