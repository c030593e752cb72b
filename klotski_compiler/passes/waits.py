"""waits: the cross-stream waits that remain after transitive reduction, by one vector clock over the FIFO streams.

O(ops x streams). An op knows, for every stream, the last op that has surely ended before it starts; an edge into what is known is
dropped. Edges are visited latest first, so none that is kept is implied by another that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from klotski_compiler.passes.depend import Instance
from klotski_compiler.passes.slots import Placed
from klotski_compiler.plan import Wait


def waits(ops: Sequence[Placed], edges: dict[Instance, list[Instance]]) -> list[tuple[Wait, ...]]:
    """The waits of every op. The first pass and the later ones may differ; an op keeps the union, which is right for both."""
    names = sorted({placed.op.stream for placed in ops})
    lane = [names.index(placed.op.stream) for placed in ops]
    order = {instance: position for position, instance in enumerate(edges)}
    clocks: dict[Instance, list[int]] = {}
    last: list[list[int]] = [[-1] * len(names) for _ in names]
    kept: list[set[Wait]] = [set() for _ in ops]
    for instance, before in edges.items():
        copy, number = instance
        own = lane[number]
        clock = list(last[own])
        for earlier in reversed(before):
            stream = lane[earlier[1]]
            if clock[stream] >= order[earlier]:
                continue
            for index, seen in enumerate(clocks[earlier]):
                if seen > clock[index]:
                    clock[index] = seen
            if stream != own:
                kept[number].add(Wait(earlier[1], copy - earlier[0]))
        clock[own] = order[instance]
        clocks[instance] = last[own] = clock
    return [tuple(sorted(w)) for w in kept]
