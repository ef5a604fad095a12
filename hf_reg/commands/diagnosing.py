"""`hf-reg diagnose RUN`: a run in a folder, judged; and its picture."""

from __future__ import annotations

from pathlib import Path

from ..diagnosis import OverfitReport, diagnose
from ..files import replacing
from ..runs.errors import UseError, one_line, refused_as_run


__all__ = ["diagnose_folder"]

KINDS = (".png", ".svg", ".pdf")


def diagnose_folder(run: Path, plot: Path | None = None) -> OverfitReport:
    """Judge the run in a folder and, with `plot`, draw it.

    Args:
        run (`Path`): as [`~hf_reg.diagnose`] takes it.
        plot (`Path`, *optional*): a .png, .svg or .pdf file; it is there whole or not at all.

    Raises:
        [`UseError`]: for a folder that cannot be judged, or a picture that cannot be asked for. [`RunError`]: if it
            cannot be drawn or written.
    """
    if plot is not None:
        if plot.suffix.lower() not in KINDS:
            raise UseError(f"--plot: {str(plot)!r} is no picture that can be drawn. Give one of {', '.join(KINDS)}.")
        if not plot.parent.is_dir():
            raise UseError(f"--plot: there is no folder {str(plot.parent)!r}. Make it, or give another.")
    try:
        report = diagnose(run)
    except (ValueError, OSError) as error:
        raise UseError(one_line(error)) from error
    if plot is not None:
        with refused_as_run(f"{plot} cannot be drawn"), replacing(plot) as unfinished:
            report.figure().savefig(unfinished, dpi=150, format=plot.suffix[1:].lower())
    return report
