"""waits: the cross-stream waits that remain after transitive reduction, by one vector clock over the FIFO streams.

O(ops x streams). An op knows, for every stream, the last op that has surely ended before it starts; an edge into what is known is
dropped. Edges are visited latest first, so none that is kept is implied by another that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from klotski_compiler.ops import Wait
from klotski_compiler.passes.depend import Edges
from klotski_compiler.passes.slots import Placed


def waits(ops: Sequence[Placed], edges: Edges) -> list[tuple[Wait, ...]]:
    """The waits of every op. The first pass and the later ones may differ; an op keeps the union, which is right for both."""
    streams = {name: place for place, name in enumerate(dict.fromkeys(placed.op.stream for placed in ops))}
    lane = [streams[placed.op.stream] for placed in ops]
    last: list[list[int]] = [[-1] * len(streams) for _ in streams]
    clocks: list[list[int]] = []
    kept: list[set[Wait]] = [set() for _ in ops]
    for now, ((copy, number), before) in enumerate(zip(*edges, strict=True)):
        own = lane[number]
        clock = list(last[own])
        for earlier in reversed(before):
            passed, other = edges.order[earlier]
            stream = lane[other]
            if clock[stream] >= earlier:
                continue
            clock = list(map(max, clock, clocks[earlier]))
            if stream != own:
                kept[number].add(Wait(other, copy - passed))
        clock[own] = now
        last[own] = clock
        clocks.append(clock)
    return [tuple(sorted(w)) for w in kept]
