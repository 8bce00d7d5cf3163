"""Truncated against vanilla diffusion on ETH/UCY pedestrians, leaving one scene out at a time.

    python scripts/eth_ucy.py [data=FILE.npz] [output=eth_ucy.json]
        [folds=eth,univ,zara01,zara02,zara03,uni_examples] [seeds=0,1,2] [examples=1500] [threads=1]
        [steps=2500] [any other setting of both arms]
    python scripts/eth_ucy.py data=FILE.npz,biwi_hotel.txt folds=hotel    # Trajectron++'s file

Cells that the output holds already are skipped. Beside the JSON it writes a picture of the modes
(matplotlib) and prints the table.
"""

import sys
from pathlib import Path

import torch

from pedestrians.study import AT_HAND, draw, parse_settings, run, table

DATA = Path(__file__).parents[2] / "shared" / "data" / "eth_ucy" / "eth_ucy_raw.npz"


def main(arguments: list[str]) -> None:
    options = dict(argument.split("=", 1) for argument in arguments)
    torch.set_num_threads(int(options.pop("threads", "1")))
    output = Path(options.pop("output", "eth_ucy.json"))
    report = run(
        options.pop("data", str(DATA)).split(","),
        output,
        folds=options.pop("folds", ",".join(AT_HAND)).split(","),
        seeds=[int(seed) for seed in options.pop("seeds", "0,1,2").split(",")],
        examples=int(options.pop("examples", "1500")),
        settings=parse_settings(options),
    )
    print(table(report))
    try:
        draw(report, output.with_suffix(".png"))
    except ImportError as error:
        print(error)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv) or not all("=" in a for a in sys.argv[1:]):
        sys.exit(__doc__)
    main(sys.argv[1:])
