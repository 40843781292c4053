"""WHO WAS ASKED WHAT: tasks, the board that keeps account of them, and the job.  No I/O, no clock."""

from typing import TYPE_CHECKING

from koinon.lazy import names_of

if TYPE_CHECKING:
    from koinon.task.answers import Answers, Refusal, Update, averaged, checked, chunks, expected, read
    from koinon.task.board import Board, Progress, Verdict
    from koinon.task.job import Context, Controller, Executor, Job, Worker, describe
    from koinon.task.state import JobState, move
    from koinon.task.task import Failure, Result, Task

__all__ = [
    "Answers",
    "Board",
    "Context",
    "Controller",
    "Executor",
    "Failure",
    "Job",
    "JobState",
    "Progress",
    "Refusal",
    "Result",
    "Task",
    "Update",
    "Verdict",
    "Worker",
    "averaged",
    "checked",
    "chunks",
    "describe",
    "expected",
    "move",
    "read",
]

__getattr__ = names_of(__name__, "task", "board", "state", "answers", "job")
