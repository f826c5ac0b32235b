"""Cards are found by any usual name, and their numbers are the dense ones."""

from __future__ import annotations

import pytest

from affina.catalog.gpus import find_gpu, gpu_named, gpus
from affina.errors import ConfigError


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10g"),
        ("RTX A4000", "a4000"),
        ("4090", "rtx4090"),
    ],
)
def test_a_card_is_known_by_what_its_driver_reports(reported: str, name: str) -> None:
    card = find_gpu(reported)
    assert card is not None
    assert card.name == name


def test_every_card_of_the_catalog_is_found_by_its_own_name_and_title() -> None:
    for name, card in gpus().items():
        assert find_gpu(name) == card == find_gpu(card.title)


def test_peaks_are_dense_and_memory_is_below_the_box() -> None:
    cards = gpus()
    assert (cards["h100"].tflops_bf16, cards["a100-80"].tflops_bf16, cards["rtx3090"].tflops_fp16) == (989, 312, 71)
    assert cards["t4"].tflops_bf16 is None
    assert not cards["t4"].runs_fused
    for card in cards.values():
        assert card.tflops_fp8 is None or card.tflops_fp8 <= 2.1 * card.tflops_fp16  # sparse would be four times
        assert card.multiplies_fp8 == (card.tflops_fp8 is not None)
        assert card.memory_source


def test_an_unknown_card_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match=r'error\[gpu-unknown\]: there is no card "rtx4080" in the catalog') as error:
        gpu_named("rtx4080")
    assert "did you mean rtx4090" in str(error.value)
    assert "b200" in str(error.value)


def test_a_name_like_no_card_is_answered_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="or give its memory: --fit GiB"):
        gpu_named("voodoo")
