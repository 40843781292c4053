"""AT THE SITE: the agent that answers tasks, and the runner of the executors."""

from koinon.site.agent import Agent, SiteContext, State, work_together
from koinon.site.runner import Inline, Runner

__all__ = ["Agent", "Inline", "Runner", "SiteContext", "State", "work_together"]
