import pytest

from storymem_dist.dispatch.cost import CostModel


@pytest.mark.parametrize(
    ("num_keyframes", "num_tokens", "tflop"),
    [(0, 32_760, 1_678), (10, 48_360, 3_095)],
    ids=["no memory", "10 keyframes"],
)
def test_forwards_cost_what_was_measured(num_keyframes: int, num_tokens: int, tflop: float) -> None:
    cost = CostModel()
    assert cost.num_tokens(num_keyframes) == num_tokens
    assert cost.forward_tflop(num_keyframes) == pytest.approx(tflop, rel=1e-3)


def test_a_shot_costs_its_steps_its_passes_and_its_decoding() -> None:
    guided, plain = CostModel(), CostModel(passes_per_step=1)
    decode = 2 * plain.shot_tflop(0) - guided.shot_tflop(0)
    assert decode == pytest.approx(275 * 8)
    assert guided.shot_tflop(0) == pytest.approx(80 * guided.forward_tflop(0) + decode)


def test_the_first_shot_expects_no_memory_and_later_ones_up_to_the_window() -> None:
    cost = CostModel(max_keyframes=10, keyframes_per_shot=3.0)
    assert cost.expected_keyframes("t2v", 0, num_references=2) == 0
    assert [cost.expected_keyframes("m2v", before, 2) for before in range(5)] == [2, 5, 8, 10, 10]
