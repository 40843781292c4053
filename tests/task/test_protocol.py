"""The protocol under every misfortune: board and errands, over a line that loses, delays, repeats and reorders, with
processes that are killed at any step, in virtual time.  A seed that fails replays: `python test_protocol.py SEED`.

What must hold: an acknowledged answer is in exactly one commit, a round ends, nobody waits for ever, a job ends.
"""

from __future__ import annotations

import heapq
import random
import sys
from collections import Counter
from dataclasses import dataclass, field

import pytest

from koinon.payload import Payload
from koinon.task import Board, Result, Task
from koinon.task.errands import Answer, Deliver, Discard, Errands, Forget, Work
from koinon.task.wire import Assignment, Orders

JOB, ROUNDS, LEASE, SILENCE, PATIENCE = "job", 2, 5.0, 20.0, 4.0
DIGEST = "0" * 64


class Killed(Exception):
    """A process was killed between two steps."""


@dataclass
class Disk:
    """What outlives a server: open tasks, answers, commits."""

    tasks: dict[str, Task] = field(default_factory=dict)
    answers: dict[tuple[str, str], int] = field(default_factory=dict)
    commits: list[dict[str, int]] = field(default_factory=list)
    state: str = "running"


class World:
    """A server with its controller, and sites, in virtual time.

    Args:
        seed: of every misfortune.
        gone: a site that dies in the middle and never comes back.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now, self.events, self.count = 0.0, [], 0
        # Some worlds are quiet and some are cruel, and all calm down in the end, as every cut line is mended some day.
        self.loss, self.death = self.random.choice([0, 0.1, 0.4]), self.random.choice([0, 0.02, 0.1])
        self.calm = self.random.uniform(5, 60)
        self.disk = Disk()
        self.sites = [Site(self, f"site-{number}") for number in range(self.random.randint(1, 3))]
        self.acknowledged: Counter[tuple[str, str, int]] = Counter()
        self.server: Server | None = None
        for site in self.sites:
            self.later(self.random.random(), site.start)
        self.start_server()

    def later(self, seconds: float, what, *arguments) -> None:
        self.count += 1
        heapq.heappush(self.events, (self.now + seconds, self.count, what, arguments))

    def step(self) -> None:
        """A place at which whoever is at work may be killed."""
        if self.now < self.calm and self.random.random() < self.death:
            raise Killed

    def send(self, what, *arguments) -> None:
        """A message: lost, late, twice, or before one that was sent earlier."""
        cruel = self.now < self.calm
        for _ in range(1 + (cruel and self.random.random() < self.loss / 2)):
            if not (cruel and self.random.random() < self.loss):
                self.later(self.random.expovariate(1 / (1.0 if cruel else 0.05)), what, *arguments)

    def start_server(self) -> None:
        try:
            self.server = Server(self)
        except Killed:
            self.server = None
            self.later(self.random.expovariate(0.5), self.start_server)

    def at_server(self, what: str, *arguments) -> None:
        """A request arrives; a dead server hears nothing, and one may die of it."""
        if self.server is None:
            return
        try:
            getattr(self.server, what)(*arguments)
        except Killed:
            self.server = None
            self.later(self.random.expovariate(0.5), self.start_server)

    def run(self) -> None:
        for _ in range(100_000):
            if self.disk.state != "running" and not any(site.errands.all_jobs for site in self.sites):
                return
            assert self.events, "nobody has anything to do, and the job is not over"
            self.now, _, what, arguments = heapq.heappop(self.events)
            what(*arguments)
        raise AssertionError(f"somebody waits for ever: {self.now:.0f} s, {self.disk}")


class Server:
    """What is served, and the controller beside it; both begin with what lies on the disk."""

    def __init__(self, world: World) -> None:
        self.world, self.disk = world, world.disk
        self.board, self.inner = Board(LEASE), Board()
        self.seen: dict[str, float] = {}
        self.began = world.now
        for task in self.disk.tasks.values():
            self.board.post(task)
            for (name, site), value in self.disk.answers.items():
                if name == task.id:
                    self.board.answer(result(task.id, site, value), world.now)
        self.control()

    def poll(self, site: Site, life: int, held: list[str], jobs: list[str]) -> None:
        self.seen[site.name] = self.world.now
        over = self.disk.state != "running"
        dropped = [task for task in held if over or not self.board.touch(site.name, task, self.world.now)]
        assignments = []
        while not over and (
            task := self.board.pull(site.name, self.world.now, [*held, *(a.task for a in assignments)])
        ):
            assignments.append(Assignment(JOB, task.id, task.name, task.round, DIGEST, 0, DIGEST))
        orders = Orders(assignments, {JOB: dropped} if dropped else {}, jobs if over else [])
        self.world.send(site.hear, life, orders)
        self.control()

    def push(self, site: Site, life: int, answer: Answer, value: int) -> None:
        world, key = self.world, (answer.task, site.name)
        if key in self.disk.answers:
            verdict = "duplicate"
        else:
            verdict = "accepted" if answer.task in self.disk.tasks else "late"
            if verdict == "accepted":
                world.step()
                self.disk.answers[key] = value  # durable, then counted, then acknowledged
                world.step()
                assert self.board.answer(result(*key, value), world.now) == "accepted"
        if verdict == "accepted":
            world.acknowledged[(*key, value)] += 1
        world.step()
        world.send(site.acknowledged, life, answer, verdict)
        self.control()

    def control(self) -> None:
        """The controller: a round at a time, with the answers that there are, until all are committed."""
        world, disk = self.world, self.disk
        while disk.state == "running":
            number = len(disk.commits) + 1
            if number > ROUNDS:
                disk.state = "finished"
                return
            name = f"{number}.1-train"
            if name not in self.inner.tasks:
                sites = tuple(site.name for site in world.sites)
                task = Task(name, "train", number, Payload("weights"), sites)
                self.inner.post(task)
                if name not in disk.tasks:
                    disk.tasks[name] = task
                    self.board.post(task)  # closed once, perhaps, and not committed
                    for (asked, site), value in disk.answers.items():
                        if asked == name:
                            self.board.answer(result(name, site, value), world.now)
                world.step()
            for (task, site), value in tuple(disk.answers.items()):
                if task == name:
                    self.inner.answer(result(task, site, value), world.now)
            answered = {site: value for (task, site), value in disk.answers.items() if task == name}
            lost = {site.name for site in world.sites if site.name not in answered and self.silent(site.name)}
            if not self.inner.progress(name, world.now).over and not (
                answered and len(answered) + len(lost) == len(world.sites)
            ):
                return
            # A task is closed before what has come of it is committed: what comes now is late, and said to be so.
            disk.tasks.pop(name)
            self.board.close(name)
            self.inner.close(name)
            answered = {site: value for (task, site), value in disk.answers.items() if task == name}
            world.step()
            disk.commits.append(answered)
            world.step()

    def silent(self, site: str) -> bool:
        return self.world.now - self.seen.get(site, self.began) > SILENCE


class Site:
    """A site: errands, what it does with them, and what lies in its spool."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.life, self.trained = world, name, 0, 0
        self.spool: dict[str, tuple[Answer, int]] = {}
        self.errands, self.busy, self.work, self.out = Errands(), False, None, None

    def start(self) -> None:
        """Begin with what the spool holds; every message to an earlier life is lost with it."""
        self.life, self.busy, self.work, self.out = self.life + 1, False, None, None
        self.errands = Errands([answer for answer, _ in self.spool.values()])
        self.poll(self.life)

    def die(self) -> None:
        self.life += 1
        self.world.later(self.world.random.expovariate(0.3), self.start)

    def poll(self, life: int) -> None:
        if life != self.life:
            return
        held = self.errands.holding.get(JOB, [])
        self.world.send(self.world.at_server, "poll", self, life, held, [*self.errands.jobs])
        self.world.later(2.0, self.poll, life)
        self.go(life)

    def hear(self, life: int, orders: Orders) -> None:
        if life == self.life:
            self.errands.hear(orders)
            if self.errands.stops(JOB):  # nobody waits for what is being worked on
                self.errands.died(JOB, self.work.task)
                self.busy, self.work = False, None
            self.go(life)

    def go(self, life: int) -> None:
        """The next steps, until one takes its time."""
        try:
            while life == self.life and not self.busy and (step := self.errands.next(JOB)):
                self.world.step()
                if isinstance(step, Work):
                    self.errands.begin(JOB, step.asked.task)
                    self.busy, self.work = True, step.asked
                    self.world.later(self.world.random.expovariate(1.0), self.done, life, step.asked)
                elif isinstance(step, Deliver):
                    self.busy, self.out = True, step.answer
                    value = self.spool[step.answer.task][1]
                    self.world.send(self.world.at_server, "push", self, life, step.answer, value)
                    self.world.later(PATIENCE, self.again, life, step.answer)
                elif isinstance(step, Discard):
                    self.spool.pop(step.task, None)
                    self.errands.discarded(JOB, step.task)
                elif isinstance(step, Forget):
                    self.spool.clear()
                    self.errands.forgotten(JOB)
        except Killed:
            self.die()

    def done(self, life: int, asked: Assignment) -> None:
        if life != self.life or asked is not self.work:
            return
        self.trained += 1
        answer = Answer(JOB, asked.task, asked.digest, DIGEST, 0, 1.0, False)
        self.busy, self.work = False, None
        try:
            self.world.step()
            self.spool[asked.task] = answer, self.trained
            self.world.step()
            self.errands.done(answer)
        except Killed:
            self.die()
        self.go(life)

    def again(self, life: int, answer: Answer) -> None:
        """Nobody has answered: send it again."""
        if life == self.life and self.out is answer:
            self.busy, self.out = False, None
            self.go(life)

    def acknowledged(self, life: int, answer: Answer, verdict: str) -> None:
        if life != self.life or self.out is not answer:
            return
        self.busy, self.out = False, None
        try:
            self.world.step()
            self.errands.acknowledged(answer)
            self.spool.pop(answer.task)
        except Killed:
            self.die()
        self.go(life)


def result(task: str, site: str, value: int) -> Result:
    return Result(task, site, Payload("metrics", {}, {"value": value}))


def check(seed: int) -> World:
    """Run a world to its end."""
    world = World(seed)
    world.run()
    disk = world.disk
    assert disk.state == "finished" and len(disk.commits) == ROUNDS
    for (task, site, value), times in world.acknowledged.items():
        number = int(task.partition(".")[0])
        assert times == 1, f"acknowledged {times} times: {task} of {site}"
        assert disk.commits[number - 1].get(site) == value, f"acknowledged and lost: {task} of {site}"
    for number, commit in enumerate(disk.commits, 1):
        for site, value in commit.items():
            assert disk.answers[f"{number}.1-train", site] == value
    return world


@pytest.mark.parametrize(
    "block", [pytest.param(block, marks=pytest.mark.slow if block >= 10 else ()) for block in range(1000)]
)
def test_a_thousand_worlds(block: int):
    """10,000 seeds, and 1,000,000 in `make test-all`."""
    for seed in range(1000 * block, 1000 * block + 1000):
        try:
            check(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


if __name__ == "__main__":
    print(vars(check(int(sys.argv[1]))))
