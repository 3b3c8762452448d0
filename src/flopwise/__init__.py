"""Stop wasting FLOPs."""

from flopwise.core import Budget as Budget
from flopwise.core import Ledger as Ledger
from flopwise.core import endless as endless
from flopwise.importance_sampling import ImportanceSampler as ImportanceSampler

__version__ = "0.1.0"
