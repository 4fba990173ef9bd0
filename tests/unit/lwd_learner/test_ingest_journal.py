# SPDX-License-Identifier: Apache-2.0
"""What came in when, in steps of the trainer."""

from __future__ import annotations

from pathlib import Path

from lwd_learner.ingest_journal import Arrival, IngestJournal


def test_at_a_step_only_what_had_come_in_by_then_counts(tmp_path: Path) -> None:
    journal = IngestJournal(tmp_path / "journal")
    for arrival in (Arrival(0, 0, 0), Arrival(10, 2, 1), Arrival(25, 5, 1)):
        journal.note(arrival)
    for one in (journal, IngestJournal(tmp_path / "journal")):
        assert one.after(0) == one.after(9) == Arrival(10, 2, 1)
        assert one.after(10) == one.after(24) == Arrival(25, 5, 1), "those of step 10 count at step 10"
        assert one.after(25) is None, "all count"


def test_what_comes_in_while_lost_steps_are_repeated_waits_for_their_end(tmp_path: Path) -> None:
    journal = IngestJournal(tmp_path / "journal")
    journal.note(Arrival(0, 0, 0))
    journal.note(Arrival(30, 4, 0))
    resumed = IngestJournal(tmp_path / "journal")
    resumed.note(
        Arrival(20, 6, 0)
    )  # a run that resumed from step 20, ten steps before the last arrival it knows
    assert resumed.after(29) == Arrival(30, 4, 0) and resumed.after(30) is None
    resumed.note(Arrival(31, 7, 0))
    assert resumed.after(30) == Arrival(31, 7, 0)


def test_several_arrivals_of_one_step_are_one(tmp_path: Path) -> None:
    journal = IngestJournal(tmp_path / "journal")
    for stored in (0, 3, 6):
        journal.note(Arrival(5, stored, 0))
    assert journal.after(4) == Arrival(5, 0, 0) and journal.after(5) is None


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = IngestJournal(path)
    journal.note(Arrival(0, 0, 0))
    journal.note(Arrival(7, 3, 1))
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:length])
        torn = IngestJournal(path)
        assert torn.after(0) is None
        torn.note(Arrival(9, 3, 1))
        assert IngestJournal(path).after(0) == Arrival(9, 3, 1)


def test_a_run_that_begins_begins_with_all_that_is_there(tmp_path: Path) -> None:
    journal = IngestJournal(tmp_path / "journal")
    journal.note(Arrival(900, 12, 0))
    journal.clear()
    assert journal.after(0) is None and IngestJournal(tmp_path / "journal").after(0) is None


def test_what_speaks_of_a_replay_that_was_moved_away_is_forgotten(tmp_path: Path) -> None:
    for stored, kept in (((12, 3), True), ((40, 9), True), ((11, 3), False), ((12, 2), False)):
        IngestJournal(tmp_path / "journal").clear()
        IngestJournal(tmp_path / "journal").note(Arrival(900, 12, 3))
        journal = IngestJournal(tmp_path / "journal")
        journal.forget_unless_stored(*stored)
        assert (journal.after(0) is not None) == kept
        assert (IngestJournal(tmp_path / "journal").after(0) is not None) == kept
    journal = IngestJournal(tmp_path / "journal")
    journal.note(Arrival(5, 0, 0))
    journal.forget_unless_stored(0, 0)
    assert journal.after(0) is None
