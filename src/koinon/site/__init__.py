"""AT THE SITE: the agent that answers tasks, and where executors run."""

from koinon.site.agent import Agent, SiteContext, State, States
from koinon.site.runner import forms, in_loops, inline, settled
from koinon.site.state import StateTable

__all__ = ["Agent", "SiteContext", "State", "StateTable", "States", "forms", "in_loops", "inline", "settled"]
