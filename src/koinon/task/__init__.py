"""WHO WAS ASKED WHAT: tasks, the board that keeps account of them, and the job.  No I/O, no clock."""

from koinon.task.board import Board, Progress, Verdict
from koinon.task.job import Context, Controller, Executor, Job, JobState, Worker, describe, move
from koinon.task.task import Failure, Result, Task

__all__ = [
    "Board",
    "Context",
    "Controller",
    "Executor",
    "Failure",
    "Job",
    "JobState",
    "Progress",
    "Result",
    "Task",
    "Verdict",
    "Worker",
    "describe",
    "move",
]
