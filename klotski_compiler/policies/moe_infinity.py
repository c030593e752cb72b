"""moe_infinity: experts that sequences like this one activated before are prefetched, nearest layer first; demand goes before.

MoE-Infinity (arXiv 2401.14361, sections 4-5). A sequence's counts of activated experts are matched against kept ones; what those
activated in the layers to come is prefetched in order of nearness and score, and protects its place in the cache, from which the
least used expert goes. What the router asks for and is not there goes first.

    link    | asked for l | attn l+1, likely l+1 ......... | asked for l+1
    compute | resident, likely l | asked for l | attn l+1 router l+1 | ...

Approximations: the match is the routing profile's table from layer to layer, one layer ahead; the cache holds the experts most
popular on the whole, which is where least-used eviction settles; as many experts are prefetched as a token chooses.
"""

from klotski_compiler.policies import Policy
from klotski_compiler.policies.fate import build

POLICY = Policy(build=build, experts="picks", one_batch=True)
