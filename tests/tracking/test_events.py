"""One stream of events: every sink hears all, in order, on a clock that a resume does not set back."""

from koinon.tracking import FEDERATION, Tracker


def test_every_sink_hears_every_event_in_order():
    """The same objects, with round, site and values as they were given."""
    left, right = [], []
    tracker = Tracker(left.append, right.append)
    tracker.emit("round", 1)
    tracker.emit("metric", 1, "site-1", {"accuracy": 0.5})
    assert left == right
    assert [(event.kind, event.round, event.site) for event in left] == [
        ("round", 1, FEDERATION),
        ("metric", 1, "site-1"),
    ]
    assert left[1].values == {"accuracy": 0.5}


def test_times_do_not_fall():
    """Seconds since the run began, from zero."""
    heard = []
    tracker = Tracker(heard.append)
    for _ in range(100):
        tracker.emit("round")
    times = [event.time for event in heard]
    assert times == sorted(times)
    assert times[0] >= 0


def test_the_clock_of_a_resumed_run_goes_on():
    """After `after` seconds, not from zero."""
    assert Tracker(after=1000.0).now() >= 1000.0
