"""The layout of the state: what its numbers and names mean, and the version of its format.

The key schema is in `stores.redis`, the bytes of a history in `schema.user_history`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from eddyline.settings.loader import Settings

# Increases when keys in Redis or records in our topics change their meaning.
LAYOUT_VERSION = 3


@dataclass(frozen=True, slots=True)
class Layout:
    """What the numbers and names in the state mean. Written once; other layouts are refused.

    popular_bucket_s: width of a popularity bucket, seconds; 0 in layouts before version 3
    id_form: of user ids and item ids; "" in layouts of versions that kept every id as it was sent
    """

    version: int
    clicks_partitions: int
    items_partitions: int
    item_slots: int
    popular_bucket_s: int = 0
    id_form: str = ""

    def agrees(self, claimed: Layout) -> bool:
        """Whether the layouts differ at most by a form of ids that this one does not say."""
        known = replace(self, id_form=claimed.id_form)
        return not self.id_form and bool(claimed.id_form) and known == claimed

    def refusal(self, claimed: Layout) -> str:
        """Why `claimed` is refused, with the way out."""
        said = f"is laid out as {self}, settings say {claimed}"
        if self.version != claimed.version:
            return f"{said}. Another version wrote it: empty it, ingest fills it again from Kafka"
        if self.id_form and claimed == replace(self, id_form=claimed.id_form):
            return (
                f"{said}. Users and items would be lost under other spellings of their ids: set "
                f"id_form = {self.id_form!r}, or copy the topics with `eddyline repartition` into "
                f"a namespace that begins with id_form = {claimed.id_form!r}"
            )
        if claimed == replace(self, popular_bucket_s=claimed.popular_bucket_s):
            return (
                f"{said}. Buckets of another width cannot be counted together: set "
                f"popular_bucket_s = {self.popular_bucket_s}, or empty it, and ingest fills it "
                "again from Kafka"
            )
        return said


def layout(settings: Settings) -> Layout:
    """The layout of these settings."""
    return Layout(
        LAYOUT_VERSION,
        settings.clicks_partitions,
        settings.items_partitions,
        settings.item_slots,
        settings.popular_bucket_s,
        settings.id_form,
    )
