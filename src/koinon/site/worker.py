"""A job's own process at a site: it answers the tasks that the site hands it, until it is ended."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from koinon.data import own
from koinon.errors import in_a_line
from koinon.payload import Payload, codec
from koinon.site import child, jobfile
from koinon.site.agent import Agent, State
from koinon.site.runner import in_loops, inline
from koinon.task import Failure, Job, Task, Worker
from koinon.task.wire import JOIN

REASON, TRACEBACK = 1000, 9000
"""Characters that are said of a failure, at most; of the traceback the last ones."""


@dataclass(frozen=True)
class Bench:
    """A job at work at one site.

    Args:
        job: whose executors answer.
        site: its name.
        seed: of the run.
        folder: where the job was unpacked, and where what the site remembers lies.
        open: what answers each task, opened.
        hold: what the site holds, or counts: `.train` and `.test`.
    """

    job: Job
    site: str
    seed: int
    folder: Path
    open: Callable[[], Mapping[str, Worker]]
    hold: Callable[[], Any]

    @staticmethod
    def of(order: Mapping[str, Any]) -> Bench:
        """As a site's first message says.

        Raises:
            KoinonError: the job cannot be built.
        """
        wanted, folder = SimpleNamespace(**order["manifest"]), Path(order["job"])
        job = in_loops(jobfile.ordered(wanted, folder / wanted.file))
        hold = partial(own.at, order["data"], job.data, site := order["site"], wanted.sites or ())
        return Bench(job, site, wanted.seed, folder, partial(inline, job, threads=order["threads"]), hold)

    @cached_property
    def data(self) -> Any:
        """What the site holds."""
        return self.hold()

    @cached_property
    def agent(self) -> Agent:
        """With its executors opened."""
        return Agent(self.job, lambda site: self.data, self.open(), self.seed)

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Do a task: its answer, and what the site then remembers, are in the files that the message names.

        Nothing is remembered of a task that failed, and of one that changes nothing.

        Returns:
            What to say of it.
        """
        began, asked = time.perf_counter(), message["task"]
        answer, state = Path(message["answer"]), Path(message["state"])
        try:
            failure = self._answer(asked, Path(message["payload"]), answer, state)
        except (Exception, SystemExit) as error:  # an executor's own sys.exit() ends a task, not this process
            failure = Failure(_in_words(error), "".join(traceback.format_exception(error)))
        if failure:
            state.unlink(missing_ok=True)
            said = {"reason": failure.reason[:REASON], "traceback": failure.traceback[-TRACEBACK:]}
            text = json.dumps(said, ensure_ascii=False).encode(errors="replace")
            _write(answer, lambda draft: draft.write_bytes(text))
        return {"done": asked["id"], "seconds": time.perf_counter() - began, "failed": failure is not None}

    def _answer(self, asked: Mapping[str, Any], payload: Path, answer: Path, state: Path) -> Failure | None:
        """Write the answer; or return why there is none."""
        if asked["name"] == JOIN:
            held = {"train": self.data.train, "test": self.data.test}
            counts = {name: 0 if data is None else len(data) for name, data in held.items()}
            joined = Payload("metrics", {}, {"weight": 1, "metrics": counts})
            _write(answer, lambda draft: codec.save(joined, draft))
            return None
        before, states = self.folder / "state.safetensors", dict[str, State]()
        if before.exists():
            states[self.site] = codec.unpack(before.read_bytes())
        task = Task(asked["id"], asked["name"], asked["round"], codec.load(payload), (self.site,))
        result = self.agent.work(task, self.site, states)
        if (sent := result.payload) is None:
            return result.failure
        if before.exists() or states[self.site]:
            _write(state, lambda draft: draft.write_bytes(codec.pack(states[self.site])))
        _write(answer, lambda draft: codec.save(sent, draft))
        return None


def main() -> None:
    """Build the job, say so, and answer until there is nothing more to do."""
    line = child.parent()
    messages = line.hear()
    order = next(messages)
    try:
        bench = Bench.of(order)
    except (Exception, SystemExit) as error:
        said = "".join(traceback.format_exception(error))
        line.say(broken=_in_words(error)[:REASON], traceback=said[-TRACEBACK:])
        return
    line.say(ready=True)
    for message in messages:
        if "task" not in message:
            return
        line.say(**bench.answer(message))


def _in_words(error: BaseException) -> str:
    return in_a_line(error) if isinstance(error, Exception) else f"it called sys.exit({error})"


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that is there whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        write(draft)
        draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink()


if __name__ == "__main__":
    main()
