"""Downloads BSDS300 (22 MB) and checks its 300 photographs. Prints the folder that holds them."""
import argparse

import denoising_utils as du
from programs import run


def main(words=None):
    parser = argparse.ArgumentParser(prog='python -m programs.fetch', description=__doc__)
    parser.add_argument('--destination', metavar='FOLDER',
                        help='where to (default: BSDS300/ in this checkout)')
    print(du.fetch(parser.parse_args(words).destination))


if __name__ == '__main__':
    run(main)
