"""joint's queue of loads: what comes from disk neither keeps the link waiting nor the disk idle."""

from __future__ import annotations

import pytest

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.ops import Load
from klotski_compiler.pipeline import Lowered, lower
from klotski_compiler.program import staging_slots
from klotski_compiler.routing import uniform
from klotski_compiler.simulate import SIMULATED_PASSES
from plans import tiny_decision, tiny_hardware, tiny_spec

WORKLOAD = Workload(prompt_len=4, gen_len=16, num_sequences=4)


def streamed(late: int, far: int, unit: int = 1, slow_disk: float = 2e7) -> tuple[Decision, Lowered]:
    """Twelve experts a layer, none resident: the first ``far`` on a slow disk, the last ``late`` bound after the router."""
    spec, hardware = tiny_spec(layers=6, experts=12), tiny_hardware(True)
    disk = hardware.links["disk>host"].model_copy(update={"bandwidth_bytes_per_s": slow_disk})
    hardware = hardware.model_copy(update={"links": {**hardware.links, "disk>host": disk}})
    layers = [
        LayerDecision(
            resident=("attention", "router", "shared"),
            static=tuple(range(12 - late)),
            late=tuple(range(12 - late, 12)),
            on_disk=tuple(range(far)),
            kv="gpu",
        )
        for _ in spec.layers
    ]
    layers[0] = LayerDecision(resident=("attention", "dense"), kv="gpu")
    base = tiny_decision("joint", spec, "gpu", 1, 4)
    changes = {"layers": tuple(layers), "lead": 6, "unit": unit, "head_pages": 0}
    decision = base.model_copy(update=changes)
    return decision, lower(Cost(spec, hardware, uniform(spec), "bf16"), "joint", decision, WORKLOAD)


@pytest.mark.parametrize("late", [4, 6])
def test_late_experts_do_not_wait_behind_what_the_disk_has_not_brought(late: int) -> None:
    """Disk and link about as busy: a pass takes what the busier one does. Were everything sent in order of need, it would take a quarter
    more."""
    _, lowered = streamed(late, far=4, slow_disk=3e8)
    decode = lowered.phases["decode"]
    assert decode.times.pass_us < 1.02 * max(decode.times.busy_us.values()) / decode.shape.passes


def test_the_disk_does_not_wait_for_the_link() -> None:
    """A read begins as soon as the one before it has ended, and a staging slot is free."""
    decision, lowered = streamed(late=0, far=4)
    loads = [(s, s.op) for s in lowered.phases["decode"].steps if isinstance(s.op, Load)]
    reads = [(step, op) for step, op in loads if op.link == "disk>host"]
    sent = {tensor: step.end_us for step, op in loads if op.link == "host>gpu" for tensor in op.tensors}
    staging = staging_slots(decision)
    assert len(reads) == 20 and staging == 2
    for number in range(staging, len(reads)):
        (step, _), (before, _), (_, left) = reads[number], reads[number - 1], reads[number - staging]
        assert step.start_us <= max(before.end_us, *(sent[t] for t in left.tensors)) + 1


def test_what_travels_together_comes_from_one_tier() -> None:
    """Units of two: experts from disk with their like, near ones with theirs, so that no unit is cut in two."""
    _, lowered = streamed(late=0, far=4, unit=2)
    homes = {t.id: t.home for t in lowered.tensors}
    loads = [s.op for s in lowered.phases["decode"].steps if isinstance(s.op, Load) and s.op.link == "host>gpu"]
    experts = [op for op in loads if lowered.tensors[op.tensors[0]].kind == "expert"]
    assert len(experts) == 5 * 6 and all(len(op.tensors) == 2 for op in experts)
    assert all(len({homes[t] for t in op.tensors}) == 1 for op in experts)


def test_a_pass_settles_with_what_it_loads_for_the_next() -> None:
    """Experts from disk open the next pass as well: its first layer does not begin with an idle link."""
    _, lowered = streamed(late=0, far=2)
    wraps = [s.op for s in lowered.phases["decode"].steps if isinstance(s.op, Load) and s.op.wraps]
    assert lowered.phases["decode"].shape.passes > SIMULATED_PASSES
    assert {op.link for op in wraps} <= {"disk>host", "host>gpu"}
