"""Which rank is named for a hang, from the ranks' reports about themselves."""

import pytest

from storymem_dist.parallel.hangs import Sighting, judge


def rank(number_of_rank: int, number: int, **fields: object) -> Sighting:
    values = {"waits": True, "here_seconds": 61.0, "silent_seconds": 0.0, "line": "sequence.py:80 in all_to_all"}
    where = f"step {number}"
    return Sighting(rank=number_of_rank, host="a", number=number, where=where, **{**values, **fields})


HUNG = {"waits": False, "silent_seconds": 61.0, "line": "denoise.py:7 in denoise"}


@pytest.mark.parametrize(
    ("seen", "culprits", "text"),
    [
        (
            [rank(0, 4), rank(1, 3, **HUNG), rank(2, 4), rank(3, 4, here_seconds=60.0)],
            (1,),
            "rank 1 (a) has not left step 3, for 61 s; it is at denoise.py:7 in denoise; "
            "ranks 0, 2 and 3 wait for it in step 4, for 60 s",
        ),
        (
            [rank(0, 3), rank(1, 3, **HUNG)],
            (1,),
            "rank 1 (a) has not left step 3, for 61 s; it is at denoise.py:7 in denoise; "
            "rank 0 waits for it in step 3, for 61 s",
        ),
        (
            [rank(0, 4), rank(1, 3), rank(2, 4)],
            (1,),
            "rank 1 (a) has not left step 3, for 61 s; it is at sequence.py:80 in all_to_all; "
            "ranks 0 and 2 wait for it in step 4, for 61 s",
        ),
        (
            [rank(0, 3), rank(1, 4, unheard_seconds=12.0), rank(2, 3, **HUNG)],
            (1,),
            "rank 1 (a) has shown no sign of life for 12 s; it was last seen in step 4; "
            "ranks 0 and 2 wait for it in step 3, for 61 s",
        ),
        (
            [rank(0, 3, unheard_seconds=12.0, failure="timed out"), rank(1, 3, **HUNG), rank(2, 3)],
            (1,),
            "rank 1 (a) has not left step 3, for 61 s; it is at denoise.py:7 in denoise; "
            "ranks 0 and 2 wait for it in step 3, for 61 s",
        ),
        (
            [rank(0, 3), rank(1, 4, waits=False, failure="ValueError: no"), rank(2, 2, **HUNG)],
            (1,),
            "rank 1 (a) ended in step 4: ValueError: no; rank 0 waits for it in step 3, for 61 s; "
            "rank 2 waits for it in step 2, for 61 s",
        ),
        (
            [rank(0, 3), rank(1, 2, **HUNG), rank(2, 2, **HUNG)],
            (1, 2),
            "rank 1 (a) has not left step 2, for 61 s; it is at denoise.py:7 in denoise; "
            "rank 2 (a) has not left step 2, for 61 s; it is at denoise.py:7 in denoise; "
            "rank 0 waits for them in step 3, for 61 s",
        ),
        ([rank(0, 3), rank(1, 3)], (), "ranks 0 and 1 wait for another rank in step 3, for 61 s"),
    ],
    ids=["behind", "outside", "behind inside", "silent", "gave up waiting", "ended", "two", "none"],
)
def test_the_rank_that_the_others_wait_for_is_named(seen: list[Sighting], culprits: tuple[int, ...], text: str) -> None:
    verdict = judge(seen, alive_seconds=3.0)
    assert verdict.culprits == culprits
    assert verdict.text == text
