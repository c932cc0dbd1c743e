"""Elastic merging: which of the budgets of visual tokens (`connector.budgets`) a training step takes.

The length of the soft prompt differs between budgets, and with it the shape of all that the language model computes. So
there is a program for each budget, and the host chooses among them. One program for all of them would compute the
largest with masks, and save nothing. The choice depends on the seed and the number of the step alone: every process
makes the same one, and so does a run that resumes.
"""

import numpy as np


def drawn(seed: int, step: int, count: int) -> int:
    """Returns which of `count` budgets the step after `step` steps takes, from 0; all are equally likely."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0]) % count
