"""What one end of a TCP edge makes of the other's heartbeats; whole processes are in contracts/test_edge.py."""

from __future__ import annotations

from serve_app.transport.pulse import (
    CLOSED,
    ENDED,
    FIRST_BEATS,
    GONE,
    HALTED,
    PARTS,
    RUNS,
    SILENT,
    SILENT_BEATS,
    STOPPED,
    Heart,
    beat,
)

KEY = bytes(range(32))
OTHER_KEY = bytes(32)


def listener() -> Heart:
    """The receiving end's, which hears the dialler."""
    return Heart(KEY, dialled=False)


def test_a_peer_that_beats_lives() -> None:
    heart = listener()
    for number in range(100):
        assert heart.take(beat(KEY, True, number, RUNS)) is None
        assert heart.tick() is None


def test_a_peer_that_falls_silent_is_dead_after_so_many_beats() -> None:
    """A late scheduler costs it a few, and they are forgiven when the next one comes."""
    heart = listener()
    for number in range(3):
        heart.take(beat(KEY, True, number, RUNS))
        heart.tick()
        assert all(heart.tick() is None for _ in range(SILENT_BEATS - 1))
    assert heart.tick() == SILENT


def test_a_helper_that_still_starts_is_given_longer() -> None:
    heart = listener()
    assert all(heart.tick() is None for _ in range(FIRST_BEATS - 1))
    assert heart.tick() == SILENT


def test_a_process_said_to_be_stopped_is_dead_after_as_many_beats_and_a_short_stop_is_none() -> None:
    """A debugger stops it for a moment."""
    heart, number = listener(), 0
    for says in [RUNS, *[HALTED] * (SILENT_BEATS - 1), RUNS, *[HALTED] * (SILENT_BEATS - 1)]:
        assert heart.take(beat(KEY, True, number, says)) is None and heart.tick() is None
        number += 1
    heart.take(beat(KEY, True, number, HALTED))
    assert heart.tick() == STOPPED


def test_what_it_says_of_its_end_is_told_apart() -> None:
    assert listener().take(beat(KEY, True, 0, GONE)) == ENDED
    assert listener().take(beat(KEY, True, 0, PARTS)) == CLOSED


def test_a_beat_that_is_forged_replayed_left_out_or_sent_back_is_refused() -> None:
    first = beat(KEY, True, 0, RUNS)
    forged = first[:8] + bytes([PARTS]) + first[9:]
    for wrong in (beat(OTHER_KEY, True, 0, RUNS), beat(KEY, True, 1, RUNS), beat(KEY, False, 0, RUNS), forged):
        assert "not its next one" in str(listener().take(wrong))
    heart = listener()
    assert heart.take(first) is None
    assert "not its next one" in str(heart.take(first))
