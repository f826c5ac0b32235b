"""What layers keep is the most that fits, and never more than was granted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.catalog.decoder import DecoderSpec
from affina.catalog.fused_choice import StepChoice, StepDemand, choose_step, step_bytes
from affina.catalog.fused_memory import FusedRow
from affina.catalog.save_policy import Keep, LayerRanks, SavePolicy, kept_bytes_per_token

QWEN3_4B = DecoderSpec("qwen3", 36, 2560, 9728, 32, 8, 128, 151_936, 1e-6, True, (None,) * 36)
RANKS = LayerRanks(qkv=48, output=16, gate_up=32, down=16, largest=16)


def row(num_tokens: int) -> FusedRow:
    return FusedRow(QWEN3_4B, RANKS, num_tokens, num_tokens, 2, "dense", 33_030_144, 441)


def choose(budget_bytes: int, *, num_tokens: int = 16_384, may_offload: bool = True) -> SavePolicy:
    options = {"recompute": "auto", "may_offload": may_offload, "may_capture": False, "on_gpu": True}
    return choose_step(row(num_tokens), StepDemand(), budget_bytes=budget_bytes, **options).policy  # type: ignore[arg-type]


def needed(policy: SavePolicy, num_tokens: int) -> int:
    return step_bytes(row(num_tokens), StepChoice(policy, False), StepDemand(), on_gpu=True).needed


def num_bytes(policy: SavePolicy, num_tokens: int = 16_384) -> int:
    return policy.num_bytes(QWEN3_4B, num_tokens=num_tokens, itemsize=2, ranks=RANKS)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (Keep.PARTS, 2 * 16),
        (Keep.OFFLOADED, 2 * 16),
        (Keep.INPUT, 2 * (2560 + 16)),
        # x, x₂, o and t of all four in 16 bits; log-sum-exp of 32 heads and two factors of norms in 32
        (Keep.ATTENTION, 2 * (2560 + 2560 + 4096 + 112) + 4 * 34),
        # and q, k, v with 48 columns of room, 6192 rounded up to 6208
        (Keep.PROJECTIONS, 2 * (2560 + 2560 + 4096 + 112 + 6208) + 4 * 34),
    ],
)
def test_the_bytes_of_a_level_can_be_counted_on_paper(keep: Keep, expected: int) -> None:
    assert kept_bytes_per_token(QWEN3_4B, keep, itemsize=2, ranks=RANKS) == expected


def test_a_higher_level_never_keeps_less() -> None:
    sizes = [kept_bytes_per_token(QWEN3_4B, keep, itemsize=2, ranks=RANKS) for keep in Keep]
    assert sizes == sorted(sizes)


@settings(max_examples=12, deadline=None)
@given(gibibytes=st.floats(0, 80), num_tokens=st.integers(128, 40_000))
def test_the_choice_fits_and_one_layer_more_would_not(gibibytes: float, num_tokens: int) -> None:
    budget = int(gibibytes * 2**30)
    policy = choose(budget, num_tokens=num_tokens)
    leanest = SavePolicy.uniform(36, Keep.OFFLOADED)
    if needed(leanest, num_tokens) > budget:
        assert policy == SavePolicy.uniform(36, Keep.PARTS)
        return
    assert needed(policy, num_tokens) <= budget
    if set(policy.layers) != {Keep.ALL}:
        lowest = min(policy.layers)
        position = max(index for index, keep in enumerate(policy.layers) if keep == lowest)
        richer = SavePolicy(
            tuple(Keep(keep + 1) if index == position else keep for index, keep in enumerate(policy.layers))
        )
        assert needed(richer, num_tokens) > budget


def test_rows_are_captured_when_there_is_room_for_their_memory_besides() -> None:
    options = {"recompute": "auto", "may_offload": True, "may_capture": True, "on_gpu": True}
    roomy, tight = (
        choose_step(row(2048), StepDemand(), budget_bytes=budget << 20, **options)  # type: ignore[arg-type]
        for budget in (20_000, 1_100)
    )
    assert roomy == StepChoice(SavePolicy.uniform(36, Keep.ALL), is_captured=True)
    assert not tight.is_captured


def test_without_offloading_the_leanest_keeps_inputs() -> None:
    assert choose(0, may_offload=False) == SavePolicy.uniform(36, Keep.INPUT)


def test_leaner_policies_end_with_layers_in_parts_and_each_before_keeps_less() -> None:
    policy: SavePolicy | None = choose(40 << 30)
    policies = []
    while policy is not None:
        policies.append(policy)
        policy = policy.leaner()
    assert policies[-2:] == [SavePolicy.uniform(36, Keep.OFFLOADED), SavePolicy.uniform(36, Keep.PARTS)]
    sizes = [num_bytes(policy) for policy in policies]
    assert sizes == sorted(sizes, reverse=True)
    # The last step saves memory of the layer at work, not of what is kept.
    assert len(set(sizes)) == len(sizes) - 1


def test_a_policy_reads_as_one_line() -> None:
    layers = (Keep.OFFLOADED,) * 2 + (Keep.INPUT,) * 33 + (Keep.ALL,)
    assert SavePolicy(layers).describe() == "1 × all, 33 × input, 2 × offloaded"
