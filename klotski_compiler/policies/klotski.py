"""klotski: K hot experts are prefetched during attention; the others are sent when the router asks; hot ones compute first.

Klotski (ASPLOS '25, arXiv 2502.06888, sections 4-5). All batches pass attention, then the router; every expert that a batch asks
for first is sent at once; then each expert computes once over the tokens of all batches and is evicted.

    link    | router, K hot | (router says) cold, cold, cold ... | attn l+1 | router, K hot
    compute | attn b0 .. bn | router b0 .. bn | hot hot | cold cold cold ... | attn b0 ..

Approximations: one lane per link where the paper has a stream for prefetch and one for on-demand loads (its planner models one
lane, too); the predictor's table is the routing profile's and is not updated online; a request that is not nearly sure to have come
by a batch is sent with the last one.
"""

from klotski_compiler.ops import ALL
from klotski_compiler.policies import Policy
from klotski_compiler.program import Program


def build(p: Program) -> None:
    """attention of all batches | router, on-demand loads | experts, hot first."""
    p.embed()
    for layer in p.layers:
        if layer == 0:
            p.load(*p.attention_weights(0))
        hot = p.picks(layer)[: p.decision.hot]
        cold = p.picks(layer)[p.decision.hot :]
        p.load(*p.router_weights(layer))
        p.bind(layer, "predicted", 0, len(hot))
        p.load(*hot)
        for _ in p.attend(layer):
            pass
        p.evict(*p.attention_weights(layer))
        waiting = on_demand(p, layer, cold)
        p.evict(*p.router_weights(layer))
        if not p.is_last(layer):
            p.load(*p.attention_weights(layer + 1))
        p.experts(layer, p.resident_experts(layer))
        streamed = [*hot, *cold]
        for number in range(0, len(streamed), p.decision.unit):
            unit = streamed[number : number + p.decision.unit]
            p.experts(layer, unit)
            p.evict(*unit)
            p.load(*waiting[: len(unit)])
            waiting = waiting[len(unit) :]
    p.logits()


def on_demand(p: Program, layer: int, cold: list[int]) -> list[int]:
    """The router batch by batch; sends what has been asked for as far as slots allow and returns what must still wait."""
    room, sent, bound = max(0, p.lead - p.decision.hot), 0, 0
    for batch in p.batches:
        p.route(layer, batch)
        last = batch == p.batches[-1]
        asked = (
            len(cold) if last else max(bound, min(p.expected_arrivals(layer, batch + 1) - p.decision.hot, len(cold)))
        )
        if not p.is_moe(layer) or asked <= bound:
            continue
        p.bind(layer, "arrival", p.decision.hot + bound, asked - bound, ALL if last else batch)
        bound = asked
        if (end := min(bound, room)) > sent:
            p.load(*cold[sent:end])
            sent = end
    return cold[sent:]


POLICY = Policy(build=build, experts="picks")
