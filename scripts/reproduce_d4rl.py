"""Normalised D4RL scores of every algorithm on every dataset, beside the published figures.

    python scripts/reproduce_d4rl.py datasets=[hopper-medium-v2,sb3_halfcheetah_medium_expert]
        algorithms=[bc,diffusion_ql,idql,edp] seeds=3 [baseline=bc] [output=d4rl.json]
        [runs=runs/d4rl] [only=[*/bc/*]] [jobs=1] [any override, such as trainer.steps=10000]
    python scripts/reproduce_d4rl.py toy=true    # all of it in a minute, on noise

datasets are D4RL ids or experiments (configs/experiment); default: the nine of MuJoCo locomotion,
all seven algorithms, three training seeds. Every cell is one `diffpolicy train` in
RUNS/DATASET/ALGORITHM/SEED, evaluated with its last checkpoint on the same episode seeds (300,000
and up). Cells that are done are read, interrupted ones go on, and those whose data are missing say
where they were looked for. only= trains the cells that match and tabulates all that are done.
"""

import sys

from diffpolicy.settings import ConfigError
from reproduce.table_of_cells import main

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"reproduce_d4rl: {error}")
