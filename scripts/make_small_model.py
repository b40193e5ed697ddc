"""Write a small two-stage model with random weights, in the hub's layout and file formats."""

from __future__ import annotations

import argparse

from modelscope_i2v.weights.small_model import make_small_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="damo/Image-to-Video and damo/Video-to-Video go below it")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    arguments = parser.parse_args()
    for folder in make_small_model(arguments.folder, seed=arguments.seed):
        print(folder)


if __name__ == "__main__":
    main()
