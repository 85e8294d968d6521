"""DistributedDataParallel: two processes by torchrun, with gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import distributed

from helpers import ddp_worker

WORKER = Path(ddp_worker.__file__)

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch has no gloo"
)


def torchrun(cases: str, folder: Path) -> list[dict]:
    """What each of two processes found, by case."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    source = str(WORKER.parents[2] / "src")
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, str(WORKER), cases, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    return torchrun("training,signs,transitions", tmp_path_factory.mktemp("ddp"))


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is not bit-equal."""
    assert set(a) == set(b)
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_ranks_are_identical_from_the_start_to_the_end(found):
    zero, one = (run["training"] for run in found)
    for moment in ("start", "wrapped", "end"):
        assert not different(zero[moment], one[moment]), moment
    assert zero["start mirrors"] == one["start mirrors"]
    assert zero["end mirrors"] == one["end mirrors"] == zero["start mirrors"]
    moved = different(zero["start"], zero["end"])
    assert {name for name in zero["start"] if name.endswith("quantizer.step")} <= set(moved)


def test_training_is_that_of_one_process(found):
    """Global batch 16: 8 + 8 in two processes, 16 in one.

    A sample's codes and sums do not depend on its batch, so only the order of additions differs.  A gradient in two
    orders differs by at most 2 (16 + 3 * 24) 2^-24 = 1e-5 of the size of its terms (16 samples; 24 terms a product, 3
    products deep), an update by as much of what it moves; 4 updates with momentum that feed each other: 1e-4 of the
    largest distance moved in the tensor, and one rounding of the parameter (2^-23) an update.  The terms of a step's
    gradient cancel: they are some ten times as large, in sum, as what moves it.
    """
    zero = found[0]["training"]
    model = ddp_worker.make()
    model.load_state_dict(zero["start"], strict=False)  # strict: the counter of the guard is not in a state dict
    assert not different(ddp_worker.state(model), zero["start"])
    optimizer = ddp_worker.optimizer_of(model)
    x, y = ddp_worker.data()
    for batch, labels in zip(x.split(ddp_worker.BATCH), y.split(ddp_worker.BATCH), strict=True):
        ddp_worker.update(model, optimizer, batch, labels)
    alone = ddp_worker.state(model)
    for name, end in zero["end"].items():
        if not end.is_floating_point():
            assert torch.equal(end, alone[name]), name
            continue
        moved = float((end - zero["start"][name]).abs().max())
        relative = 1e-3 if name.endswith("step") else 1e-4
        bound = relative * moved + ddp_worker.UPDATES * 2.0**-23 * float(end.abs().max())
        assert float((end - alone[name]).abs().max()) <= bound, name


def test_counters_that_are_not_saved_survive(found):
    for run in found:
        counts = run["training"]["guarded"]
        assert counts.pop("body.2.weight_quantizer") == 1
        assert set(counts.values()) == {0}


def test_two_forward_passes_before_one_backward_pass(found):
    assert all(run["training"]["twice"] for run in found)


def test_a_wrapped_model_is_refused_and_checked(found):
    for run in found:
        assert "prepare the model before it is wrapped in DistributedDataParallel" in run["training"]["prepare"]
        assert "calibrate the model before it is wrapped in DistributedDataParallel" in run["training"]["calibrate"]
        assert run["training"]["check"] == []


def test_synchronize_settles_signs_that_differ(found):
    zero, one = (run["signs"] for run in found)
    assert zero["alone"]["stem.input_quantizer"][:2] == (0, 255)
    assert one["alone"]["stem.input_quantizer"][:2] == (-128, 127)
    assert one["mirrors"] == zero["mirrors"] == zero["alone"]
    assert not different(zero["state"], one["state"])
    assert torch.equal(zero["output"], one["output"])


@pytest.mark.slow
@pytest.mark.parametrize("case, needs", [("trainer", ["transformers", "accelerate"]), ("lightning", ["lightning"])])
def test_frameworks_over_two_processes(case, needs, tmp_path):
    """Only process 0 calibrated: the callback reads back what DDP copied to process 1."""
    if any(find_spec(name) is None for name in needs):
        pytest.skip(f"needs {', '.join(needs)}")
    zero, one = (run[case] for run in torchrun(case, tmp_path))
    assert not different(zero["end"], one["end"])
    assert zero["end mirrors"] == one["end mirrors"]
    assert zero["moved"]
    assert zero["rows"] >= 3  # process 0 writes facts
    assert one["rows"] is None


def test_transition_rates_are_equal_in_both_processes(found):
    zero, one = (run["transitions"] for run in found)
    assert zero["control"] == one["control"]
    assert not different(zero["end"], one["end"])
    rows = zero["control"]["trace"]
    assert len(rows) == zero["control"]["done"] == 4
    assert all(rate > 0 for _, rate, _, _ in rows)
    assert len({lr for *_, lr in rows}) == 4
