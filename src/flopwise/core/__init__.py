"""What every technique shares: the FLOP budget and its ledger, and batches that are pytrees."""

from flopwise.core.batch import endless as endless
from flopwise.core.budget import Budget as Budget
from flopwise.core.ledger import Ledger as Ledger
