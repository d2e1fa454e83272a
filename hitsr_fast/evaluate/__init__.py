"""Methods against test sets, scored by any of the package's metrics; sets of pairs; tokenizers."""

from hitsr_fast.evaluate.errors import EvaluationError
from hitsr_fast.evaluate.journal import Journal, digest_of, journal_path
from hitsr_fast.evaluate.methods import Bicubic, Finder, HitSRMethod, Method, Pictures, file_fingerprint
from hitsr_fast.evaluate.protocols import (
    PROTOCOLS,
    Border,
    Channel,
    Column,
    Protocol,
    columns_of,
    parse_border,
    require,
    runnable,
)
from hitsr_fast.evaluate.report import MeanScore, Report, Row, Score, check_report_path
from hitsr_fast.evaluate.run import check_request, evaluate
from hitsr_fast.evaluate.sets import SCALES, EvalSet, Pair, find_set
from hitsr_fast.evaluate.sheet import Sheet

__all__ = [
    "PROTOCOLS",
    "SCALES",
    "Bicubic",
    "Border",
    "Channel",
    "Column",
    "EvalSet",
    "EvaluationError",
    "Finder",
    "HitSRMethod",
    "Journal",
    "MeanScore",
    "Method",
    "Pair",
    "Pictures",
    "Protocol",
    "Report",
    "Row",
    "Score",
    "Sheet",
    "check_report_path",
    "check_request",
    "columns_of",
    "digest_of",
    "evaluate",
    "file_fingerprint",
    "find_set",
    "journal_path",
    "parse_border",
    "require",
    "runnable",
]
