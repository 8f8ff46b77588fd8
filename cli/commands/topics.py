"""`eddyline topics`."""

from __future__ import annotations

from cli.console import console
from eddyline.errors import EddylineError
from eddyline.kafka import topic_checks, topics
from eddyline.settings.loader import Settings


def check(settings: Settings) -> None:
    """Print what is wrong with the topics. Raises EddylineError where anything is."""
    findings = topic_checks.check_topics(settings)
    for finding in findings:
        console.print(f"{finding.topic}: {finding.problem}")
        console.print(f"  {finding.mend}")
    if findings:
        raise EddylineError(f"{len(findings)} findings on the topics")
    console.print("the topics keep what Eddyline needs")


def create(settings: Settings) -> None:
    """Create the topics that are missing; give empty ones their partitions."""
    made = topics.ensure_topics(settings)
    for topic in made:
        console.print(f"made {topic}")
    console.print(f"{len(made)} topics made or given more partitions")
