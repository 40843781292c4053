"""A site's errands as a table of cases: what was heard and done, and what is to be done next."""

import pytest

from koinon.errors import Refused
from koinon.task.errands import Answer, Backoff, Deliver, Discard, Errands, Forget, Work, file_name
from koinon.task.wire import Assignment, Orders

ONE, OTHER = "1" * 64, "2" * 64


def asked(task="1-train", job="j", digest=ONE):
    return Assignment(job, task, "train", 1, digest, 10, "b" * 64, 20)


def answer(task="1-train", job="j", of=ONE, failed=False):
    return Answer(job, task, of, "d" * 64, 5, 1.0, failed)


def work(task="1-train", digest=ONE, refused=""):
    return Work(asked(task, digest=digest), refused)


def orders(*assignments, drop=(), end=()):
    return Orders([*assignments], {"j": [*drop]} if drop else {}, [*end])


def play(errands, script):
    """What each event of a script says; of `next`, the step."""
    said = []
    for event, *arguments in script:
        match event:
            case "hear":
                said.append(errands.hear(*arguments))
            case "next":
                said.append(errands.next("j"))
            case "full":
                said.append(errands.next("j", room=False))
            case "stops":
                said.append(errands.stops("j"))
            case "holding":
                said.append((errands.holding.get("j", []), errands.jobs))
            case "payloads":
                said.append(errands.payloads("j"))
            case "done" | "acknowledged":
                said.append(getattr(errands, event)(*arguments))
            case _:
                said.append(getattr(errands, event)("j", *arguments))
    return said


