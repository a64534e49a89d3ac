"""Placement rules by name, as the settings know them. Another one is a class beside these and an entry here."""

from hybridgen.scheduler.mapper import SemanticMapper
from hybridgen.scheduler.placements import FirstTouch, PaperRule, RecencyRule, RuleBase, WeightedInterleave

RULES: dict[str, type[RuleBase]] = {
    "mapper": SemanticMapper,
    "paper": PaperRule,
    "first-touch": FirstTouch,
    "interleave": WeightedInterleave,
    "recency": RecencyRule,
}
