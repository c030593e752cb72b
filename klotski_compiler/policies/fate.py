"""fate: the next layer's router on this layer's router input says what to prefetch; shallow layers are cached first.

Fate (arXiv 2502.12224, section 4). While a layer's experts compute, those that the next layer will want are on their way: the next
router's answer to this layer's input, over-fetched until it covers nearly all of what is really asked for. What was missed is sent
on demand. The cache is given to the first layers, whose routing is hardest to predict.

    link    | missed l | attn l+1, predicted l+1 ............ | missed l+1
    compute | resident, predicted l | missed l | attn l+1 router l+1 | resident, predicted l+1 ..

Approximations: the predictor is the routing profile's table from layer to layer; the percentile of its over-fetch is not published,
so as many experts are fetched as are expected to be asked for; INT4 and INT2 copies are left out (they change tokens).
"""

from functools import partial

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision
from klotski_compiler.policies import Policy
from klotski_compiler.program import Program


def build(p: Program) -> None:
    """attention | router | what was missed, then what the next layer will want | experts."""
    p.embed()
    prefetch(p, 0)
    for layer in p.layers:
        p.attend_and_route(layer)
        hot, missed = p.picks(layer)[: p.decision.hot], p.picks(layer)[p.decision.hot :]
        p.bind(layer, "rank", len(hot), len(missed))
        p.stream(layer, missed, ready=[*p.resident_experts(layer), *hot], then=partial(prefetch, p, layer + 1))
    p.logits()


def prefetch(p: Program, layer: int) -> None:
    """Attention, router and the predicted experts of a layer."""
    if layer in p.layers:
        hot = p.picks(layer)[: p.decision.hot]
        p.bind(layer, "predicted", 0, len(hot))
        p.load(*p.attention_weights(layer), *p.router_weights(layer), *hot)


def decide(cost: Cost, decision: Decision) -> Decision:
    """Prefetch as many experts of a layer as a decode pass is expected to ask for."""
    asked, tokens = list[float](), decision.sequences
    for number, chosen in enumerate(decision.layers):
        touched = cost.experts(number, tokens)
        asked.append(sum(touched[e][1] for e in chosen.late))
    return decision.model_copy(update={"hot": max(decision.hot, round(max(asked)))})


POLICY = Policy(build=build, experts="picks", one_batch=True, first_layers=True, decide=decide)
