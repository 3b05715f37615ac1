"""Further baselines of FibecFed's paper, on TREC and RTE: the page's table of each beside plain federated LoRA.

    python recipes/further.py trec --jobs 2                             the packaged questions
    python recipes/further.py trec rte --folder PATH/TO/SETS --jobs 2   and whether a sentence follows from another
    python recipes/further.py trec --keep                               put its finished runs into docs/results/further, an archive a task
    python recipes/further.py --page                                    make the tables of docs/results/fibecfed.md anew from those archives

Plain LoRA with the curricula of VOC, SLW, Shortformer and of the loss, easy first (``lora+CURRICULUM``), what else is done with LoRA's
factors and ranks, and FedEven, which the core table has as well. Settings and rates are those of ``core.py``, so its ``lora`` and
``fedeven`` come out the same; each method trains its own kind of adapter (``fedalt`` has two pairs). It is ``fedloom compare``; whatever
is added is added to these, and the later one counts. Stop it and run it again: finished runs are used as they are.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from core import TABLE as CORE

CURRICULA = ("lora+voc", "lora+slw", "lora+shortformer", "lora+loss")
TABLE = replace(
    CORE,
    name="further",
    shape=CORE.shape.replace("--share-training ", "").replace(" --adapter.kind lora", ""),
    methods=("lora", *CURRICULA, "ffa", "fedsa", "slora", "rolora", "adalora", "deltalora", "fedalt", "fedeven"),
    shapes={task: CORE.shapes[task] for task in ("trec", "rte")},
)

if __name__ == "__main__":
    sys.exit(TABLE.command(__doc__))
