"""Methods against test sets, scored by PSNR-Y, SSIM-Y and LPIPS."""

from hitsr_fast.evaluate.methods import Bicubic, HitSRMethod, Method
from hitsr_fast.evaluate.report import COLUMNS, MeanScore, Report, Score, check_report_path, format_mean
from hitsr_fast.evaluate.run import evaluate
from hitsr_fast.evaluate.sets import SCALES, EvalSet, EvaluationError, Pair, find_set

__all__ = [
    "COLUMNS",
    "SCALES",
    "Bicubic",
    "EvalSet",
    "EvaluationError",
    "HitSRMethod",
    "MeanScore",
    "Method",
    "Pair",
    "Report",
    "Score",
    "check_report_path",
    "evaluate",
    "find_set",
    "format_mean",
]