TRAIN, EVALUATE = "1-train", "2-evaluate"
HEAR, BEGIN, DIED = ("hear", orders(asked())), ("begin", TRAIN), ("died", TRAIN)
DONE, BROUGHT = ("done", answer()), ("acknowledged", answer())
DROP, END = ("hear", orders(drop=[TRAIN])), ("hear", orders(end=["j"]))
OVER = "the job 'j' has ended at this site before: submit it anew"
CASES = {
    "asked, worked on, delivered, and nothing is left": (
        [HEAR, ("holding",), ("next",), BEGIN, ("next",), DONE, ("next",), ("holding",), BROUGHT, ("next",),
         ("holding",)],
        [True, ([TRAIN], ["j"]), work(), None, None, None, Deliver(answer()), ([TRAIN], ["j"]), None, None,
         ([], ["j"])]),
    "the same again is nothing new, whatever its state": (
        [HEAR, HEAR, BEGIN, HEAR, DONE, HEAR, ("next",)],
        [True, False, None, False, None, False, Deliver(answer())]),
    "the next task waits until what was learned in the last one counts": (
        [("hear", orders(asked(), asked(EVALUATE))), BEGIN, ("next",), DONE, ("next",), BROUGHT, ("next",)],
        [True, None, None, None, Deliver(answer()), None, work(EVALUATE)]),
    "dropped before it began": (
        [HEAR, DROP, DROP, ("holding",), ("next",), ("discarded", TRAIN), ("next",)],
        [True, True, False, ([], ["j"]), Discard(TRAIN), None, None]),
    "dropped while it is worked on": (
        [HEAR, BEGIN, ("stops",), DROP, ("stops",), ("next",), DIED, ("stops",), ("next",)],
        [True, None, False, True, True, None, False, False, Discard(TRAIN)]),
    "dropped, but it was quicker": ([HEAR, BEGIN, DROP, DONE, ("next",)], [True, None, True, None, Discard(TRAIN)]),
    "dropped while it is delivered": (
        [HEAR, BEGIN, DONE, DROP, BROUGHT, ("next",)], [True, None, None, True, None, None]),
    "dropped and asked anew, of another model": (
        [HEAR, BEGIN, DROP, ("hear", orders(asked(digest=OTHER))), ("holding",), DIED, ("next",),
         ("discarded", TRAIN), ("next",)],
        [True, None, True, True, ([TRAIN], ["j"]), False, Discard(TRAIN), None, work(digest=OTHER)]),
    "asked of another model without being dropped": (
        [HEAR, BEGIN, ("hear", orders(asked(digest=OTHER))), ("stops",), ("payloads",)],
        [True, None, True, True, {OTHER}]),
    "the third death is the last": (
        [HEAR, BEGIN, DIED, ("next",), BEGIN, DIED, BEGIN, DIED, ("done", answer(failed=True)), ("next",)],
        [True, None, False, work(), None, False, None, True, None, Deliver(answer(failed=True))]),
    "something else comes first": ([HEAR, BEGIN, ("postpone",), ("next",)], [True, None, None, work()]),
    "the answer was refused, and another takes its place": (
        [HEAR, BEGIN, DONE, ("done", answer(failed=True)), ("next",)],
        [True, None, None, None, Deliver(answer(failed=True))]),
    "no room: nothing begins, what is done is delivered": (
        [("hear", orders(asked(), asked(EVALUATE))), ("full",), BEGIN, DONE, ("full",), BROUGHT, ("full",)],
        [True, None, None, None, Deliver(answer()), None, None]),
    "the job ends with everything in it": (
        [HEAR, END, END, ("holding",), ("next",), ("forgotten",), ("next",), ("holding",)],
        [True, True, False, ([], []), Forget(), None, None, ([], [])]),
    "the job ends while something is worked on": (
        [HEAR, BEGIN, END, ("stops",), ("next",), DIED, ("next",)], [True, None, True, True, None, False, Forget()]),
    "an ended job that comes again is refused, and ends again": (
        [HEAR, END, ("forgotten",), HEAR, ("full",), ("done", answer(failed=True)), ("next",),
         ("acknowledged", answer(failed=True)), ("holding",), END, ("next",)],
        [True, True, None, True, work(refused=OVER), None, Deliver(answer(failed=True)), None, ([], ["j"]), True,
         Forget()]),
    "ended and asked again in one breath": (
        [HEAR, ("hear", orders(asked(EVALUATE), end=["j"])), ("next",), ("forgotten",), ("next",)],
        [True, True, Forget(), None, work(EVALUATE, refused=OVER)]),
    "orders about what is not known": (
        [("hear", orders(drop=["x"], end=["k"])), ("holding",), ("stops",)], [False, ([], []), False]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_case(name):
    """Events in, answers out."""
    script, expected = CASES[name]
    assert play(Errands(), script) == expected


def test_a_restarted_site_delivers_and_does_not_work_again():
    """What lies in the spool is held; an ended job is remembered; a folder without an answer is asked about."""
    errands = Errands([answer()], ["j", "k"], over=["old"])
    assert play(errands, [("holding",), HEAR, ("next",), BROUGHT, ("next",)]) == [
        ([TRAIN], ["j", "k"]),
        False,
        Deliver(answer()),
        None,
        None,
    ]
    assert errands.hear(orders(asked(job="old"))) and "ended" in errands.next("old").refused


UNSOUND = {
    "a job outside its folder": asked(job="../j"),
    "a job without a name": asked(job=""),
    "a task without a name": asked(""),
    "a task too long for a file": asked("ü" * 40),
    "a digest that is a path": asked(digest="../" + ONE[3:]),
    "a negative size": Assignment("j", TRAIN, "train", 1, ONE, -1, ONE),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_cannot_be_changes_nothing(name):
    """A server that names files outside the job's folder is not obeyed in anything that it says with it."""
    errands = Errands()
    errands.hear(orders(asked("0-train")))
    with pytest.raises(Refused, match=r"the server (assigns what cannot be|announces)"):
        errands.hear(orders(asked(), UNSOUND[name], drop=["0-train"], end=["j"]))
    assert errands.holding == {"j": ["0-train"]} and errands.jobs == ["j"]


def test_any_task_has_a_file_name():
    """Also one that a controller named with a slash."""
    assert file_name("1.0-fit / a") == "1.0-fit%20%2F%20a" and "/" not in file_name("..//")


def test_tries_come_later_and_later_but_never_too_late():
    """Full jitter: anything up to 0.2 s, doubling to 30; success starts anew."""
    backoff = Backoff()
    waits = [backoff.wait(1.0) for _ in range(10)]
    assert waits[:5] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2]) and waits[8:] == [30, 30]
    assert backoff.wait(0.0) == 0
    for _ in range(5000):
        backoff.wait(0.5)
    backoff.reset()
    assert backoff.wait(0.5) == pytest.approx(0.1)
