"""What is asked for and what is decided: the numbers that a policy needs, and which follow from them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from klotski_compiler.ops import Pages


class Record(BaseModel):
    """What ``plan.json`` holds, field by field."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Workload(Record):
    """What the plan is for: ``num_sequences`` prompts of ``prompt_len`` tokens (the longest), ``gen_len`` new tokens each."""

    prompt_len: int
    gen_len: int
    num_sequences: int


class LayerDecision(Record):
    """One layer: its resident modules and experts, the experts streamed by name (in compute order), the late ones, KV tier.

    ``cpu``: experts that the CPU computes in decode where they live (in prefill they stream, as static ones do); ``cpu_picks``:
    how many of the late ones, those picked last, it computes likewise. ``resident`` names modules among attention, router, shared,
    dense; ``late`` the experts that the layer's picks range over, most popular first (as many picks as there are); ``on_disk``
    the experts whose home is the disk, or whose last page's is, although the machine has host memory between disk and compute
    tier. Every expert
    is in exactly one of ``resident_experts``, ``static``, ``late`` and ``cpu``. ``kv``: where keys and values live, but for those of
    the first ``kv_batches`` batches of each of prefill's sub-groups (which all run the same ops), which live in the compute tier.
    ``cpu_batches``: as in the decision, where this layer differs.
    """

    resident: tuple[str, ...] = ()
    resident_experts: tuple[int, ...] = ()
    static: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    cpu: tuple[int, ...] = ()
    cpu_picks: int = 0
    on_disk: tuple[int, ...] = ()
    kv: str = ""
    kv_batches: int = 0
    cpu_batches: int | None = None


class Decision(Record):
    """The numbers that a policy needs.

    *Batches.* batch_size: sequences of a batch; last_batch: of the last one of each of prefill's sub-groups, where it is the CPU's own
    and of another size. prefill_groups: sub-groups that prefill runs in, each re-reading the weights. rolling: whether they join one
    after another, at equal distances over the life of a sequence, each in a pass in which the others decode, rather than all before the
    first decode pass. attention_batch, decode_batch: sequences whose attention runs at once in prefill and in decode. expert_rows:
    tokens per matmul of an expert, router or dense MLP at most. together: whether what surrounds decode attention is one op for several
    batches, which takes a GPU fewer calls; in between it attends to one after the other.

    *Weights.* lead: experts that may be in flight or waiting (slots) at once; prefill_lead: the same in a pass with prompts, whose
    hidden states take the memory (0: as many). unit: experts per load. pages: that an expert is cut into; if there are several, of an
    expert on disk only the last one lives there, the others in host memory. hot: experts per layer that are prefetched before the
    router speaks. head_pages: loads of the head (0: resident). embedding: whether its rows are resident where the CPU computes; a GPU
    reads them from host memory.

    *KV.* kv_ahead: batches whose KV, where a link brings it, may be on its way or wait for attention. cpu_batches: batches, the last
    ones, in rolling order as many of each age, whose decode attention the CPU computes where the KV lives. by_batch: whether decode
    computes experts batch by batch, those of one while the CPU attends to the next.
    """

    num_batches: int
    batch_size: int
    last_batch: int = 0
    lead: int
    prefill_lead: int = 0
    unit: int
    head_pages: int
    prefill_groups: int
    attention_batch: int
    decode_batch: int
    expert_rows: int
    cpu_batches: int = 0
    kv_ahead: int = 2
    together: bool = False
    by_batch: bool = False
    hot: int
    embedding: bool
    rolling: bool = False
    pages: int = 1
    layers: tuple[LayerDecision, ...]

    def lead_of(self, decoding: bool) -> int:
        """Expert slots in a pass."""
        return self.lead if decoding else min(self.lead, self.prefill_lead or self.lead)

    @property
    def head_parts(self) -> int:
        """Pages of the head: one where it is resident."""
        return max(1, self.head_pages)

    @property
    def near(self) -> Pages | None:
        """Of an expert on disk, what lives in host memory nonetheless."""
        return Pages(0, self.pages - 1, self.pages) if self.pages > 1 else None

    @property
    def far(self) -> Pages | None:
        """Of an expert on disk, the pages that live there; None: all of it."""
        return Pages(self.pages - 1, self.pages, self.pages) if self.pages > 1 else None

    def stride(self, gen_len: int) -> int:
        """Passes from one sub-group's joining to the next one's, in rolling order; a sequence lives for ``gen_len`` of them."""
        return -(-gen_len // self.prefill_groups)

    def rounds(self, num_sequences: int) -> int:
        """How often prefill and decode follow one another in a workload: once per group or, in rolling order, once per sub-group
        that joins, and then until the last one is done."""
        if not self.rolling:
            return -(-num_sequences // self.sequences)
        return self.cohorts(num_sequences) + self.prefill_groups - 1

    def cohorts(self, num_sequences: int) -> int:
        """Sub-groups of prefill that a workload takes."""
        return -(-num_sequences // sum(map(self.size_of, range(self.part_batches))))

    def place(self, batch: int, round_: int) -> int:
        """The batch in whose place, in memory or on disk, the KV of a batch is in a round. In rolling order what is a sub-group's in
        one round is the next older one's in the next, and the oldest one's place the newcomer's (as in a file of rotating
        registers)."""
        if not self.rolling:
            return batch
        age, number = divmod(batch, self.part_batches)
        return (round_ - age) % self.prefill_groups * self.part_batches + number

    @property
    def part_batches(self) -> int:
        """Batches of one of prefill's sub-groups, the last of which may have fewer."""
        return -(-self.num_batches // self.prefill_groups)

    def away(self, layer: int) -> list[int]:
        """Batches whose keys and values live where ``kv`` says."""
        kept = self.layers[layer].kv_batches
        return [batch for batch in range(self.num_batches) if batch % self.part_batches >= kept]

    def attended(self, layer: int) -> list[int]:
        """Batches whose decode attention the CPU computes in a layer: the last ones of those in host memory; in rolling order of each
        sub-group's, which are of one age, so that a share of them is one of the work, too."""
        chosen = self.layers[layer]
        share = self.cpu_batches if chosen.cpu_batches is None else chosen.cpu_batches
        away = self.away(layer) if chosen.kv == "host" and share else []
        if self.rolling:
            first = self.part_batches - share // self.prefill_groups
            return [batch for batch in away if batch % self.part_batches >= first]
        return away[max(0, len(away) - share) :]

    def sends_kv(self, compute_tier: str) -> bool:
        """Whether in any layer a link brings the KV of a batch that decodes."""
        layers = (layer for layer, chosen in enumerate(self.layers) if chosen.kv != compute_tier)
        return any(len(self.away(layer)) > len(self.attended(layer)) for layer in layers)

    @property
    def sequences(self) -> int:
        """Sequences of one batch group."""
        lasts = self.num_batches // self.part_batches if self.last_batch else 0
        return self.num_batches * self.batch_size + lasts * (self.last_batch - self.batch_size)

    @property
    def batches(self) -> str:
        """``8 x 32``, or ``7 x 31 + 1 x 40``."""
        lasts = self.prefill_groups if self.last_batch else 0
        other = f" + {lasts} x {self.last_batch}" if lasts else ""
        return f"{self.num_batches - lasts} x {self.batch_size}{other}"

    def size_of(self, batch: int) -> int:
        """Sequences of one batch."""
        last = self.last_batch and batch % self.part_batches == self.part_batches - 1
        return self.last_batch if last else self.batch_size
