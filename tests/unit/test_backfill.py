"""Days that miss something -> the stretches they are landed in."""

from datetime import date

import pytest

from ingestion.errors import ConfigurationError
from orchestration.backfill import DayRange, to_stretches


def day(number: int) -> date:
    return date(2026, 2, number)


@pytest.mark.parametrize(
    ("days", "most", "stretches"),
    [
        ([], 7, []),
        ([3], 7, [(3, 3)]),
        ([5, 3, 4], 7, [(3, 5)]),
        ([1, 2, 3, 4, 5], 2, [(1, 2), (3, 4), (5, 5)]),
        ([1, 2, 9, 11, 12], 7, [(1, 2), (9, 9), (11, 12)]),
        ([1, 2, 3], 1, [(1, 1), (2, 2), (3, 3)]),
    ],
)
def test_stretches_are_days_that_follow_each_other(
    days: list[int], most: int, stretches: list[tuple[int, int]]
) -> None:
    found = list(to_stretches([day(number) for number in days], most))
    assert found == [DayRange(day(first), day(last)) for first, last in stretches]


def test_both_ends_of_a_range_belong_to_it() -> None:
    window = DayRange(day(3), day(4)).window
    assert window.start.isoformat() == "2026-02-03T00:00:00+00:00"
    assert window.stop.isoformat() == "2026-02-05T00:00:00+00:00"
    assert str(DayRange(day(3), day(3))) == "2026-02-03"
    with pytest.raises(ConfigurationError, match="end"):
        DayRange(day(4), day(3))
