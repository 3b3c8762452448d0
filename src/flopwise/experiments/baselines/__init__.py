"""What importance sampling is compared with, one small file each, used like `ImportanceSampler`:

    method = SelectiveBackprop(forward, loss, batch_size=32)
    for batch in method.batches(loader):                       # the loader yields presamples
        method.loss(forward(batch.data), batch).backward()

| method | scores cost | its steps' mean gradient |
|---|---|---|
| `Uniform` | nothing | unbiased |
| `RandomSubset` | nothing | unbiased: one batch of each presample, for what leaving data out does by itself |
| `loss_based` | a forward | unbiased, weighted by 1 / p; of more variance than the upper bound |
| `History` | nothing: remembered | unbiased, weighted by 1 / p however old the scores are |
| `InfoBatch` | nothing: remembered | unbiased for the sum over a pass; a step's mean is scaled by what stays |
| `SelectiveBackprop` | a forward | biased to large losses |
| `OnlineBatchSelection` | nothing: remembered | biased to large losses |

All of them book what they spend in the active `Ledger`, so a budget treats them alike.
"""

from flopwise.experiments.baselines.base import Baseline as Baseline
from flopwise.experiments.baselines.history import History as History
from flopwise.experiments.baselines.infobatch import InfoBatch as InfoBatch
from flopwise.experiments.baselines.loss_based import loss_based as loss_based
from flopwise.experiments.baselines.online_batch_selection import OnlineBatchSelection as OnlineBatchSelection
from flopwise.experiments.baselines.selective_backprop import SelectiveBackprop as SelectiveBackprop
from flopwise.experiments.baselines.uniform import RandomSubset as RandomSubset
from flopwise.experiments.baselines.uniform import Uniform as Uniform
