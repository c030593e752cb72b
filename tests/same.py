"""What it takes to show that the engine writes the same tokens: the reference, the rule, runs. Needs no solver.

The rule (README, "Same tokens"): in fp32, token ids are equal. A row may part from the reference only where the reference's own two
best logits are less than 1e-4 apart; such rows are counted, and shown as a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from klotski_compiler.model import read_model
from klotski_compiler.plan import Plan
from klotski_runtime.engine import Engine, Row
from klotski_runtime.skeleton import HOST, import_model

MARGIN = 1e-4
STEPS = 18
LENGTHS = (12, 9, 1, 20, 20, 5, 3, 17, 8)


def ragged(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = ragged(*LENGTHS)


# ------------------------------------------------------------------------------------------------------- the reference


class Text(NamedTuple):
    """What the reference wrote after a prompt, and at each token how far its logit was above the next best."""

    tokens: list[int]
    margins: list[float]


class Resident:
    """A checkpoint on disk, and transformers' model of it with all weights in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spec = folder, read_model(folder)
        self._texts: dict[tuple[int, ...], Text] = {}

    @cached_property
    def model(self) -> Any:
        return resident(self.folder, torch.float32)

    def text(self, prompt: Sequence[int]) -> Text:
        """STEPS tokens, greedy, this prompt alone; nothing ends it."""
        key = tuple(prompt)
        if key not in self._texts:
            self._texts[key] = self.generate(prompt, STEPS, frozenset())
        return self._texts[key]

    def generate(self, prompt: Sequence[int], steps: int, end: frozenset[int]) -> Text:
        """Up to ``steps`` tokens, greedy, this prompt alone; a token of ``end`` is the last."""
        out = self.model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=sorted(end) or None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        top = torch.cat(out.logits).topk(2).values
        return Text(out.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist())


def resident(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model, with eager experts and no end token of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    return model


Models = Callable[..., Resident]


class Same:
    """The rule, over the rows of one test."""

    def __init__(self) -> None:
        self.parted = self.equal = self.tokens = 0

    def __call__(self, model: Resident, rows: Sequence[Row], end: frozenset[int] = frozenset()) -> None:
        """Assert it."""
        for row in rows:
            want = model.text(row.prompt)
            last = next((place for place, token in enumerate(want.tokens) if token in end), STEPS)
            expected = want.tokens[: min(last + 1, row.max_new_tokens)]
            pairs = enumerate(zip(row.tokens, expected, strict=False))
            equal = next((i for i, (token, wanted) in pairs if token != wanted), min(len(row.tokens), len(expected)))
            if row.tokens != expected:
                margin = want.margins[equal]
                assert margin < MARGIN, f"token {equal} of {row}, expected {expected} with a margin of {margin}"
                self.parted += 1  # from here on the two continue different texts
            self.equal += equal
            self.tokens += len(expected)
        assert self.equal > 0.9 * self.tokens > 0  # else nearly nothing was compared


# ------------------------------------------------------------------------------------------------------------- running


class Ran(NamedTuple):
    """rows: all of them, done. passes, prefills: of each group, those of decode and prefill that were run to their end."""

    rows: list[Row]
    passes: list[int]
    prefills: list[int]


def run(
    plan: Plan,
    model: Resident,
    scratch: Path,
    prompts: Sequence[list[int]] = PROMPTS,
    end: frozenset[int] = frozenset(),
    device: torch.device = HOST,
) -> Ran:
    """All prompts through one engine, group after group."""
    rows, counts = [Row(prompt, plan.envelope.gen_len) for prompt in prompts], list[tuple[int, int]]()
    config = import_model(model.folder)
    engine = Engine(plan, model.folder, config, scratch, threads=1, device=device, emulate=device == HOST)
    try:
        engine.load()
        size = len(rows) if plan.decision.rolling else plan.envelope.sequences
        for first in range(0, len(rows), size):
            engine.measured.passes_us.clear()
            engine.run(rows[first : first + size], end)
            decode, prefill = (len(engine.measured.passes_us.get(phase, [])) for phase in ("decode", "prefill"))
            counts.append((decode, prefill))
    finally:
        engine.close()
    assert all(row.done for row in rows)
    return Ran(rows, *(list(column) for column in zip(*counts, strict=True)))
