"""Records (JSON lines) -> one self-contained page. Reads files only; imports neither torch nor the rest of flopwise."""

from flopwise.report.write import read_records as read_records
from flopwise.report.write import write_report as write_report
