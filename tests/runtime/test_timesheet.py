"""The hours of workers, by a clock that is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.runtime.timesheet import Spent, Timesheet
from tests.runtime.test_controller import HISTORY, LOSSES, TASKS, Scripted, controller, training_round


def test_each_second_of_the_mean_worker_is_in_one_part() -> None:
    sheet = Timesheet()
    sheet.begin(10.0)
    sheet.lent(0, 10.0)
    sheet.lent(1, 10.0)
    sheet.answered(0, 14.0, data_s=1.0, compute_s=2.0)  # a second on the way, and then four seconds of nothing
    sheet.moved(14.0, 14.5)  # while worker 1 computes
    sheet.answered(1, 18.0, data_s=0.0, compute_s=8.0)
    sheet.moved(18.0, 20.0)
    spent = sheet.close(20.0, [0, 1])
    assert (spent.data, spent.compute) == (0.5, 5.0)
    assert spent.transfer == pytest.approx((1.0 + 0.5 + 2.0 + 2.0) / 2)
    assert spent.wait == pytest.approx(3.5 / 2)
    assert spent.utilisation == {0: 0.2, 1: 0.8}


def test_a_lease_over_two_rounds_counts_in_both_by_proportion() -> None:
    sheet = Timesheet()
    sheet.begin(0.0)
    sheet.lent(0, 0.0)
    assert sheet.close(3.0, [0]).compute == 3.0, "nothing is known of it: it computes"
    sheet.begin(3.0)
    sheet.answered(0, 4.0, data_s=2.0, compute_s=2.0)
    sheet.lent(0, 4.0)
    spent = sheet.close(6.0, [0])
    assert (spent.data, spent.compute) == (1.5, 1.5), "an open lease is taken to be like the last"


def test_workers_that_are_gone_leave_no_hours() -> None:
    sheet = Timesheet()
    sheet.begin(0.0)
    for worker in (0, 1):
        sheet.lent(worker, 0.0)
    sheet.gone(1)
    sheet.answered(0, 2.0, 0.0, 2.0)
    assert sheet.close(2.0, [0]) == Spent(0.0, 2.0, 0.0, 0.0, {0: 1.0})
    assert sheet.close(2.0, []) == Spent(wait=2.0)


@given(HISTORY, st.integers(1, 5), LOSSES)
def test_the_parts_add_up_whatever_happens(script: list[tuple[str, int]], workers: int, losses: list[int]) -> None:
    backend = Ticking(script, workers, losses=losses)
    driver = controller(backend)
    for version in range(3):
        result = driver.run(training_round(version))
        backend.commit(version, TASKS)
        spent = result.spent
        parts = (spent.data, spent.compute, spent.transfer, spent.wait)
        assert sum(parts) == pytest.approx(max(result.seconds, 1e-9)) and min(parts) >= 0
        assert set(spent.utilisation) == set(backend.workers())
        assert all(0 <= share <= 1 for share in spent.utilisation.values())


class Ticking(Scripted):
    """Time passes in each call."""

    def wait(self, timeout: float) -> list:
        self.now += 1.5
        return super().wait(timeout)

    def settle(self) -> list:
        self.now += 0.25
        return super().settle()
