"""Composites that can be searched: rules, spaces, heuristics and documents, without torch."""

from search_spaces.composites import AGGREGATES, ATTENTION_RULES, NORMALIZATIONS, CompositeSpec
from search_spaces.documents import CompositeDocument, document_schema, load_document, write_document
from search_spaces.errors import (
    CompositeError,
    DocumentError,
    DocumentVersionError,
    DocumentWriteError,
    OutsideSpaceError,
    PruningHPOError,
    RepairSpecError,
    SearchSpaceError,
    SpaceError,
    SpaceImportError,
    SpaceNotFiniteError,
    UnknownHeuristicError,
    UnknownRuleError,
    UnknownSpaceError,
)
from search_spaces.heuristics import HEURISTICS, TRANSFORMER_HEURISTICS, heuristic, heuristics_of
from search_spaces.imports import DATA_SCHEMES, Named, import_object, is_import_path, runs_code
from search_spaces.reasons import message_of, reason_of
from search_spaces.repairs import NO_REPAIR, REPAIRS, RepairSpec
from search_spaces.rules import GROUPS, RULE_DEFAULTS, RuleSpec
from search_spaces.spaces import (
    SPACES,
    ContinuousSpace,
    DiscreteSpace,
    RepairedSpace,
    SearchSpace,
    load_space,
    register,
)
from search_spaces.suggestions import did_you_mean

__all__ = [
    "AGGREGATES",
    "ATTENTION_RULES",
    "CompositeDocument",
    "CompositeError",
    "CompositeSpec",
    "ContinuousSpace",
    "DATA_SCHEMES",
    "DiscreteSpace",
    "DocumentError",
    "DocumentVersionError",
    "DocumentWriteError",
    "GROUPS",
    "HEURISTICS",
    "NORMALIZATIONS",
    "NO_REPAIR",
    "Named",
    "OutsideSpaceError",
    "PruningHPOError",
    "REPAIRS",
    "RULE_DEFAULTS",
    "RepairSpec",
    "RepairSpecError",
    "RepairedSpace",
    "RuleSpec",
    "SPACES",
    "SearchSpace",
    "SearchSpaceError",
    "SpaceError",
    "SpaceImportError",
    "SpaceNotFiniteError",
    "TRANSFORMER_HEURISTICS",
    "UnknownHeuristicError",
    "UnknownRuleError",
    "UnknownSpaceError",
    "did_you_mean",
    "document_schema",
    "heuristic",
    "heuristics_of",
    "import_object",
    "is_import_path",
    "load_document",
    "load_space",
    "message_of",
    "reason_of",
    "register",
    "runs_code",
    "write_document",
]
